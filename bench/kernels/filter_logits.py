"""``ops.filter_logits`` against transformers' warpers; the floor reads the logits and writes float32 ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import inputs
from bench.baselines import FILTERS, warp, warpers
from bench.harness import Calls, Case, Sizes, dtype_name, main, shape_of
from ugsd_fast import ops

ROWS = 5


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: filters × dtype × logits."""

    def case(label: str, dtype: torch.dtype, kind: str) -> Case:
        filters = FILTERS[label]
        chain = warpers(filters)

        def build(seed: int) -> Calls:
            z = inputs.logits(kind, (ROWS, sizes.vocabulary), dtype, seed)
            converted = torch.empty(z.shape, dtype=torch.float32)
            return Calls(
                subject=lambda: ops.filter_logits(z, **filters),
                floor={"copy to float32": lambda: converted.copy_(z)},
                baselines={"transformers warpers": lambda: warp(chain, z)},
            )

        size = ROWS * sizes.vocabulary * (dtype.itemsize + 4)
        return Case(label, shape_of(ROWS, sizes.vocabulary), dtype_name(dtype), size, build, kind)

    for label, filters in FILTERS.items():
        if filters:
            for dtype in inputs.DTYPES:
                for kind in inputs.LOGITS:
                    yield case(label, dtype, kind)


if __name__ == "__main__":
    main("filter_logits", cases)
