"""Tensors as addresses, for entry points of the extension that take pointers."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Return the address of a contiguous tensor, 0 of an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a small side input contiguous and in the dtype that the kernels read; the caller holds it."""
    return tensor.to(dtype).contiguous()
