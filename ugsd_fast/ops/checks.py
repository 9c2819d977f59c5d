"""Argument checks shared by the ops: each failure names the op, what was wrong, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


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
    if shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} has stride {logits.stride(-1)} in its last dimension, expected 1 "
            "(rows are read in place, never copied)"
        )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise unless ``tensor`` has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
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
    rows: Tensor | None,
    shape: tuple[int, ...],
    *,
    low: float = -torch.inf,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, Tensor | None]:
    """Split an argument that is a number or a tensor a row into ``(number, tensor)``.

    A tensor is broadcast to the rows' ``shape`` and never read on the host; a number under ``low`` or not
    finite raises.
    """
    if isinstance(value, Tensor):
        if rows is not None and value.device != rows.device:
            raise ValueError(f"{op}: {name} is on {value.device}, expected {rows.device} as the rows are")
        try:
            return 0.0, value.to(dtype).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}, "
                f"expected one that broadcasts to {tuple(shape)} (the rows)"
            ) from None
    if not isinstance(value, (int, float)) or not -torch.inf < value < torch.inf or value < low:
        raise ValueError(f"{op}: {name} is {value!r}, expected a finite number of at least {low:g} or a tensor")
    return value, None


def word_or_rows(
    op: str, name: str, value: int | Tensor, rows: Tensor, shape: tuple[int, ...]
) -> tuple[int, Tensor | None]:
    """Split a seed or offset into ``(int64, tensor)``: any Python integer, or an integer tensor a row."""
    if isinstance(value, Tensor):
        check_integers(op, name, value)
        return 0, number_or_rows(op, name, value, rows, shape, dtype=torch.int64)[1]
    if not isinstance(value, int):
        raise ValueError(f"{op}: {name} is {value!r}, expected an integer or an integer tensor")
    # The generator takes 64 bits: a Python integer stands for its low ones.
    return (value + (1 << 63)) % (1 << 64) - (1 << 63), None
