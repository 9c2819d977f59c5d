"""A transformers cache that is preallocated, grows by doubling, and gives every row of a batch a length of its own.

transformers' ``DynamicCache`` concatenates: each step reads and writes every key and value that it holds. Here a step
writes its own slots and returns a view, rolling back changes a length, and rows that reject different numbers of tokens
go on at different slots. `ugsd_fast.cache.step_inputs` makes the mask and the positions that such rows need.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from ugsd_fast.device import on_device
from ugsd_fast.errors import ModelError

MIN_CAPACITY = 64
MAX_ROLLBACK = 256
_CHUNK = 64  # slots whose views are made at once


class OpenEnd:
    """Where the tokens of a cache of one row end while only the device knows how many it holds.

    Parameters
    ----------
    length : LongTensor[1]
        Tokens in the cache.

    Attributes
    ----------
    slots : LongTensor[q]
        Where the forward in progress writes; set by `begin`.
    """

    def __init__(self, length: Tensor):
        self.length = length
        self.slots = length

    def begin(self, tokens: int) -> Tensor:
        """Slots [q] of the next `tokens`, which are their positions too."""
        self.slots = self.length + torch.arange(tokens, device=self.length.device)
        return self.slots


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer.

    Parameters
    ----------
    capacity : int
        Slots to allocate at least; powers of two follow.
    sliding_window : int, optional
        Tokens that a query sees, its own included. Older ones are dropped, except as many as a rollback may need.
    max_rollback : int
        Tokens that can be rolled back once the window is full.

    Notes
    -----
    Token t of a row is in slot t - `base` of that row, whatever the other rows hold. Slots behind a row's length hold
    old or zero values and must be masked; nothing else ever reads them.
    """

    is_croppable = True

    def __init__(
        self, *, capacity: int = MIN_CAPACITY, sliding_window: int | None = None, max_rollback: int = MAX_ROLLBACK
    ):
        self.is_initialized = False
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self._min_capacity = capacity
        self._max_rollback = max_rollback
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowingLayer:
        """A layer of the same tokens with memory of its own: two copies of storage, however many views there are."""
        other = copy.copy(self)
        memo[id(self)] = other
        self._check_closed("copied")
        if self._storage is not None:
            other._set_storage(*(storage.clone() for storage in self._storage))
        if self._lengths is not None:
            other._lengths = list(self._lengths)
        return other

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.is_initialized = False
        self._storage: tuple[Tensor, Tensor] | None = None  # [B, H, capacity, D] each; the two D may differ
        self._capacity = 0
        self._base = 0
        self._length = 0  # of the longest row
        self._lengths: list[int] | None = None  # where rows differ
        self._step_shape = torch.Size()
        self._is_inference = False
        self._end: OpenEnd | None = None  # then `_length` is the most that there can be
        self._first_slot = 0
        self._slots: list[tuple[Tensor, Tensor]] = []  # of the next steps, from token _first_slot on

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys that are held, [B, H, T, D]: a view."""
        return None if self._storage is None else self._view(0, self._base, self._length)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values that are held, [B, H, T, D]: a view."""
        return None if self._storage is None else self._view(1, self._base, self._length)

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each row, or None where all rows have `get_seq_length()`."""
        return self._lengths

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return self._capacity

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._length

    def get_max_length(self) -> int:
        """Window, or -1."""
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that the next `update` returns, and the token in the first of them."""
        first = self._first_visible()
        return self._length + query_length - first, first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states, value_states, max(self._min_capacity, key_states.shape[2]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of q tokens to every row and return what these attend to.

        Parameters
        ----------
        key_states, value_states : Tensor[B, H, q, D]

        Returns
        -------
        tuple of Tensor[B, H, T, D]
            Views of the cache, T as `get_mask_sizes(q)` told before.
        """
        length = self._length
        if self._end is not None:
            return self._append_at(self._end.slots, key_states, value_states)
        if key_states.shape == self._step_shape:
            index = length - self._first_slot
            if 0 <= index < len(self._slots) and (not self._is_inference or torch.is_inference_mode_enabled()):
                key_slot, value_slot = self._slots[index]
                key_slot.copy_(key_states)
                value_slot.copy_(value_states)
                self._length = end = length + 1
                if self.sliding_window is None:
                    batch, heads, _, key_width = self._step_shape
                    return (
                        self._keys.as_strided((batch, heads, end, key_width), self._key_strides),
                        self._values.as_strided((batch, heads, end, self._value_width), self._value_strides),
                    )
                first = max(end - self.sliding_window, 0)
                return self._view(0, first, end), self._view(1, first, end)
        return self._append(key_states, value_states)

    def extend(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Count `tokens` more, whose keys and values the caller writes at once, into an initialised layer of one row
        without a window, in inference mode as all forwards here are.

        Returns
        -------
        tuple of int
            Addresses of keys and values [H, capacity, D], the capacity, all tokens with the new ones, the new ones.
        """
        self._reserve(tokens)
        self._length += tokens
        return *self._addresses, self._capacity, self._length, tokens

    def rollback(self, rejected: int | Sequence[int]) -> None:
        """Forget the newest tokens: as many of every row, or a number for each row.

        Raises
        ------
        ValueError
            If the window has passed tokens that would come back into view.
        """
        if not self.is_initialized:
            return
        self._check_closed("rolled back")
        lengths: list[int] | None = None
        if isinstance(rejected, int) and self._lengths is None:
            longest = shortest = self._length - rejected
        else:
            batch = self._step_shape[0]
            counts = [rejected] * batch if isinstance(rejected, int) else rejected
            lengths = [n - k for n, k in zip(self._lengths or [self._length] * batch, counts, strict=True)]
            longest, shortest = max(lengths), min(lengths)
        if self.sliding_window is not None and self._base > max(shortest - self.sliding_window + 1, 0):
            raise ValueError(
                f"rollback: {rejected} tokens are behind a window of {self.sliding_window}, expected at most "
                f"max_rollback={self._max_rollback} (older keys are dropped)"
            )
        self._set_lengths(lengths, longest)

    def leave_open(self, end: OpenEnd) -> None:
        """Have the device say from now on where tokens end; `get_seq_length` is the most there can be until `close`.

        For an initialised layer of one row without a window.
        """
        self._end = end
        self._slots = []

    def _check_closed(self, what: str) -> None:
        if self._end is not None:
            raise ModelError(
                f"GrowingLayer: a layer whose length only the device knows is {what}, expected close(length) before"
            )

    def close(self, length: int) -> None:
        """Take back what `leave_open` began: there are `length` tokens."""
        self._end = None
        self._set_lengths(None, length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens of every row, as transformers' layers do."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove is {tokens_to_remove}, expected a negative number or 0")
        self.rollback(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, an integer or bool tensor; the others' memory is freed."""
        if self._storage is None:
            return
        rows = torch.arange(self._step_shape[0])[indices.cpu()].tolist()
        self._replace_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self._storage is not None:
            self._replace_rows([row for row in range(self._step_shape[0]) for _ in range(repeats)])

    def offload(self) -> None:
        """Not offered: the cache writes in place, on the device of its states."""
        raise NotImplementedError("GrowingLayer: offloading is not offered, expected a DynamicCache(offloading=True)")

    def _first_visible(self) -> int:
        """First token that the next query of the shortest row sees."""
        if self.sliding_window is None:
            return 0
        shortest = self._length if self._lengths is None else min(self._lengths)
        return max(shortest - self.sliding_window + 1, 0)

    def _view(self, which: int, first: int, end: int) -> Tensor:
        """Tokens first to end of the keys (0) or values (1)."""
        assert self._storage is not None
        storage, strides = self._storage[which], self._strides[which]
        batch, heads, _, width = storage.shape
        return storage.as_strided((batch, heads, end - first, width), strides, (first - self._base) * width)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if key_states.requires_grad and torch.is_grad_enabled():
            raise ValueError("GrowingCache: the states require grad, expected a forward under no_grad")
        if not self.is_initialized:
            window = self.sliding_window
            if window is not None and key_states.shape[2] > window + self._max_rollback:
                return self._begin_behind(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[:2] != self._step_shape[:2]:
            raise ValueError(
                f"GrowingCache: states have shape {tuple(key_states.shape)}, expected "
                f"[{self._step_shape[0]}, {self._step_shape[1]}, q, {self._step_shape[3]}] (the rows in the cache)"
            )
        if self._is_inference and not torch.is_inference_mode_enabled():  # such tensors cannot be written here
            self._set_storage(self._keys.clone(), self._values.clone())
        tokens = key_states.shape[2]
        first, column = self._first_visible(), self._reserve(tokens)
        assert self._storage is not None
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            if self._lengths is None:
                storage.narrow(2, column, tokens).copy_(states)
            else:
                slots = tuple(n - self._base for n in self._lengths)
                rows, columns = _slot_index(slots, tokens, states.device)
                storage[rows, :, columns] = states.transpose(1, 2)  # [B, q, H, D]
        if self._lengths is not None:
            self._lengths = [n + tokens for n in self._lengths]
        elif tokens == 1:
            self._make_slots(column)
        self._length += tokens
        return self._view(0, first, self._length), self._view(1, first, self._length)

    def _append_at(self, slots: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write states to slots that the device knows; what is behind the newest is masked by the caller."""
        tokens = key_states.shape[2]
        self._reserve(tokens)
        assert self._storage is not None
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage.index_copy_(2, slots, states)
        self._length += tokens
        return self._view(0, 0, self._length), self._view(1, 0, self._length)

    def _begin_behind(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Take a prompt longer than the window, of which only the end is kept; all of it is attended to once."""
        tokens = key_states.shape[2]
        kept = max(self._kept_behind_window(), 1)
        self._allocate(key_states, value_states, max(self._min_capacity, kept))
        assert self._storage is not None
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage.narrow(2, 0, kept).copy_(states.narrow(2, tokens - kept, kept))
        self.dtype, self.device = key_states.dtype, key_states.device
        self._base, self._length = tokens - kept, tokens
        return key_states, value_states

    def _kept_behind_window(self) -> int:
        assert self.sliding_window is not None
        return self.sliding_window - 1 + self._max_rollback

    def _reserve(self, tokens: int) -> int:
        """Make room for `tokens` more and return the slot of the longest row's first."""
        assert self._storage is not None
        used = self._length - self._base
        if used + tokens <= self._capacity:
            return used
        drop, room = 0, used + tokens
        if self.sliding_window is not None:
            shortest = self._length if self._lengths is None else min(self._lengths)
            drop = max(shortest - self._kept_behind_window() - self._base, 0)
            room = 2 * (used - drop + tokens)  # moved once in at least as many steps as slots are moved
        kept = used - drop
        held = [storage.narrow(2, drop, kept) for storage in self._storage]
        if room > self._capacity:
            self._allocate(*self._storage, room)
        for storage, states in zip(self._storage, held, strict=True):
            storage.narrow(2, 0, kept).copy_(states)  # in the same storage only where the two are apart
        self._base += drop
        self._slots = []
        return kept

    def _allocate(self, keys_like: Tensor, values_like: Tensor, slots: int) -> None:
        self._capacity = 1 << (slots - 1).bit_length()
        keys, values = (  # zeros, as a masked NaN would still be one
            like.new_zeros((*like.shape[:2], self._capacity, like.shape[3])) for like in (keys_like, values_like)
        )
        self._set_storage(keys, values)
        self.is_initialized = True

    def _set_storage(self, keys: Tensor, values: Tensor) -> None:
        self._storage = self._keys, self._values = keys, values
        self._key_strides, self._value_strides = self._strides = keys.stride(), values.stride()
        self._step_shape = torch.Size((*keys.shape[:2], 1, keys.shape[3]))
        self._value_width = values.shape[3]
        self._addresses = keys.data_ptr(), values.data_ptr()
        self._is_inference = keys.is_inference()
        self._slots = []

    def _make_slots(self, column: int) -> None:
        """Make the views that the next steps write into; one by one they would cost more than the writing."""
        assert self._storage is not None
        count = min(_CHUNK, self._capacity - column)
        self._first_slot = column + self._base
        keys, values = (storage.narrow(2, column, count).split(1, 2) for storage in self._storage)
        self._slots = list(zip(keys, values, strict=True))

    def _set_lengths(self, lengths: list[int] | None, longest: int) -> None:
        self._length = longest
        ragged = lengths is not None and min(lengths) < longest
        self._lengths = lengths if ragged else None
        if ragged:
            self._slots = []

    def _replace_rows(self, rows: list[int]) -> None:
        assert self._storage is not None
        index = on_device(rows, self._storage[0].device)
        keys, values = (storage.index_select(0, index) for storage in self._storage)
        self._set_storage(keys, values)
        if self._lengths is not None and rows:
            lengths = [self._lengths[row] for row in rows]
            self._set_lengths(lengths, max(lengths))


class GrowingCache(DynamicCache):
    """A preallocated key/value cache: appends in place, rolls back in no time, every row with a length of its own.

    A drop-in replacement of ``transformers.DynamicCache`` for inference: models, ``generate`` and
    ``EncoderDecoderCache`` take it. While all rows are of one length, models need nothing else; after a ragged
    rollback, give them what `ugsd_fast.cache.step_inputs` returns.

    Parameters
    ----------
    config : transformers.PreTrainedConfig, optional
        Of the model, or of its text part: tells which layers have a sliding window and which share another's keys.
        Without it all layers see everything.
    capacity : int
        Slots to allocate first, rounded up to a power of two. Memory doubles when they are full; give the final length
        where it is known and nothing is copied again.
    max_rollback : int
        Tokens that a layer with a sliding window can roll back when it is full. Its memory is bounded: at most four
        times ``sliding_window + max_rollback`` slots (plus those of one long forward), however long the text.

    Raises
    ------
    ModelError
        If a layer is neither full nor windowed attention: recurrent states cannot be rolled back.

    Examples
    --------
    >>> cache = GrowingCache()
    >>> states = torch.zeros(2, 2, 7, 4)
    >>> keys, values = cache.update(states, states, layer_idx=0)
    >>> cache.rollback([3, 1]).lengths
    [4, 6]
    >>> cache.get_seq_length()
    6
    """

    def __init__(self, config: Any = None, *, capacity: int = MIN_CAPACITY, max_rollback: int = MAX_ROLLBACK):
        if capacity < 1 or max_rollback < 0:
            raise ValueError(
                f"GrowingCache: capacity is {capacity} and max_rollback {max_rollback}, expected at least 1 and 0"
            )
        super().__init__()
        layer: Any = partial(GrowingLayer, capacity=capacity, max_rollback=max_rollback)
        if config is None:
            self.layer_class_to_replicate = layer
            return
        self.layer_class_to_replicate = None
        for index, (theirs, held) in enumerate(_layers(config)):
            if not held:
                chunks = " of attention in chunks" if type(theirs) is DynamicSlidingWindowLayer else ""
                kind = type(theirs).__name__ + chunks
                raise ModelError(f"GrowingCache: layer {index} is a {kind}, expected full or sliding-window attention")
            if isinstance(theirs, DynamicLayer):
                theirs = layer(sliding_window=getattr(theirs, "sliding_window", None))
            self.layers.append(theirs)

    @staticmethod
    def supports(config: Any) -> bool:
        """Whether every layer of a model is one that this cache can hold."""
        return all(held for _, held in _layers(config))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; empty before the first forward."""
        layer = self._first_layer()
        if layer is None:
            return []
        return layer.lengths or [layer.get_seq_length()] * layer._step_shape[0]

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length."""
        layer = self._first_layer()
        return layer is not None and layer.lengths is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states [B, H, q, D] to a layer and return all that it holds, [B, H, T, D], as views."""
        if layer_idx < len(self.layers):
            layer: Any = self.layers[layer_idx]
            return layer.update(key_states, value_states)
        return super().update(key_states, value_states, layer_idx)

    def rollback(self, rejected: int | Tensor | Sequence[int]) -> GrowingCache:
        """Forget the newest tokens of every row; nothing is moved.

        Parameters
        ----------
        rejected : int, sequence of int or LongTensor[B]
            Tokens to forget, of all rows or of each. A tensor on a device is read, which waits for it.

        Raises
        ------
        ValueError
            If a number is negative or more than its row holds, or if a window has dropped what would be needed.
        """
        lengths = self.lengths
        counts = _counts(rejected, lengths)
        if counts:
            one = counts[0] if counts.count(counts[0]) == len(counts) else None
            layers = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
            for layer in sorted(layers, key=lambda layer: not layer.is_sliding):  # these may refuse
                layer.rollback(counts if one is None else one)
        return self

    @property
    def end(self) -> OpenEnd | None:
        """Where tokens end, while only the device knows it."""
        layer = self._first_layer()
        return None if layer is None else layer._end

    @property
    def can_be_open(self) -> bool:
        """Whether `rollback_unread` can be: one row, and no window, which would have to be cut on the host."""
        held = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        return bool(held) and all(
            layer.is_initialized and not layer.is_sliding and layer._step_shape[0] == 1 for layer in held
        )

    def rollback_unread(self, rejected: Tensor) -> OpenEnd:
        """Forget the newest tokens, of which only the device knows how many; nothing is read or moved.

        Until `close` tells the number, `get_seq_length` is an upper bound. Forwards begin with `OpenEnd.begin`, end
        with a new `OpenEnd.length`, and mask the slots behind each query.

        Parameters
        ----------
        rejected : LongTensor[1]
            Not checked.

        Examples
        --------
        >>> cache = GrowingCache()
        >>> states = torch.zeros(1, 2, 7, 4)
        >>> _ = cache.update(states, states, 0)
        >>> end = cache.rollback_unread(torch.tensor([2]))
        >>> slots = end.begin(1)
        >>> _ = cache.update(states[:, :, :1] + 1, states[:, :, :1] + 1, 0)
        >>> cache.close(6).layers[0].keys[0, 0, :, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        """
        if not self.can_be_open:
            raise ModelError("GrowingCache: the cache has several rows or a window, expected one row without a window")
        end = self.end
        if end is None:
            end = OpenEnd(torch.full_like(rejected, self.get_seq_length()))
            for layer in self.layers:
                if isinstance(layer, GrowingLayer):
                    layer.leave_open(end)
        end.length = end.length - rejected
        return end

    def close(self, length: int) -> GrowingCache:
        """Say on the host how many tokens there are since `rollback_unread`.

        Parameters
        ----------
        length : int
            Of all tokens in the cache, 0 to `get_seq_length`.

        Raises
        ------
        ValueError
            If there cannot be so many.
        """
        if not 0 <= length <= self.get_seq_length():
            raise ValueError(f"close: length is {length}, expected 0 to {self.get_seq_length()} (slots written so far)")
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.close(length)
        return self

    def _first_layer(self) -> GrowingLayer | None:
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                return layer if layer.is_initialized else None
        return None


def _layers(config: Any) -> list[tuple[Any, bool]]:
    """Layers that transformers would make for a model, and whether a `GrowingLayer` can stand for each or none need."""
    text = config.get_text_config(decoder=True)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    held: set[type] = {DynamicLayer}
    if not chunked and getattr(text, "attention_chunk_size", None) is None:
        held.add(DynamicSlidingWindowLayer)
    layers: list[Any] = DynamicCache(config=text).layers
    return [(layer, type(layer) in held or type(layer).__name__ == "DummyLayer") for layer in layers]


def self_attention(cache: Cache) -> Cache:
    """Return the part of a cache that grows with the text: of an encoder-decoder's, the decoder's own."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _counts(rejected: int | Tensor | Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Rejected tokens of each row, checked."""
    if isinstance(rejected, int):
        counts = [rejected] * max(len(lengths), 1)
    else:
        counts = rejected.tolist() if isinstance(rejected, Tensor) else list(rejected)
    if not lengths and not any(counts):
        return []
    if len(counts) != max(len(lengths), 1):
        raise ValueError(f"rollback: rejected has {len(counts)} numbers, expected {len(lengths)} (one a row)")
    for row, (count, length) in enumerate(zip(counts, lengths or [0], strict=True)):
        if not 0 <= count <= length:
            where = "" if isinstance(rejected, int) else f" of row {row}"
            raise ValueError(f"rollback: rejected is {count}{where}, expected 0 to {length} (the tokens in the cache)")
    return counts


@lru_cache(maxsize=16)
def _slot_index(slots: tuple[int, ...], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [B, 1] and slots [B, q] that `tokens` tokens of each row go to; the layers of a forward share them."""
    with torch.inference_mode(False):
        rows = torch.arange(len(slots), device=device)[:, None]
        columns = on_device(slots, device)[:, None] + torch.arange(tokens, device=device)
    return rows, columns
