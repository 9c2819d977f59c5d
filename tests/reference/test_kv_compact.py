"""The `kv_compact` oracle against moving slots one by one."""

from __future__ import annotations

import pytest
import torch

from tests.ops import cases
from ugsd_fast.reference import kv_compact


@pytest.mark.parametrize("align", ["left", "right"])
def test_kept_slots_move_together_in_order(align: str) -> None:
    kv = [cases.random_logits(4, 2, 9, 3, seed=seed) for seed in range(3)]
    before = [tensor.clone() for tensor in kv]
    keep = torch.rand(4, 9, generator=cases.generator(5)) < 0.5
    keep[0], keep[1] = True, False
    kept = kv_compact(kv, keep, align)
    assert kept.tolist() == keep.sum(-1).tolist()
    for tensor, old in zip(kv, before, strict=True):
        for b in range(4):
            sources = keep[b].nonzero().flatten().tolist()
            first = 0 if align == "left" else 9 - len(sources)
            for place, source in enumerate(sources, first):
                assert torch.equal(tensor[b, :, place], old[b, :, source])


def test_lengths_are_leading_slots() -> None:
    kv = [torch.arange(5.0).view(1, 1, 5, 1).repeat(3, 1, 1, 1)]
    assert kv_compact(kv, torch.tensor([0, 2, 7]), "right").tolist() == [0, 2, 5]
    assert kv[0][1, 0, 3:, 0].tolist() == [0.0, 1.0]
    assert kv[0][2, 0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
