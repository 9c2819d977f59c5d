"""Argument checks shared by the ops: each failure names the op, what was wrong, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)
_LARGEST = (1 << 63) - 1
_HALF = 1 << 63
_WORDS = 1 << 64


def check_logits(op: str, name: str, logits: Tensor, dim: int | None = None) -> None:
    """Raise unless ``logits`` is a float matrix whose rows are contiguous and not empty."""
    if logits.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} has dtype {logits.dtype}, expected float32, bfloat16 or float16")
    shape = logits.shape
    if not shape or (dim is not None and len(shape) != dim):
        expected = "at least 1 dimension (the vocabulary)" if dim is None else f"{dim} dimensions"
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected {expected}")
    if shape[-1] == 0:
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected a last dimension of at least 1 column")
    if logits.stride()[-1] != 1 and shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} has stride {logits.stride()[-1]} in its last dimension, expected 1 "
            "(rows are read in place, never copied)"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise unless ``tensor`` has exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} ({why})")


def check_device(op: str, name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device} as {other} is")


def check_integers(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` holds int64 or int32."""
    if tensor.dtype not in _INTEGERS:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected int64 or int32")


def check_option(op: str, name: str, got: str, options: tuple[str, ...]) -> None:
    """Raise unless ``got`` is one of ``options``."""
    if got not in options:
        raise ValueError(f"{op}: {name} is {got!r}, expected one of {', '.join(map(repr, options))}")


def number_or_rows(
    op: str,
    name: str,
    value: float | Tensor,
    like: Tensor,
    *,
    low: float = -inf,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, Tensor | None]:
    """Split an argument that is a number or a tensor a row into ``(number, tensor)``.

    A tensor is broadcast to the rows, the dimensions of ``like`` before its last, and never read on the host; a
    number under ``low`` or not finite raises.
    """
    if type(value) is float and low <= value < inf:
        return value, None
    if isinstance(value, Tensor):
        if value.device != like.device:
            raise ValueError(f"{op}: {name} is on {value.device}, expected {like.device} as the rows are")
        shape = like.shape[:-1]
        try:
            return 0.0, value.to(dtype).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}, "
                f"expected one that broadcasts to {tuple(shape)} (the rows)"
            ) from None
    if not isinstance(value, (int, float)) or not -inf < value < inf or value < low:
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number of at least {low:g} or a tensor")
    return value, None


def word_or_rows(op: str, name: str, value: int | Tensor, like: Tensor) -> tuple[int, Tensor | None]:
    """Split a seed or offset into ``(int64, tensor)``: any Python integer, or an integer tensor a row."""
    if isinstance(value, int):
        # The generator takes 64 bits: a Python integer stands for its low ones.
        return (value + _HALF) % _WORDS - _HALF, None
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} is {value!r}, expected an integer or an integer tensor")
    check_integers(op, name, value)
    return 0, number_or_rows(op, name, value, like, dtype=torch.int64)[1]


def count_or_rows(op: str, name: str, value: int | Tensor, like: Tensor) -> tuple[int, Tensor | None]:
    """Split a count of columns into ``(int64, tensor)``; more than any row has is as good as the most int64 holds."""
    if type(value) is int and 0 <= value <= _LARGEST:
        return value, None
    if isinstance(value, int) and value > _LARGEST:
        return _LARGEST, None
    number, rows = number_or_rows(op, name, value, like, low=0, dtype=torch.int64)
    return int(number), rows


def check_out(
    op: str, out: Sequence[Tensor], expected: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], like: Tensor
) -> tuple[Tensor, ...]:
    """Raise unless ``out`` has a contiguous tensor of each expected name, dtype and shape on ``like``'s device."""
    if len(out) != len(expected):
        names = ", ".join(name for name, _, _ in expected)
        raise ValueError(f"{op}: out has {len(out)} tensors, expected {len(expected)} ({names})")
    device = like.device
    for tensor, (name, dtype, shape) in zip(out, expected):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: out.{name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype is not dtype:
            raise ValueError(f"{op}: out.{name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: out.{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.device != device:
            raise ValueError(f"{op}: out.{name} is on {tensor.device}, expected {device} as the inputs are")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: out.{name} has strides {tensor.stride()}, expected a contiguous tensor")
        if tensor.requires_grad:
            raise ValueError(f"{op}: out.{name} requires a gradient, expected a tensor that does not")
    return tuple(out)
