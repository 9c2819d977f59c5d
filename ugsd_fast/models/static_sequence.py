"""One request at a time in a cache of fixed size and address: forwards that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from ugsd_fast.cache.attention import additive
from ugsd_fast.errors import ModelError
from ugsd_fast.models.families import Family
from ugsd_fast.models.sequence import last_logits


def check_replayable(model: Any, family: Family | None) -> None:
    """Raise unless each step of a model is the same device work.

    Raises
    ------
    ModelError
        If the family is an encoder-decoder, or needs what a replayed forward cannot do: switch an adapter, or stop
        where rotary frequencies change.
    """
    if family is not None and (
        family.is_encoder_decoder or family.toggles_adapter or family.rope_switch(model.config) is not None
    ):
        raise ModelError(
            f"graph=True: {type(model).__name__} is an encoder-decoder, has an adapter that follows the audio, or "
            "changes its rotary frequencies, expected a model whose every step is the same"
        )


class StaticSequence:
    """A static key/value cache, and the forward passes that fill it for one request after another.

    Where tokens go and which positions they have is kept on the device, so that the same calls, replayed, append the
    next tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder-only audio-language model in eval mode.
    capacity : int
        Tokens that the cache holds, prompt included.
    family : Family, optional
        Quirks of the model's family.

    Attributes
    ----------
    length : int
        Tokens in the cache, as far as `prefill`, `appended` and `rollback` have said.
    forwards : int
        Forward passes of the current request.
    """

    def __init__(self, model: Any, capacity: int, family: Family | None = None):
        self._model = model
        self._family = family
        self.capacity = capacity
        self._cache: Any = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=capacity)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=model.device)  # of the next token
        self.length = 0
        self.forwards = 0

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Forget the last request, run the prompt of the next and return the logits [1, 1, V] of its last position.

        Raises
        ------
        ModelError
            If the prompt is padded, is not of one row, or does not fit.
        """
        prompt: dict[str, Any] = dict(inputs)
        if self._family is not None and self._family.audio in prompt:
            prompt |= self._family.forward_kwargs
        mask = prompt.pop("attention_mask", None)
        ids = prompt.pop("input_ids")
        if ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
            raise ModelError(
                f"StaticSequence: input_ids has shape {tuple(ids.shape)} or padding, expected one whole row"
            )
        if ids.shape[1] > self.capacity:
            raise ModelError(f"StaticSequence: the prompt has {ids.shape[1]} tokens, expected at most {self.capacity}")
        self._cache.reset()
        self._position.zero_()
        with last_logits(self._model, 1) as extra:
            logits = self._forward(ids, attention_mask=torch.ones_like(ids), **prompt, **extra)
        for index, layer in enumerate(self._cache.layers):
            if type(layer).__name__ != "StaticLayer":
                raise ModelError(
                    f"StaticSequence: layer {index} is a {type(layer).__name__}, expected a StaticLayer "
                    "(others cannot take rejected tokens back at a fixed address)"
                )
        self.length, self.forwards = ids.shape[1], 1
        return logits[:, -1:]

    def forward(self, tokens: Tensor, new: Tensor | None = None) -> Tensor:
        """Append tokens [1, q] and return the logits [1, 1, V] of the last: device work only, fit for a graph.

        Given `new`, LongTensor[1], only so many of them are to stand, and the logits are those of the last that does.
        Whoever calls or replays it says so by `appended`.
        """
        # Left to itself, transformers reads the cache's length on the host to choose a mask for two tokens.
        columns = torch.arange(self.capacity, device=tokens.device)
        seen = columns <= (self._position + torch.arange(tokens.shape[1], device=tokens.device)).mT  # [q, capacity]
        logits = self._forward(tokens, attention_mask=additive(seen, self._model.dtype)[None, None])
        if new is None:
            return logits[:, -1:]
        self.rollback_unread(tokens.shape[1] - new)
        return logits.index_select(1, new - 1)

    def appended(self, count: int) -> None:
        """Count one forward pass over `count` tokens."""
        self.length += count
        self.forwards += 1

    def rollback(self, rejected: int) -> None:
        """Forget the newest `rejected` tokens: counters go back, nothing moves."""
        self._go_back(rejected)
        self.length -= rejected

    def rollback_unread(self, rejected: Tensor) -> None:
        """Forget the newest tokens, LongTensor[1], of which only the device knows how many; `close` sets `length`."""
        self._go_back(rejected[0])

    def close(self, length: int) -> None:
        """Say how many tokens there are since `rollback_unread`."""
        self.length = length

    def _go_back(self, rejected: int | Tensor) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(rejected)
        self._position.sub_(rejected)

    def _forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self._model(
            input_ids=tokens,
            position_ids=self._position + steps,
            past_key_values=self._cache,
            use_cache=True,
            **inputs,
        ).logits
        self._position.add_(tokens.shape[1])
        return logits
