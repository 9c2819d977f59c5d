"""Taking rejected draft tokens back out of a transformers cache, in place and without recomputing what stays.

A layer that cannot forget its newest tokens (recurrent state, quantised storage) is refused by name before the first
rollback is needed: transformers lets some of them crop without an error, and every later token would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ugsd_fast import ops
from ugsd_fast.cache.growing import GrowingCache, self_attention
from ugsd_fast.errors import ModelError

# By base class, as some say that they can be cropped although their state does not come back (transformers 5.23).
_REFUSED_LAYERS = {
    "BaseQuantizedLayer": "its quantised storage cannot be cut",
    "QuantizedLayer": "its quantised storage cannot be cut",
    "LinearAttentionCacheLayerMixin": "its recurrent state cannot be taken back",
    "LinearAttentionLayer": "its recurrent state cannot be taken back",
    "StaticSlidingWindowLayer": "its window overwrites the tokens that would come back into view",
    "StaticIndexedLayer": "its indexer's keys cannot be cut",
}


def new_cache(config: Any) -> Cache:
    """Return an empty cache for a model: a `GrowingCache` where it can hold every layer, else transformers' own.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    """
    try:
        return GrowingCache(config)
    except ModelError:  # asked first with `supports`, it would look at every layer twice
        return DynamicCache(config=config)


def enable_rollback(cache: Cache) -> None:
    """Check that a cache can be rolled back, and have sliding-window layers keep what a rollback needs.

    Call it once, after the first forward pass: only then does a cache know what its layers are.

    Parameters
    ----------
    cache : transformers.Cache
        A cache that holds the prompt. Of an ``EncoderDecoderCache`` the self-attention part is meant.

    Raises
    ------
    ModelError
        If a layer cannot forget its newest tokens; the message names the layer and why.

    Notes
    -----
    transformers' dynamic sliding-window layers then keep every token until the next `rollback`, and drop what is
    behind the window there: call it after each verified block, with 0 too.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4), 0)
    >>> enable_rollback(cache)
    """
    own = self_attention(cache)
    if isinstance(own, GrowingCache):
        return
    _check_layers(own)
    if any(own.is_sliding):
        own.activate_past_recording()
        own.crop(0)


@torch.inference_mode()
def rollback(cache: Cache, rejected: int | Tensor, *, mask: Tensor | None = None) -> Any:
    """Remove the newest tokens from every layer of a cache, in place.

    Parameters
    ----------
    cache : transformers.Cache
        Keys and values [B, H, T, D] a layer. Of an ``EncoderDecoderCache`` the self-attention part is rolled back.
    rejected : int or LongTensor[B]
        Tokens to remove. A tensor on a device is read, which waits for it.
    mask : Tensor[B, T], optional
        Needed where rows differ and the cache is not a `GrowingCache`: rows of transformers' caches share one length,
        so what not all rows reject stays as holes. They are set to 0 here, in place; cut the mask to the cache's new
        length, hand it to `step_inputs`, and close the holes with `compact` when there are many.

    Returns
    -------
    transformers.Cache
        The same cache.

    Raises
    ------
    ValueError
        If `rejected` is negative or greater than the number of cached tokens, if rows differ and no mask is given, or
        if a sliding window has dropped what would come back into view.
    ModelError
        If a layer cannot forget its newest tokens, or not a different number in each row.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 4), 0)
    >>> rollback(cache, 3).get_seq_length()
    4
    >>> mask = torch.ones(2, 4)
    >>> length = rollback(cache, torch.tensor([1, 3]), mask=mask).get_seq_length()
    >>> mask[:, :length].tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    """
    own = self_attention(cache)
    if isinstance(own, GrowingCache):
        own.rollback(rejected)
        return cache
    _check_layers(own)
    length = int(own.get_seq_length())
    counts = rejected.tolist() if isinstance(rejected, Tensor) else [rejected]
    for count in counts:
        if not 0 <= count <= length:
            raise ValueError(f"rollback: rejected is {count}, expected 0 to {length} (the tokens in the cache)")
    fewest = min(counts)
    if max(counts) > fewest:
        _check_holes(own, counts, length, mask)
    layers: list[Any] = own.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(fewest)
        elif fewest or getattr(layer, "is_sliding", False):
            _check_window(index, layer, fewest)
            layer.crop(-fewest)
    if max(counts) > fewest:
        assert mask is not None
        kept = length - torch.tensor(counts, device=mask.device)[:, None]
        mask[:, :length].masked_fill_(torch.arange(length, device=mask.device) >= kept, 0)
    return cache


def compact(cache: Cache, mask: Tensor) -> Tensor:
    """Close the holes that ragged rollbacks have left in a transformers cache: every row moves right, padding is left.

    Parameters
    ----------
    cache : transformers.DynamicCache
        Of full-attention layers, keys and values [B, H, T, D].
    mask : Tensor[B, T]
        1 where a slot holds a token.

    Returns
    -------
    Tensor[B, T']
        The new mask, T' being the tokens of the longest row and the cache's new length.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4), 0)
    >>> compact(cache, torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]])).tolist()
    [[0, 1, 1], [1, 1, 1]]
    """
    held: list[Any] = self_attention(cache).layers
    layers = [layer for layer in held if layer.keys is not None]
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise ModelError(f"compact: layer {index} is a {type(layer).__name__}, expected a DynamicLayer")
    kept = ops.kv_compact([kv for layer in layers for kv in (layer.keys, layer.values)], mask.bool(), align="right")
    slots = mask.shape[1]
    longest = int(kept.max())
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, slots - longest :], layer.values[:, :, slots - longest :]
    return (torch.arange(longest, device=mask.device) >= longest - kept[:, None]).to(mask.dtype)


def _check_layers(cache: Cache) -> None:
    for index, layer in enumerate(cache.layers):
        bases = [base.__name__ for base in type(layer).__mro__]
        reason = next((_REFUSED_LAYERS[name] for name in bases if name in _REFUSED_LAYERS), None)
        if reason is None and not isinstance(layer, StaticLayer) and not getattr(layer, "is_croppable", False):
            reason = "it has no crop"
        if reason is not None:
            raise ModelError(
                f"rollback: layer {index} of {type(cache).__name__} is a {bases[0]}, expected a layer that can be "
                f"cropped ({reason}, so rejected draft tokens would stay in it)"
            )


def _check_holes(cache: Cache, counts: list[int], length: int, mask: Tensor | None) -> None:
    """Refuse rows that reject different numbers where holes would not be exact."""
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False) or "Indexed" in type(layer).__name__:
            raise ModelError(
                f"rollback: layer {index} is a {type(layer).__name__}, expected one number for all rows or a "
                "GrowingCache (a window counts slots: holes would push tokens out of it)"
            )
    if mask is None:
        raise ValueError(
            f"rollback: rejected is {counts}, expected one number for all rows, or a mask to mark the holes in "
            f"(the rows of a {type(cache).__name__} share one length)"
        )
    if mask.dim() != 2 or mask.shape[0] != len(counts) or mask.shape[1] < length:
        raise ValueError(f"rollback: mask has shape {tuple(mask.shape)}, expected [{len(counts)}, {length}]")


def _check_window(index: int, layer: Any, count: int) -> None:
    """Refuse to take back more than a sliding-window layer has recorded."""
    if count and layer.is_initialized and getattr(layer, "is_sliding", False):
        needed = min(layer.get_seq_length() - count, layer.sliding_window - 1)
        held = layer.keys.shape[-2] - count
        if held < needed:
            raise ValueError(
                f"rollback: rejected is {count}, expected at most {layer.keys.shape[-2] - needed} "
                f"(tokens that layer {index}, a {type(layer).__name__}, has recorded since the last rollback)"
            )
