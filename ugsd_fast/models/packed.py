"""One forward pass over new tokens of many requests, each with a cache of its own.

The new tokens of all requests lie behind each other in one row: every layer but attention sees one long sequence, and
nothing is padded. Attention takes the row apart again: each request's queries meet the keys of its own cache, where
they are. Requests of any length join and leave from one forward to the next, and none of their keys ever moves.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ugsd_fast.cache.attention import PACKED_PREFIX, additive, attention_of
from ugsd_fast.cache.growing import self_attention
from ugsd_fast.device import on_device
from ugsd_fast.models.sequence import PACKABLE_ATTENTION, CachedSequence, last_logits
from ugsd_fast.ops.backend import extension

# New tokens of a request up to which the extension attends: for more, matrix products are faster.
_FEW = 64

# Arguments of attention that change nothing where every query sees its own request up to itself.
_OF_NO_MATTER = frozenset({"scaling", "is_causal", "use_cache"})

_lock = threading.Lock()
_in_use: WeakKeyDictionary[Any, tuple[list[Any], str, int]] = WeakKeyDictionary()  # configs, name, packed forwards
_known_configs: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def forward_packed(sequences: Sequence[CachedSequence], tokens: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """Append tokens to several sequences of one model, in as few forward passes as can be.

    Parameters
    ----------
    sequences : sequence of CachedSequence
        Of batch 1 each, and all of one model. Those that begin share a forward of their own, in which the audio tower
        hears all their clips, where these have one shape. What cannot be taken apart gets a forward each: padded
        prompts, attention implementations other than SDPA, eager and FlashAttention, and transformers' own caches.
    tokens : sequence of LongTensor[1, q]
        What to append to each.
    keep : sequence of int
        Positions of each whose logits are returned, counted from its end.

    Returns
    -------
    Tensor[sum(keep), V]
        Logits, in the order of the sequences.

    Examples
    --------
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": None}
    >>> model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes)).eval()
    >>> two = [CachedSequence(model, {"input_ids": torch.ones(1, n, dtype=torch.long)}) for n in (3, 5)]
    >>> new = [torch.tensor([[4, 2]]), torch.tensor([[7]])]
    >>> forward_packed(two, new, [1, 1]).shape  # the prompts come first
    torch.Size([2, 9])
    >>> forward_packed(two, new, [2, 1]).shape, [sequence.length for sequence in two]
    (torch.Size([3, 9]), [7, 7])
    """
    if len(sequences) == 1:
        return sequences[0].forward(tokens[0], keep=keep[0])[0]
    groups: dict[Hashable, list[int]] = {}
    for index, (sequence, new) in enumerate(zip(sequences, tokens, strict=True)):
        key = sequence.pack_key(new)
        groups.setdefault(index if key is None else key, []).append(index)
    rows: list[Tensor] = [torch.empty(0)] * len(sequences)
    for members in groups.values():
        if len(members) == 1:
            logits = sequences[members[0]].forward(tokens[members[0]], keep=keep[members[0]])[0]
        else:
            logits = _forward([sequences[i] for i in members], [tokens[i] for i in members], [keep[i] for i in members])
            if len(members) == len(sequences):
                return logits
        for index, part in zip(members, logits.split([keep[i] for i in members]), strict=True):
            rows[index] = part
    with torch.inference_mode():
        return torch.cat(rows)


@torch.inference_mode()
def _forward(sequences: Sequence[CachedSequence], tokens: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """One forward of sequences that have one `CachedSequence.pack_key`."""
    first = sequences[0]
    model = first.model
    prompts = [sequence.prompt_inputs() for sequence in sequences]
    begin = [prompt.pop("input_ids", new[:, :0]) for prompt, new in zip(prompts, tokens, strict=True)]
    parts = [torch.cat(part, 1) for part in zip(begin, tokens, strict=True)]
    counts = [part.shape[1] for part in parts]
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.check_room(count)
    ids = torch.cat(parts, 1)
    audio = {
        name: torch.cat([prompt[name] for prompt in prompts]) if isinstance(value, Tensor) else value
        for name, value in prompts[0].items()
    }
    positions, masks = _positions(sequences, parts)
    wanted: Tensor | None = None
    if sum(keep) < ids.shape[1]:
        ends = list(accumulate(counts))
        wanted = on_device(
            [at for end, kept in zip(ends, keep, strict=True) for at in range(end - kept, end)], ids.device
        )
    caches: list[Any] = [sequence.cache for sequence in sequences]
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # of 4 dimensions: models leave it alone
    arguments = {**first.step_kwargs(ids, positions, no_mask), **first.hear(sequences, audio)}
    text = first.text_part()
    with _intercepted(model) as attention:
        cache: Cache = PackedCache(
            [self_attention(one) for one in caches], counts, PACKABLE_ATTENTION[attention], masks
        )
        if isinstance(caches[0], EncoderDecoderCache):
            cache = _PackedEncoderDecoderCache(cache, sequences, counts)
        if text is not None:
            logits = text(arguments, cache, wanted)[0]
        else:
            with last_logits(model, wanted) as extra:
                logits = model(**arguments, past_key_values=cache, use_cache=True, **extra).logits[0]
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.appended(count)
    return logits


def _positions(sequences: Sequence[CachedSequence], parts: Sequence[Tensor]) -> tuple[Tensor, dict[int, Tensor | None]]:
    """Positions [1, N] of a packed row, and the masks of those sequences whose end only the device knows."""
    device = parts[0].device
    if all(sequence.end is None for sequence in sequences):
        spans = [
            range(sequence.length, sequence.length + part.shape[1])
            for sequence, part in zip(sequences, parts, strict=True)
        ]
        return on_device([[position for span in spans for position in span]], device), {}
    positions = [sequence.positions(part) for sequence, part in zip(sequences, parts, strict=True)]
    masks = {
        row: sequence.mask_of(own)
        for row, (sequence, own) in enumerate(zip(sequences, positions, strict=True))
        if sequence.end is not None
    }
    return torch.cat(positions, 1), masks


class Ragged:
    """Keys or values of several requests, which go through a model's attention module as if they were one tensor."""

    def __init__(
        self, parts: Sequence[Tensor], counts: Sequence[int], mask_of: Callable[[int, int, int], Tensor | None] | None
    ):
        self.parts = parts  # [1, H, T, D] each
        self.counts = counts  # queries of each
        self.mask_of = mask_of
        self.requests: list[int] | None = None  # as the extension takes them, where it can attend

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Ragged:
        """Apply what a module does to keys on their way (padding a head) to each part."""
        self = args[0]
        return cls([func(part, *args[1:], **(kwargs or {})) for part in self.parts], self.counts, self.mask_of)


class _Views(Sequence[Tensor]):
    """The keys or values of several requests' layers, as views made when they are asked for."""

    def __init__(self, layers: Sequence[Any], name: str):
        self._layers, self._name = layers, name

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return getattr(self._layers[index], self._name)


class PackedCache(Cache):
    """The caches of several requests as one: new keys go to the request that they belong to.

    Parameters
    ----------
    caches : sequence of GrowingCache
        Of batch 1 each.
    counts : sequence of int
        New tokens of each in the packed row.
    mask : {"bool", "float", None}
        What the attention implementation takes; None where it is causal by itself.
    masks : mapping of int to Tensor[1, 1, q, T]
        Of requests whose end only the device knows.
    """

    def __init__(
        self, caches: Sequence[Any], counts: Sequence[int], mask: str | None, masks: Mapping[int, Tensor | None]
    ):
        super().__init__(layers=caches[0].layers)
        self._caches = caches
        self._counts = list(counts)
        self._mask = mask
        self._open = masks
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append the states [1, H, N, D] of a packed row and return all keys and values, each request's apart."""
        layer: Any = self.layers[layer_idx]
        mask_of = partial(self._mask_of, layer.sliding_window if layer.is_sliding else None, key_states)
        if self._attends_at_once(layer, key_states, value_states):
            layers = [cache.layers[layer_idx] for cache in self._caches]
            if not layer.is_initialized:
                for one, count in zip(layers, self._counts, strict=True):
                    one.lazy_initialization(key_states[:, :, :count], value_states[:, :, :count])
            extended = [layer.extend(count) for layer, count in zip(layers, self._counts, strict=True)]
            requests = list(chain.from_iterable(extended))
            extension.append_slots(key_states, value_states, requests)
            keys, values = (Ragged(_Views(layers, name), self._counts, None) for name in ("keys", "values"))
            keys.mask_of, keys.requests, values.requests = mask_of, requests, requests
            return keys, values
        parts = key_states.split(self._counts, 2), value_states.split(self._counts, 2)
        held = [cache.update(key, value, layer_idx) for cache, key, value in zip(self._caches, *parts, strict=True)]
        return (
            Ragged([own for own, _ in held], self._counts, mask_of),
            Ragged([own for _, own in held], self._counts, None),
        )

    def _attends_at_once(self, layer: Any, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether the extension can attend for all requests in one call."""
        return (
            extension is not None
            and self._mask == "bool"
            and not self._open
            and max(self._counts) <= _FEW
            and not layer.is_sliding
            and key_states.dtype is value_states.dtype is torch.float32
            and key_states.device.type == "cpu"
            and key_states.stride(3) == value_states.stride(3) == 1
        )

    def _mask_of(self, window: int | None, like: Tensor, row: int, count: int, slots: int) -> Tensor | None:
        """The mask [1, 1, q, T] of a request's `count` queries over `slots` keys, the newest being its own."""
        if row in self._open:
            return self._open[row]
        shape = (count, slots, window)
        if shape not in self._masks:
            mask = None
            if self._mask is not None and (count > 1 or (window is not None and slots > window)):
                query = torch.arange(slots - count, slots, device=like.device)[:, None]
                key = torch.arange(slots, device=like.device)
                mask = key <= query if window is None else (key <= query) & (key > query - window)
                if self._mask == "float":
                    mask = additive(mask, like.dtype)
                mask = mask[None, None]
            self._masks[shape] = mask
        return self._masks[shape]


class _PackedEncoderDecoderCache(EncoderDecoderCache):
    """Beside it, what each request has heard."""

    def __init__(self, own: Cache, sequences: Sequence[Any], counts: Sequence[int]):
        self.self_attention_cache: Any = own
        self.cross_attention_cache: Any = _Heard(sequences, counts)
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache.layers)), True)


class _HeardLayer:
    def __init__(self, keys: Ragged, values: Ragged):
        self.keys, self.values = keys, values


class _Heard:
    """Keys and values of the cross-attention; without layers, until the first forward has made them."""

    def __init__(self, sequences: Sequence[Any], counts: Sequence[int]):
        self._sequences = sequences
        self._counts = counts
        heard: list[list[Any]] = [sequence.cache.cross_attention_cache.layers for sequence in sequences]
        self.layers = [
            _HeardLayer(
                Ragged([layer.keys for layer in layers], counts, None),
                Ragged([layer.values for layer in layers], counts, None),
            )
            for layers in zip(*heard, strict=True)
        ]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Ragged, Ragged]:
        """Hand each request its own part of the states [1, H, N, D]."""
        lengths = [sequence.heard_length for sequence in self._sequences]
        parts = []
        for sequence, key, value in zip(self._sequences, keys.split(lengths, 2), values.split(lengths, 2), strict=True):
            parts.append(sequence.cache.cross_attention_cache.update(key, value, layer_idx))
            sequence.cache.is_updated[layer_idx] = True
        own_keys, own_values = zip(*parts, strict=True)
        return Ragged(own_keys, self._counts, None), Ragged(own_values, self._counts, None)


@contextmanager
def _intercepted(model: Any) -> Iterator[str]:
    """Have a model's attention ask `_attend` meanwhile; yields the implementation that does the work.

    For tensors `_attend` is that implementation: forwards of other threads in the meantime are as ever.
    """
    with _lock:
        configs, name, users = _in_use.get(model) or (_configs(model), attention_of(_configs(model)[0]), 0)
        _in_use[model] = configs, name, users + 1
        if PACKED_PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
            inner = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS.register(PACKED_PREFIX + name, partial(_attend, inner))
            ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        if not users:
            _rename(configs, PACKED_PREFIX + name)
    try:
        yield name
    finally:
        with _lock:
            _in_use[model] = configs, name, _in_use[model][2] - 1
            if not _in_use[model][2]:
                del _in_use[model]
                _rename(configs, name)


def _configs(model: Any) -> list[Any]:
    """The configs that the attention modules of a model's text part ask for their implementation."""
    if model not in _known_configs:
        modules = [module for module in model.get_decoder().modules() if getattr(module, "layer_idx", None) is not None]
        _known_configs[model] = list({id(one.config): one.config for one in modules if hasattr(one, "config")}.values())
    return _known_configs[model]


def _rename(configs: Sequence[Any], name: str) -> None:
    for config in configs:
        vars(config)["_attn_implementation_internal"] = name  # a config's own __setattr__ takes longer than attention


def _attend(inner: Any, module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Attend as `inner` does (None: as the module's own eager function), each request of a packed row for itself."""
    if inner is None:
        inner = sys.modules[type(module).__module__].eager_attention_forward
    if not isinstance(key, Ragged):
        return inner(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("position_ids", None)
    if key.requests is not None and value.requests is not None and query.stride(3) == 1 and _is_plain(kwargs):
        out = query.new_empty(1, query.shape[2], query.shape[1], value.parts[0].shape[3])
        scale = kwargs.get("scaling") or query.shape[3] ** -0.5
        heads = key.parts[0].shape[1]
        extension.packed_attention(query, out, key.requests, heads, scale, torch.get_num_threads())
        return out, None
    if key.mask_of is None:
        kwargs["is_causal"] = False  # cross-attention
    elif kwargs.get("is_causal") is not None:
        kwargs["is_causal"] = None
    outputs = [
        inner(module, own, keys, values, key.mask_of and key.mask_of(row, count, keys.shape[2]), **kwargs)[0]
        for row, (own, keys, values, count) in enumerate(
            zip(query.split(key.counts, 2), key.parts, value.parts, key.counts, strict=True)
        )
    ]
    return torch.cat(outputs, 1), None


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether nothing else is asked of attention: no dropout, no bias, no cap."""
    return all(
        name in _OF_NO_MATTER or value is None or (isinstance(value, (bool, float)) and not value)
        for name, value in kwargs.items()
    )
