"""Mask and positions of the next forward on a cache whose rows are padded, differ in length or have holes."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import Cache

from ugsd_fast.cache.attention import additive, attention_of
from ugsd_fast.cache.growing import GrowingCache, self_attention
from ugsd_fast.device import on_device
from ugsd_fast.errors import ModelError

_MASKED = {"sdpa": None, "eager": "float"}  # implementations that take a 4-D mask: bool, or numbers to add


class StepInputs(TypedDict):
    """Arguments of a model's forward."""

    attention_mask: Tensor | dict[str, Tensor] | None
    position_ids: Tensor


def step_inputs(model: Any, cache: Cache, tokens: Tensor, mask: Tensor | None = None) -> StepInputs:
    """Return what a forward on `tokens` needs so that every row attends to its own tokens and to nothing else.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its attention implementation, dtype and layer types decide the form of the mask.
    cache : transformers.Cache
        A `GrowingCache`, whose rows may differ in length, or any other that `rollback` supports. With an
        ``EncoderDecoderCache`` the results are the decoder's: ``decoder_attention_mask``, ``decoder_position_ids``.
    tokens : LongTensor[B, q]
        The token ids that will be fed; only the shape and the device are read.
    mask : Tensor[B, T], optional
        1 where a slot holds a token of its row, 0 where it is padding or a hole (see `rollback`). Slots behind its end
        are tokens. None stands for all ones.

    Returns
    -------
    dict
        ``attention_mask``, None where the model's own causal mask is right, [B, T + q] where one of columns says it
        all, else [B, 1, q, T + q] (for each kind of layer where there are two); and ``position_ids`` [B, q].

    Raises
    ------
    ModelError
        If rows of different length need a 4-D mask (more than one token, or windows) and the model's attention
        implementation takes none.

    Notes
    -----
    A row whose tokens sit in slots of their own cannot be described to a model's causal mask, which has one offset for
    the batch: hence the 4-D mask for q > 1. With q = 1 columns suffice, and every attention implementation takes those.

    Examples
    --------
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": None}
    >>> model = Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes))
    >>> cache = GrowingCache(model.config)
    >>> ids = torch.ones(2, 3, dtype=torch.long)
    >>> with torch.no_grad():
    ...     _ = model(ids, past_key_values=cache, **step_inputs(model, cache, ids))
    >>> step = step_inputs(model, cache.rollback([1, 0]), ids[:, :1])
    >>> step["position_ids"].tolist(), step["attention_mask"].tolist()
    ([[2], [3]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    """
    cache = self_attention(cache)
    (batch, count), device = tokens.shape, tokens.device
    length = int(cache.get_seq_length())
    lengths = cache.lengths if isinstance(cache, GrowingCache) and cache.is_ragged else None
    steps = torch.arange(count, device=device)
    if lengths is None and mask is None:
        return {"attention_mask": None, "position_ids": (steps + length).expand(batch, -1)}
    held = torch.ones(batch, 0, dtype=torch.long, device=device) if mask is None else mask.to(device).long()
    held = nn.functional.pad(held, (0, length + count - held.shape[1]), value=1)  # [B, T + q]
    if lengths is None:
        positions = (held.cumsum(-1) - 1).clamp_(min=0)
        return {"attention_mask": held, "position_ids": positions[:, length:]}
    slots = on_device(lengths, device)[:, None] + steps  # [B, q]
    columns = torch.arange(length + count, device=device)
    held = held * (columns <= slots[:, -1:])
    positions = (held.cumsum(-1) - 1).clamp_(min=0).gather(1, slots)
    windows = _windows(cache)
    if count == 1 and not any(length + 1 > window for window in windows.values() if window):
        return {"attention_mask": held, "position_ids": positions}
    attention = attention_of(model.config.get_text_config(decoder=True))
    if attention not in _MASKED:
        raise ModelError(
            f"step_inputs: rows of lengths {lengths} need a 4-D mask, and attention implementation "
            f"{attention!r} takes none, expected one of {list(_MASKED)}"
        )
    masks = {}
    for kind, window in windows.items():
        visible = (columns <= slots[..., None]) & held[:, None].bool()  # [B, q, T + q]
        if window:
            visible &= columns > slots[..., None] - window
            visible = visible[..., max(min(lengths) - window + 1, 0) :]
        masks[kind] = visible[:, None]
        if _MASKED[attention]:
            masks[kind] = additive(masks[kind], model.dtype)
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1], "position_ids": positions}


def _windows(cache: Cache) -> dict[str, int | None]:
    """Window of each kind of layer that a cache has."""
    layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    windows = {layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)}
    if len(windows) > 1:
        raise ModelError(f"step_inputs: layers have windows of {sorted(windows)}, expected one for ragged rows")
    kinds: dict[str, int | None] = {}
    if any(getattr(layer, "is_sliding", None) is False for layer in layers):
        kinds["full_attention"] = None
    if windows:
        kinds["sliding_attention"] = windows.pop()
    return kinds
