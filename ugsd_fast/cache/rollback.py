"""Taking rejected draft tokens back out of a transformers cache, in place and without recomputing what stays.

A layer that cannot forget its newest tokens (recurrent state, quantised storage) is refused by name before the first
rollback is needed: transformers lets some of them crop without an error, and every later token would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from ugsd_fast.errors import ModelError

# Layers that say they can be cropped although their state does not come back (transformers 5.23).
_REFUSED_LAYERS = {
    "Fp8QuantizedLayer": "its quantised storage cannot be cut",
    "QuantoQuantizedLayer": "its quantised storage cannot be cut",
    "HQQQuantizedLayer": "its quantised storage cannot be cut",
    "LinearAttentionLayer": "its recurrent state cannot be taken back",
    "LinearAttentionAndFullAttentionLayer": "its recurrent state cannot be taken back",
    "LinearAttentionAndSlidingWindowAttentionLayer": "its recurrent state cannot be taken back",
}


def enable_rollback(cache: Cache) -> None:
    """Check that a cache can be rolled back, and have sliding-window layers keep what a rollback needs.

    Call it once, after the first forward pass: only then does a cache know what its layers are.

    Parameters
    ----------
    cache : transformers.Cache
        A cache that holds the prompt.

    Raises
    ------
    ModelError
        If a layer cannot forget its newest tokens; the message names the layer and why.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4), 0)
    >>> enable_rollback(cache)
    """
    for index, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if kind in _REFUSED_LAYERS or not getattr(layer, "is_croppable", False):
            reason = _REFUSED_LAYERS.get(kind, "it has no crop")
            raise ModelError(
                f"rollback: layer {index} of {type(cache).__name__} is a {kind}, expected a layer that can be cropped "
                f"({reason}, so rejected draft tokens would stay in it)"
            )
    if any(cache.is_sliding):
        cache.activate_past_recording()
        cache.crop(0)


def rollback(cache: Cache, rejected: int | torch.Tensor) -> Any:
    """Remove the newest tokens from every layer of a cache, in place.

    Parameters
    ----------
    cache : transformers.Cache
        Keys and values [B, H, T, D] a layer.
    rejected : int or LongTensor[B]
        Tokens to remove. A tensor must hold the same number for every row: the rows of a transformers cache share one
        length.

    Returns
    -------
    transformers.Cache
        The same cache.

    Raises
    ------
    ValueError
        If `rejected` is negative, greater than the number of cached tokens, or differs between rows.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4), 0)
    >>> rollback(cache, 3).get_seq_length()
    4
    """
    if isinstance(rejected, torch.Tensor):
        counts = set(rejected.tolist())
        if len(counts) != 1:
            raise ValueError(
                f"rollback: rejected is {rejected.tolist()}, expected one number for all rows "
                f"(the rows of a {type(cache).__name__} share one length)"
            )
        count = int(counts.pop())
    else:
        count = rejected
    length = cache.get_seq_length()
    if not 0 <= count <= length:
        raise ValueError(f"rollback: rejected is {count}, expected 0 to {length} (the tokens in the cache)")
    if count or any(cache.is_sliding):
        cache.crop(-count)
    return cache
