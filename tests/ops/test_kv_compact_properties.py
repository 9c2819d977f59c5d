"""`kv_compact` on drawn caches, every kernel against the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops, reference

pytestmark = cases.on_backends("kv_compact", native=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)


@dataclass(frozen=True)
class Caches:
    """Tensors inside larger buffers, and what is to stay."""

    buffers: list[Tensor]
    views: list[Tensor]
    keep: Tensor
    align: str


@st.composite
def caches(draw: st.DrawFn) -> Caches:
    batch, slots = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    rng = cases.generator(draw(st.integers(0, 2**31)))
    buffers, views = [], []
    for _ in range(draw(st.integers(1, 3))):
        heads, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16, 64]))
        dtype, aside = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2))
        order = draw(st.permutations([0, 1, 2]))  # of batch, heads and slots in memory
        sizes = [(batch, heads, slots)[d] for d in order]
        buffer = torch.randint(-100, 100, (*(size + aside for size in sizes), width + aside), generator=rng).to(dtype)
        view = buffer[: sizes[0], aside : aside + sizes[1], : sizes[2], aside:].permute(*map(order.index, range(3)), 3)
        buffers.append(buffer)
        views.append(view)
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    keep = torch.rand(batch, slots, generator=rng) < share
    if draw(st.booleans()):  # a long prefix that stays
        keep[:, : slots // 2] = True
    if draw(st.integers(0, 3)) == 0:
        keep = torch.randint(-1, slots + 2, (batch,), generator=rng)
    return Caches(buffers, views, keep, draw(st.sampled_from(["left", "right"])))


def test_moves_what_stays_and_nothing_else() -> None:
    @settings(settings.get_profile("ops"), max_examples=60)
    @given(caches())
    def check(case: Caches) -> None:
        expected = [view.clone() for view in case.views]
        kept = reference.kv_compact(expected, case.keep, case.align)
        before = [buffer.clone() for buffer in case.buffers]
        assert torch.equal(ops.kv_compact(case.views, case.keep, align=case.align), kept)
        slots = case.views[0].shape[2]
        place = torch.arange(slots)
        first = torch.zeros_like(kept) if case.align == "left" else slots - kept
        inside = (place >= first[:, None]) & (place < (first + kept)[:, None])  # [B, T]
        for buffer, old, view, wanted in zip(case.buffers, before, case.views, expected, strict=True):
            where = inside[:, None, :, None].expand_as(view)
            assert torch.equal(view[where], wanted[where])
            view.zero_()
            old.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
            assert torch.equal(buffer, old)

    check()


@pytest.mark.parametrize("align", ["left", "right"])
def test_slots_that_keep_their_place_are_not_written(align: str) -> None:
    """Nor dropped ones that nothing replaces."""
    mask = torch.tensor([[True] * 5 + [False, True, True, False]])
    kv = [torch.arange(9.0).view(1, 1, 9, 1).expand(1, 2, 9, 4).clone() for _ in range(2)]
    ops.kv_compact(kv, mask if align == "left" else mask.flip(1), align=align)
    expected = [0, 1, 2, 3, 4, 6, 7, 7, 8] if align == "left" else [0, 1, 1, 2, 4, 5, 6, 7, 8]
    assert all(tensor[0, 0, :, 0].tolist() == expected for tensor in kv)


def test_tables_are_kept_while_tensors_stay(backend: cases.Backend) -> None:
    if backend.name != "triton":
        return
    from ugsd_fast.kernels import kv_compact

    keep = torch.tensor([[False, True, True]])
    kv = [torch.zeros(1, 1, 3, 4), torch.zeros(1, 2, 3, 4)]
    kv_compact._tables.clear()
    for _ in range(3):
        ops.kv_compact(kv, keep)
    assert len(kv_compact._tables) == 1
    ops.kv_compact(kv[:1], keep)
    ops.kv_compact([kv[1].transpose(0, 1).contiguous().transpose(0, 1)], keep)
    assert len(kv_compact._tables) == 3
    for _ in range(2 * kv_compact._KEPT_TABLES):
        ops.kv_compact([torch.zeros(1, 1, 3, 4) for _ in range(3)], keep)
    assert len(kv_compact._tables) <= kv_compact._KEPT_TABLES
