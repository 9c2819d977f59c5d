"""``ops.gate_block`` against two torch calls: a few numbers, so all of it is the cost of a call."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Calls, Case, Sizes, bare_reads, main, shape_of
from ugsd_fast import ops

BLOCK = 8  # drafted tokens


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: one block and a batch of them, whole and ragged."""

    def case(batch: int, ragged: bool) -> Case:
        def build(seed: int) -> Calls:
            generator = torch.Generator().manual_seed(seed)
            entropy = 3 * torch.rand(batch, BLOCK, generator=generator)
            lengths = torch.randint(1, BLOCK + 1, (batch,), generator=generator)
            valid = torch.arange(BLOCK) < lengths[:, None]

            def eager() -> object:
                uncertainty = (torch.where(valid, entropy, 0.0) if ragged else entropy).amax(-1)
                return uncertainty, uncertainty >= 1.5

            return Calls(
                subject=lambda: ops.gate_block(entropy, lengths if ragged else None, threshold=1.5),
                floor=bare_reads(entropy),
                baselines={"torch eager": eager},
            )

        return Case("ragged" if ragged else "whole blocks", shape_of(batch, BLOCK), "float32", batch * BLOCK * 4, build)

    for batch in (1, 64):
        for ragged in (False, True):
            yield case(batch, ragged)


if __name__ == "__main__":
    main("gate_block", cases)
