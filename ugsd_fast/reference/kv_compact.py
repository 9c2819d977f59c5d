"""Oracle of ``kv_compact``: move the kept cache slots together, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_compact(kv: Sequence[Tensor], keep: Tensor, align: str = "left") -> Tensor:
    """Move the kept slots of each sequence to ``[0, n)`` or ``[T - n, T)``, in order, and return ``n[B]``.

    ``keep`` is a mask ``[B, T]`` or the number ``[B]`` of leading slots that stay. Slots outside the
    kept range hold what they held before.
    """
    slots = kv[0].shape[2]
    position = torch.arange(slots, device=keep.device)
    mask = keep if keep.dim() == 2 else position < keep.clamp(0, slots).unsqueeze(-1)  # [B, T]
    kept = mask.sum(-1)
    # A stable sort puts the kept slots first, in order; the rotation aligns them to the right end.
    source = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)  # [B, T]: kept slots, then the others
    first = torch.zeros_like(kept) if align == "left" else slots - kept
    source = source.gather(-1, (position - first.unsqueeze(-1)) % slots)
    moved = (position >= first.unsqueeze(-1)) & (position < (first + kept).unsqueeze(-1))
    source = torch.where(moved, source, position)
    for tensor in kv:
        tensor.copy_(tensor.gather(2, source[:, None, :, None].expand_as(tensor)))
    return kept
