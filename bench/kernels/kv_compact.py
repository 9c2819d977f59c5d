"""``ops.kv_compact`` of a whole cache against memcpy of the same bytes and against torch's own ways.

The cache is that of 28 layers with 2 key/value heads of 128, batch 8. *Full gathers* move nearly every slot:
all behind the first one, or a random half. The *ragged tail* is what a rejected block leaves: of the last 8
slots of each sequence, the first 4 to 7 are dropped and the others move down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import FLOOR, Calls, Case, Sizes, Target, dtype_name, main, shape_of
from ugsd_fast import ops

BATCH, HEADS, HEAD_WIDTH, TAIL = 8, 2, 128, 8
DTYPE = torch.bfloat16
COPIES = "torch copy_ a layer and sequence"
GATHER_TAIL = "torch gather of the tail, a layer"
INDEX = "torch indexing, a layer"


def full_masks(slots: int, seed: int) -> dict[str, Tensor]:
    """Return masks ``[B, T]`` of kept slots that move nearly the whole cache."""
    first_dropped = torch.ones(BATCH, slots, dtype=torch.bool)
    first_dropped[:, 0] = False
    order = torch.rand(BATCH, slots, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return {"all but the first slot": first_dropped, "a random half": order < slots // 2}


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: two full gathers and a ragged tail."""
    shape = (BATCH, HEADS, sizes.slots, HEAD_WIDTH)
    slot_bytes = 2 * sizes.layers * HEADS * HEAD_WIDTH * DTYPE.itemsize  # of one slot of one sequence

    def cache(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(DTYPE) for _ in range(2 * sizes.layers)]

    def memcpy(slots: int) -> Callable[[], object]:
        source = [torch.randn(slots, HEADS * HEAD_WIDTH).to(DTYPE) for _ in range(2 * sizes.layers)]
        target = [torch.empty_like(tensor) for tensor in source]

        def copy() -> None:
            for one, other in zip(target, source):
                one.copy_(other)

        return copy

    def case(label: str, moved: int, build: Callable[[int], Calls], *targets: Target) -> Case:
        text = shape_of(2 * sizes.layers, *shape)
        return Case(label, text, dtype_name(DTYPE), 2 * moved * slot_bytes, build, targets=targets)

    def full(label: str, keep: Tensor) -> Case:
        kept = keep.sum(-1)
        moved = int((kept - keep.long().cumprod(-1).sum(-1)).sum())

        def build(seed: int) -> Calls:
            kv = cache(seed)
            # Rows of one length, as both masks have: the fastest form that torch's indexing has.
            source = keep.nonzero()[:, 1].view(BATCH, 1, -1)
            sequence, head = torch.arange(BATCH).view(-1, 1, 1), torch.arange(HEADS).view(1, -1, 1)

            def index() -> None:
                for tensor in kv:
                    tensor[:, :, : source.shape[2]] = tensor[sequence, head, source]

            return Calls(lambda: ops.kv_compact(kv, keep), {"memcpy": memcpy(moved)}, {INDEX: index})

        return case(f"full gather: {label}", moved, build, Target(FLOOR, at_most=1.15))

    def tail() -> Case:
        first = sizes.slots - TAIL
        dropped = [TAIL - 1 - sequence % 4 for sequence in range(BATCH)]  # 7, 6, 5, 4, 7, …
        moved = sum(TAIL - hole for hole in dropped)
        keep = torch.ones(BATCH, sizes.slots, dtype=torch.bool)
        for sequence, hole in enumerate(dropped):
            keep[sequence, first : first + hole] = False

        def build(seed: int) -> Calls:
            kv = cache(seed)
            order = torch.argsort((~keep[:, first:]).to(torch.uint8), dim=-1, stable=True)
            order = order[:, None, :, None].expand(-1, HEADS, -1, HEAD_WIDTH)

            def copies() -> None:
                for tensor in kv:
                    for sequence, hole in enumerate(dropped):
                        rows = tensor[sequence, :, first:]
                        rows[:, : TAIL - hole].copy_(rows[:, hole:])

            def gather() -> None:
                for tensor in kv:
                    rows = tensor[:, :, first:]
                    rows.copy_(rows.gather(2, order))

            baselines = {COPIES: copies, GATHER_TAIL: gather}
            return Calls(lambda: ops.kv_compact(kv, keep), {"memcpy": memcpy(moved)}, baselines)

        return case(f"ragged tail of {TAIL} slots", moved, build, Target(COPIES, at_least=20))

    for label, keep in full_masks(sizes.slots, seed=0).items():
        yield full(label, keep)
    yield tail()


if __name__ == "__main__":
    main("kv_compact", cases)
