"""Tensors as addresses and layouts, for C++ and CUDA entry points that take pointers."""

from __future__ import annotations

from math import prod
from typing import Any, overload

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

NO_ROWS = (0, 0, 0, 0, 0, 0, 0)
"""Stands for an absent tensor of rows."""


def rows(logits: Tensor) -> tuple[Any, ...]:
    """Return ``(address, dtype, outer, inner, outer stride, inner stride, columns)``, strides in elements.

    Two leading dimensions are taken as they lie. More are collapsed into two; where their strides do not allow
    that, the rows are copied, and the copy rides at the end of the tuple so that it outlives the call.
    """
    shape = logits.shape
    dims = len(shape)
    if dims == 2:
        layout = 1, shape[0], 0, logits.stride(0)
    elif dims == 3:
        layout = shape[0], shape[1], logits.stride(0), logits.stride(1)
    elif dims == 1:
        layout = 1, 1, 0, 0
    else:
        collapsed = logits.reshape(prod(shape[:-2]), shape[-2], shape[-1])
        return *rows(collapsed), collapsed
    return logits.data_ptr(), _DTYPE_CODES[logits.dtype], *layout, shape[-1]


def address(tensor: Tensor | None) -> int:
    """Return the address of a contiguous tensor, 0 of an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


@overload
def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a small side input contiguous and in the dtype that the kernels read; the caller holds it."""
    return None if tensor is None else tensor.to(dtype).contiguous()
