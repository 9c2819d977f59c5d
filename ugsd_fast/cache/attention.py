"""Which attention implementation a model runs, and what kind of mask that takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Name under which `ugsd_fast.models.packed` puts itself before an implementation.
PACKED_PREFIX = "ugsd|"


def attention_of(config: Any) -> str:
    """Name of the attention implementation that a model's attention modules, given their config, compute with."""
    return (vars(config).get("_attn_implementation_internal") or "eager").removeprefix(PACKED_PREFIX)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a bool `seen` as eager attention adds it to its scores: 0, or the least number of `dtype`.

    Examples
    --------
    >>> additive(torch.tensor([True, False]), torch.float16).tolist()
    [0.0, -65504.0]
    """
    numbers = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return numbers.masked_fill_(~seen, torch.finfo(dtype).min)
