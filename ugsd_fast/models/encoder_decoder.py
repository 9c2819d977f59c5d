"""One request in an encoder-decoder: the encoder hears the clip once, tokens go through the decoder."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from ugsd_fast.cache import new_cache
from ugsd_fast.cache.attention import additive
from ugsd_fast.errors import ModelError
from ugsd_fast.models.sequence import CachedSequence, last_logits


class EncoderDecoderSequence(CachedSequence):
    """The decoder's cache of one request; what was heard stays through every rollback.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A speech encoder-decoder in eval mode.
    inputs : mapping of str to Tensor
        The encoder's inputs, ``attention_mask`` over the audio among them, and optionally the decoder's prompt
        ``decoder_input_ids`` [B, P] (by default the start token alone).
    heard : transformers.utils.ModelOutput, optional
        What the encoder has made of the audio, where it has run already.

    Attributes
    ----------
    length : int
        Tokens in the decoder's cache, prompt included.
    forwards : int
        Decoder passes so far.
    heard_mask : Tensor[B, S] or None
        Which positions of the encoder's output are not padding; None before the encoder has run, and where all are.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], heard: Any = None):
        self.model = model
        self._prompt = dict(inputs)  # of the encoder
        self._start = decoder_prompt(model, self._prompt if heard is None else {"heard": heard[0], **self._prompt})
        self._prompt.pop("decoder_input_ids", None)
        self._heard: Any = None
        self.heard_mask: Tensor | None = None
        if heard is not None:
            self._prompt.clear()
            self._hear(heard)
        self.cache = EncoderDecoderCache(new_cache(model.config), DynamicCache())
        self._mask = None
        self._toggles_adapter = self._hears = False
        self.length = 0
        self.forwards = 0

    @torch.inference_mode()
    def forward(self, tokens: Tensor, *, keep: int | None = None) -> Tensor:
        """Append tokens and return the logits of the last positions; see `CachedSequence.forward`."""
        first = self.length == 0
        keep = tokens.shape[1] + first if keep is None else keep
        ids = torch.cat([self._start, tokens], dim=1) if first else tokens
        self.check_room(ids.shape[1])
        if self._heard is None:
            self._hear(self.model.get_encoder()(**self._prompt))
        positions = self.positions(ids)
        with last_logits(self.model, keep if first else 0) as extra:
            logits = self.model(
                **self.step_kwargs(ids, positions, self.mask_of(positions)),
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).logits
        self.appended(ids.shape[1])
        return logits[:, logits.shape[1] - keep :]

    def _hear(self, heard: Any) -> None:
        self._heard = unmasked(heard, self._mask_kind)
        self.heard_mask = getattr(heard, "attention_mask", None)

    @property
    def heard_length(self) -> int:
        """Positions of the encoder's output that the decoder attends to."""
        return self._heard[0].shape[1]

    def pack_key(self, tokens: Tensor) -> Hashable:
        """As `CachedSequence.pack_key`; what was heard already needs no encoder, so it can be of any length."""
        key = super().pack_key(tokens)
        return key if self.length or key is None or self._heard is None else (self._step_key, "heard")

    def prompt_inputs(self) -> dict[str, Any]:
        """The decoder's prompt as ``input_ids`` and the encoder's inputs; see `CachedSequence.prompt_inputs`."""
        return {} if self.length else {"input_ids": self._start, **self._prompt}

    def hear(self, sequences: Sequence[Any], audio: dict[str, Any]) -> dict[str, Any]:
        """Run the encoder on all clips in one batch; what it heard goes to the decoder side by side [1, N, D]."""
        if self.length:
            return audio
        if self._heard is None:
            heard = self.model.get_encoder()(**audio)
            for row, sequence in enumerate(sequences):
                sequence._hear(row_of(heard, row))
        states = torch.cat([sequence._heard[0] for sequence in sequences], 1)
        return {"encoder_outputs": type(self._heard)(last_hidden_state=states)}

    def _begins_packed(self, tokens: Tensor) -> bool:
        return self._heard is None or isinstance(self._heard, ModelOutput)

    def step_kwargs(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Arguments of the model's forward that append tokens to what the decoder has written."""
        return {
            "encoder_outputs": self._heard,
            "decoder_input_ids": tokens,
            "decoder_attention_mask": mask,
            "decoder_position_ids": positions,
        }

    def check_room(self, count: int) -> None:
        """Raise unless `count` more tokens can follow; see `CachedSequence.check_room`."""
        limit = getattr(self.model.config, "max_target_positions", None)
        if limit is not None and self.length + count > limit:
            raise ModelError(
                f"{type(self.model).__name__}: the decoder would hold {self.length + count} tokens, "
                f"expected at most {limit}"
            )


@torch.inference_mode()
def unmasked(heard: Any, mask_kind: str | None) -> Any:
    """What an encoder has put out, for a decoder that is to attend to all of it and to build no mask at each step.

    What is masked in every row is left out: its weights are 0, and cross-attention knows no positions. Where rows have
    different masks, one of the kind that attention takes stays (see `PACKABLE_ATTENTION`): with 4 dimensions, it is
    handed on unchanged.
    """
    mask = getattr(heard, "attention_mask", None)
    if mask is None:
        return heard
    states = heard.last_hidden_state
    valid = mask.to(states.device, torch.bool)
    if len(valid) == 1 or bool((valid == valid[:1]).all()):
        return type(heard)(last_hidden_state=states[:, valid[0]])
    if mask_kind is not None:
        mask = (additive(valid, states.dtype) if mask_kind == "float" else valid)[:, None, None]
    return type(heard)(last_hidden_state=states, attention_mask=mask)


def row_of(value: Any, row: int) -> Any:
    """One row of a tensor or of what an encoder has put out, as a batch of one."""
    if isinstance(value, ModelOutput):
        tensors = {name: part for name, part in value.items() if isinstance(part, Tensor)}
        return type(value)(**{name: part[row : row + 1] for name, part in tensors.items()})
    return value[row : row + 1]


def decoder_prompt(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """``decoder_input_ids`` [B, P], by default the model's start token alone."""
    if "decoder_input_ids" in inputs:
        return inputs["decoder_input_ids"]
    named = model.generation_config.decoder_start_token_id
    start = int(model.config.decoder_start_token_id if named is None else named)
    rows = next(iter(inputs.values())).shape[0]
    return torch.full((rows, 1), start, dtype=torch.long, device=model.device)
