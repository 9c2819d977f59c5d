"""How much memory a request's keys and values take, told before they are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from ugsd_fast.cache.growing import MAX_ROLLBACK, MIN_CAPACITY, self_attention
from ugsd_fast.models import AudioLM


class CacheMemory:
    """Bytes that a model's cache takes at most for a request, as allocated.

    Parameters
    ----------
    model : AudioLM
        Asked once, by a short forward, what its layers hold for a token; an encoder-decoder hears a second of sound.
    """

    def __init__(self, model: AudioLM):
        self._audio = model.family.audio if model.family is not None else ""
        self._heard_bytes, self._heard_length = 0, 1
        self._layers: Counter[int | None] = Counter()  # bytes of a slot, by the layers' window
        inputs = _probe(model)
        sequence = model.open(dict(inputs))
        sequence.forward(torch.zeros(1, 0, dtype=torch.long, device=model.device), keep=1)
        cache = sequence.cache
        for layer in self_attention(cache).layers:
            slot = sum(states[:, :, :1].nbytes for states in _states(layer))
            window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
            self._layers[window] += slot
        if isinstance(cache, EncoderDecoderCache):
            heard = [states for layer in cache.cross_attention_cache.layers for states in _states(layer)]
            # Convolutions at the edges: a longer clip gives at most one position a probe's length more.
            self._heard_bytes = sum(states.nbytes + states[:, :, :1].nbytes for states in heard)
            self._heard_length = inputs[self._audio].shape[-1]

    def __call__(self, tokens: int, newest: int, inputs: Mapping[str, Tensor]) -> int:
        """Bytes of a cache with `tokens`, of which up to `newest` came in one forward, and the audio of `inputs`."""
        total = 0
        for window, slot in self._layers.items():
            slots = tokens if window is None else 2 * min(tokens, window + MAX_ROLLBACK + newest)
            total += slot << (max(slots, MIN_CAPACITY) - 1).bit_length()
        if self._heard_bytes and self._audio in inputs:
            total += self._heard_bytes * -(-inputs[self._audio].shape[-1] // self._heard_length)
        return total


def cache_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a cache take now."""
    layers = [*self_attention(cache).layers]
    if isinstance(cache, EncoderDecoderCache):
        layers += cache.cross_attention_cache.layers
    return sum(states.nbytes for layer in layers for states in _states(layer))


def _states(layer: Any) -> list[Tensor]:
    """Keys and values, as allocated; none of a layer that shares another's."""
    held = getattr(layer, "_storage", None) or (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [states for states in held if isinstance(states, Tensor)]


def _probe(model: AudioLM) -> dict[str, Tensor]:
    """The shortest prompt: one token, of encoder-decoders a second of sound."""
    family = model.family
    if family is not None and family.is_encoder_decoder:
        rate = model.sampling_rate
        return model.prepare((np.sin(np.arange(rate, dtype=np.float32) + 1), rate))
    audio = family.audio_token_id(model.model.config) if family is not None else -1
    return model.to_device({"input_ids": torch.tensor([[int(audio == 0)]])})
