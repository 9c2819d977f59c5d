"""``ops.lm_head_stats`` against torch's matrix product and the statistics of its logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import FLOOR, Calls, Case, Sizes, Target, bare_reads, dtype_name, main, shape_of
from bench.kernels.token_stats import eager_statistics
from ugsd_fast import ops

ROWS = (1, 2, 5, 6)
DTYPE = torch.bfloat16
TORCH = "torch matmul + statistics"
TORCH_FUSED = "torch matmul + ops.token_stats"


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: a decode step's row and the rows of a block."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes.vocabulary, sizes.width, dtype=DTYPE, generator=generator)
    weight *= 3 * sizes.width**-0.5

    def case(rows: int) -> Case:
        def build(seed: int) -> Calls:
            hidden = torch.randn(rows, sizes.width, generator=torch.Generator().manual_seed(seed)).to(DTYPE)
            return Calls(
                subject=lambda: ops.lm_head_stats(hidden, weight),
                floor=bare_reads(weight, hidden),
                baselines={
                    TORCH: lambda: eager_statistics(hidden @ weight.T),
                    TORCH_FUSED: lambda: ops.token_stats(hidden @ weight.T),
                },
            )

        return Case(
            label=f"{rows} row{'s' * (rows > 1)}",
            shape=shape_of(sizes.vocabulary, sizes.width),
            dtype=dtype_name(DTYPE),
            bytes=(weight.numel() + rows * sizes.width) * DTYPE.itemsize,
            build=build,
            targets=(Target(TORCH, at_most=0.55), Target(FLOOR, at_least=0.8)),
        )

    for rows in ROWS:
        yield case(rows)


if __name__ == "__main__":
    main("lm_head_stats", cases)
