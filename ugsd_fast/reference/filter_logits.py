"""Oracle of ``filter_logits``: temperature, then top-k, top-p and min-p, as thresholds on the logit."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast.reference.token_stats import per_row, tempered


def filter_logits(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Return ``logits / temperature`` with -inf where a filter cuts.

    Each filter keeps the columns at or over a threshold, so tied columns share their fate:
    top-k keeps ``s`` at or over the k-th largest; top-p, among those, a column whose strictly
    larger ones hold less than ``top_p`` of the mass; min-p one with ``p >= min_p * max p``.
    The maximum always stays. At temperature 0 only the lowest argmax stays.
    """
    vocabulary = logits.shape[-1]
    s = tempered(logits, temperature)
    order = s.sort(dim=-1, descending=True).values  # [..., V]

    top_k = per_row(top_k, logits).long()
    k = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    threshold = order.gather(-1, k - 1)

    kept = torch.where(order >= threshold, order, -torch.inf)
    mass = torch.softmax(kept, dim=-1).nan_to_num(0.0)
    above = mass.cumsum(-1) - mass  # mass of the columns before this one in the order
    top_p = per_row(top_p, logits)
    last = ((above < top_p) | (top_p >= 1.0)).sum(-1, keepdim=True).clamp(min=1) - 1
    threshold = torch.maximum(threshold, order.gather(-1, last))

    min_p = per_row(min_p, logits).clamp(max=1.0)
    threshold = torch.maximum(threshold, order[..., :1] + torch.where(min_p > 0, min_p, 0.0).log())

    keep = s >= threshold
    first = (s == order[..., :1]).to(torch.uint8).argmax(-1, keepdim=True)
    only = torch.arange(vocabulary, device=s.device) == first
    keep = torch.where(per_row(temperature, logits) > 0, keep, only)
    return torch.where(keep, s, -torch.inf)
