"""A prompt that is computed in pieces, so that other sessions' blocks are judged in between."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ugsd_fast.cache import enable_rollback
from ugsd_fast.models import AudioLM
from ugsd_fast.models.families import Family
from ugsd_fast.models.sequence import CachedSequence, last_logits


class _Reached(Exception):
    """The text decoder was reached; what it would have got."""

    def __init__(self, kwargs: dict[str, Any]):
        super().__init__()
        self.kwargs = kwargs


@torch.inference_mode()
def prompt_embeddings(model: Any, inputs: Mapping[str, Tensor], forward_kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a model's text decoder is given for a prompt [1, P, D]: its own front end, run up to there.

    None where the decoder needs more than embeddings (per-layer inputs, masks over images), which pieces cannot have.
    """
    decoder = model.get_decoder()
    thread = threading.get_ident()

    def stop(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # others' forwards go on
            raise _Reached(kwargs)

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, **forward_kwargs, use_cache=True)
    except _Reached as reached:
        given = reached.kwargs
    finally:
        hook.remove()
    known = {
        "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict", "cache_position",
    }  # fmt: skip
    if any(name not in known and value is not None and value is not False for name, value in given.items()):
        return None
    return given.get("inputs_embeds")


class StagedSequence(CachedSequence):
    """A `CachedSequence` whose prompt is embeddings and comes piece by piece; later tokens come as ever.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    embeddings : Tensor[1, P, D]
        Of the whole prompt, audio included.
    family : Family, optional
        Quirks of the model's family.
    """

    def __init__(self, model: Any, embeddings: Tensor, family: Family | None = None):
        super().__init__(model, {}, family)
        self._hears = family is not None
        self._embeddings = embeddings
        self.prompt_length = embeddings.shape[1]

    @property
    def remaining(self) -> int:
        """Prompt positions that are still to come."""
        return max(self.prompt_length - self.length, 0)

    @torch.inference_mode()
    def advance(self, positions: int) -> Tensor | None:
        """Compute up to `positions` more of the prompt; the logits [1, 1, V] behind it when it is complete."""
        piece = self._embeddings[:, self.length : self.length + positions]
        self._toggle_adapter()
        with last_logits(self.model, 1) as extra:
            logits = self.model(
                inputs_embeds=piece,
                attention_mask=torch.ones(1, self.length + piece.shape[1], dtype=torch.long, device=piece.device),
                position_ids=self.positions(piece[..., 0]),
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).logits
        self.appended(piece.shape[1])
        if self.remaining:
            return None
        enable_rollback(self.cache)
        self._embeddings = self._embeddings[:, :0]
        return logits[:, -1:]


def audio_rows(model: AudioLM, inputs: Mapping[str, Tensor]) -> Tensor:
    """The audio encoder's output [A, D] for prepared inputs: what stands at the prompt's audio placeholders."""
    assert model.family is not None
    embeddings = prompt_embeddings(model.model, inputs, model.family.forward_kwargs)
    assert embeddings is not None
    return embeddings[inputs["input_ids"] == model.family.audio_token_id(model.model.config)]
