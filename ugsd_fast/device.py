"""Host values on a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a few host values on a device.

    ``torch.tensor(values, device=...)`` copies, and then waits for all that the device has been given before.

    Examples
    --------
    >>> on_device([3, 1], torch.device("cpu"))
    tensor([3, 1])
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
