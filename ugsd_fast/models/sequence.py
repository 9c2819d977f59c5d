"""One request in one model: the prompt with its audio on the first forward, tokens after it, rollback in between."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ugsd_fast.cache import GrowingCache, enable_rollback, new_cache, rollback
from ugsd_fast.cache.attention import additive, attention_of
from ugsd_fast.cache.growing import OpenEnd, self_attention
from ugsd_fast.errors import ModelError
from ugsd_fast.models.families import Family
from ugsd_fast.models.text_part import TextPart, text_part

# Attention implementations that `forward_packed` can take apart, and the mask that each takes.
PACKABLE_ATTENTION = {"sdpa": "bool", "eager": "float", "flash_attention_2": None, "flash_attention_3": None}
CLIP_INPUTS = frozenset(  # one entry a clip along their first dimension
    {"input_features", "feature_attention_mask", "input_features_mask", "input_values", "padding_mask"}
    | {"audio_input_features", "audio_embed_sizes", "audio_attention_mask"}
)


class CachedSequence:
    """The key/value cache of one request, and the forward passes that fill it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only audio-language model in eval mode.
    inputs : mapping of str to Tensor
        Model inputs of the prompt: ``input_ids`` [B, P], optionally ``attention_mask`` [B, P] (left-padded), and the
        audio tensors. These are given to the first forward only, so an audio tower runs once a request.
    family : Family, optional
        Quirks of the model's family.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model.
    cache : transformers.Cache
        Its keys and values of this request.
    length : int
        Tokens in the cache, prompt included.
    forwards : int
        Forward passes so far.
    end : OpenEnd or None
        Where its tokens end, while only the device knows it; `length` is an upper bound then.

    Notes
    -----
    Position ids are always explicit and 2-D [B, q]: some families keep the last prompt's offset on the *model*, where
    the next request would find it.
    """

    _text_alone = False
    end: OpenEnd | None = None

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], family: Family | None = None):
        self.model = model
        self._prompt = dict(inputs)
        self._hears = family is not None and family.audio in inputs
        self._first_kwargs = family.forward_kwargs if family is not None and self._hears else {}
        self._audio_token = family.audio_token_id(model.config) if family is not None and self._hears else None
        self._text_alone = family is not None and family.text_alone
        self._toggles_adapter = family is not None and family.toggles_adapter
        self._rope_switch = family.rope_switch(model.config) if family is not None else None
        self.cache: Cache = new_cache(model.config)
        mask = self._prompt.pop("attention_mask", None)
        # [B, T] where rows are padded; without padding no step needs a mask.
        self._mask: Tensor | None = None if mask is None or bool(mask.all()) else mask.long()
        self.length = 0
        self.forwards = 0

    @torch.inference_mode()
    def forward(self, tokens: Tensor, *, keep: int | None = None) -> Tensor:
        """Append tokens and return the logits of the last positions.

        Parameters
        ----------
        tokens : LongTensor[B, q]
            Token ids to append. The first forward puts the prompt before them, and there q may be 0.
        keep : int, optional
            Positions whose logits are returned, counted from the end. By default q, and q + 1 on the first forward,
            where the prompt's last position predicts the first token.

        Returns
        -------
        Tensor[B, keep, V]
        """
        first = not self.length
        keep = tokens.shape[1] + first if keep is None else keep
        if first and self._audio_token is not None and bool((tokens == self._audio_token).any()):
            # Drafted beside the audio, a placeholder would be taken for one of the prompt's.
            last = self.forward(tokens[:, :0], keep=1)
            logits = torch.cat([last, self.forward(tokens)], dim=1)
            return logits[:, logits.shape[1] - keep :]
        audio = self.prompt_inputs()
        ids = torch.cat([audio.pop("input_ids"), tokens], dim=1) if first else tokens
        if self._mask is not None:
            self._mask = nn.functional.pad(self._mask, (0, self.length + ids.shape[1] - self._mask.shape[1]), value=1)
        self.check_room(ids.shape[1])
        positions = self.positions(ids)
        mask = torch.ones_like(ids) if first and self._mask is None else self.mask_of(positions)
        # Of several positions, by their indices: Gemma 4 counts on its attention's name where it is given their number.
        wanted = (
            torch.arange(ids.shape[1] - keep, ids.shape[1], device=ids.device) if first and keep > 1 else int(first)
        )
        arguments = self.step_kwargs(ids, positions, mask)
        text = self.text_part()
        if text is not None:
            logits = text(arguments, self.cache)
        else:
            with last_logits(self.model, wanted) as extra:
                arguments |= audio | extra
                logits = self.model(**arguments, past_key_values=self.cache, use_cache=True).logits
        self.appended(ids.shape[1])
        return logits[:, logits.shape[1] - keep :]

    @torch.inference_mode()
    def fork(self) -> CachedSequence:
        """A sequence of the same tokens, which goes on with keys and values of its own; not before the prompt."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def rollback(self, rejected: int) -> None:
        """Forget the newest `rejected` tokens, in place."""
        rollback(self.cache, rejected)
        self.length -= rejected
        if self._mask is not None:
            self._mask = self._mask[:, : self.length]

    @torch.inference_mode()
    def rollback_unread(self, rejected: Tensor) -> None:
        """Forget the newest tokens, of which only the device knows how many.

        Nothing is read. Until `close` tells the number, `length` is an upper bound, forwards go on behind the tokens
        that there are, and nothing else can be done with the sequence.

        Parameters
        ----------
        rejected : LongTensor[1]
            On the model's device; not checked.

        Raises
        ------
        ModelError
            If not `can_be_open`.
        """
        own = self_attention(self.cache)
        assert isinstance(own, GrowingCache)
        self.end = own.rollback_unread(rejected)

    def close(self, length: int) -> None:
        """Say how many tokens there are since `rollback_unread`.

        Parameters
        ----------
        length : int
            Of all tokens in the cache.

        Raises
        ------
        ValueError
            If there cannot be so many.
        """
        own = self_attention(self.cache)
        assert isinstance(own, GrowingCache)
        own.close(length)
        self.length, self.end = length, None

    @property
    def can_be_open(self) -> bool:
        """Whether `rollback_unread` can be: a cache that allows it, and attention that takes a mask."""
        own = self_attention(self.cache)
        return self._packs and isinstance(own, GrowingCache) and own.can_be_open and self._mask_kind is not None

    def mask_of(self, positions: Tensor) -> Tensor | None:
        """What the next forward's tokens at `positions` [B, q] may see, None where that follows from their places.

        Of prompts with padding [B, T]; where only the device knows the end [1, 1, q, T], as attention takes it.
        """
        if self.end is None:
            return self._mask
        columns = torch.arange(self.length + positions.shape[1], device=positions.device)
        seen = columns <= positions[0, :, None]
        return (additive(seen, self.model.dtype) if self._mask_kind == "float" else seen)[None, None]

    @property
    def _mask_kind(self) -> str | None:
        return PACKABLE_ATTENTION.get(attention_of(self.model.config.get_text_config(decoder=True)))

    def pack_key(self, tokens: Tensor) -> Hashable:
        """Sequences with equal keys can append their tokens in one forward; None where this one takes its own."""
        if not self._packs:
            return None
        if self.length:
            return self._step_key
        if not self._begins_packed(tokens):
            return None
        audio = tuple((name, value.shape) for name, value in sorted(self._prompt.items()) if name != "input_ids")
        return *self._step_key, audio

    @cached_property
    def _step_key(self) -> tuple[int, bool]:
        return id(self.model), self._toggles_adapter and self._hears

    @cached_property
    def _packs(self) -> bool:
        return (
            self._mask is None
            and isinstance(self_attention(self.cache), GrowingCache)
            and attention_of(self.model.config.get_text_config(decoder=True)) in PACKABLE_ATTENTION
        )

    def _begins_packed(self, tokens: Tensor) -> bool:
        """Whether a first forward can be shared: its audio is told from others' by its place in the batch alone."""
        if not self._prompt.keys() - {"input_ids"} <= CLIP_INPUTS:
            return False
        return self._audio_token is None or not bool((tokens == self._audio_token).any())

    def prompt_inputs(self) -> dict[str, Any]:
        """What the first forward is given beside the tokens, the prompt's ``input_ids`` with it; later ones nothing."""
        return {} if self.length else {**self._prompt, **self._first_kwargs}

    def hear(self, sequences: Sequence[CachedSequence], audio: dict[str, Any]) -> dict[str, Any]:
        """What a forward that `sequences` begin with is given of their `audio`, batched; nothing in later ones."""
        return audio

    def text_part(self) -> TextPart | None:
        """What the next forward can be given to instead of the whole model; None: to nothing less."""
        return text_part(self.model) if self.length and self._text_alone else None

    def step_kwargs(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Arguments of the model's forward that append tokens behind the prompt."""
        self._toggle_adapter()
        return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}

    def check_room(self, count: int) -> None:
        """Raise unless `count` more tokens can follow.

        Raises
        ------
        ModelError
            If the model's positions end before, or its rotary frequencies change.
        """
        switch = self._rope_switch
        if switch is not None and 0 < self.length <= switch < self.length + count:
            raise ModelError(
                f"{type(self.model).__name__}: the sequence grows from {self.length} to {self.length + count} "
                f"tokens, expected at most {switch} (beyond, the rotary frequencies of cached tokens change)"
            )

    def appended(self, count: int) -> None:
        """Note one forward pass over `count` tokens; after the first, the prompt's audio is let go."""
        if not self.length:
            self._prompt.clear()
            enable_rollback(self.cache)
        if self.end is not None:
            self.end.length = self.end.length + count
        self.length += count
        self.forwards += 1

    def _toggle_adapter(self) -> None:
        if self._toggles_adapter and getattr(self.model, "_hf_peft_config_loaded", False):
            (self.model.enable_adapters if self._hears else self.model.disable_adapters)()

    def positions(self, ids: Tensor) -> Tensor:
        """Positions [B, q] of the tokens that the next forward appends."""
        if self.end is not None:
            return self.end.begin(ids.shape[1])[None]
        if self._mask is not None:
            return (self._mask.cumsum(-1) - 1).clamp_(min=0)[:, self.length :]
        positions = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)
        return positions.expand(ids.shape[0], -1)


def _function(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What is behind decorators, a bound method and what others put in its place: it does not hold the model."""
    forward = inspect.unwrap(forward)
    return getattr(forward, "__func__", forward)


@lru_cache(maxsize=64)
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    """Whether a forward has ``logits_to_keep``; reading a signature takes as long as a small matrix product."""
    return "logits_to_keep" in inspect.signature(forward).parameters


@contextmanager
def last_logits(model: Any, keep: int | Tensor | None) -> Iterator[dict[str, int | Tensor]]:
    """Have the next forward compute the logits of the last `keep` positions only (0: all), or of those in a tensor.

    A prompt of a thousand positions times 152064 columns is 600 MB of logits that nobody reads. Families whose forward
    has ``logits_to_keep`` are asked; for the others, the input of the LM head is cut.
    """
    if keep is None or (isinstance(keep, int) and not keep):
        yield {}
    elif _keeps_logits(_function(model.forward)):
        yield {"logits_to_keep": keep}
    else:
        thread = threading.get_ident()
        kept = slice(-keep, None) if isinstance(keep, int) else keep

        def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (args[0][:, kept],) if threading.get_ident() == thread else None

        hook = model.get_output_embeddings().register_forward_pre_hook(cut)
        try:
            yield {}
        finally:
            hook.remove()
