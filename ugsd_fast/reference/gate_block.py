"""Oracle of ``gate_block``: one uncertainty a block and whether it escalates."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_block(
    entropy: Tensor, lengths: Tensor | None, threshold: float | Tensor, reduce: str = "max"
) -> tuple[Tensor, Tensor]:
    """Reduce ``entropy[B, K]`` over the first ``lengths`` positions; a block escalates if that exceeds the threshold.

    An empty block has uncertainty 0. A NaN entropy gives a NaN uncertainty, which escalates.
    """
    entropy = entropy.double()
    batch, block = entropy.shape
    if lengths is None:
        lengths = torch.full((batch,), block, device=entropy.device)
    lengths = lengths.long().clamp(0, block)
    valid = torch.arange(block, device=entropy.device) < lengths.unsqueeze(-1)  # [B, K]
    if block == 0:
        uncertainty = entropy.new_zeros(batch)
    elif reduce == "max":
        uncertainty = torch.where(valid, entropy, -torch.inf).amax(-1)
    elif reduce == "mean":
        uncertainty = torch.where(valid, entropy, 0.0).sum(-1) / lengths.clamp(min=1)
    else:
        uncertainty = entropy[:, 0]
    uncertainty = torch.where(lengths > 0, uncertainty, 0.0)
    return uncertainty, ~(uncertainty <= torch.as_tensor(threshold, dtype=torch.float64, device=entropy.device))
