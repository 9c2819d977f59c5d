"""``ops.sample`` against transformers' warpers and torch.multinomial, which give no entropy and no log-probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import torch

from bench import inputs
from bench.baselines import FILTERS, warp_and_sample, warpers
from bench.harness import Calls, Case, Sizes, Target, bare_reads, dtype_name, main, shape_of
from ugsd_fast import ops

ROWS = 5
TRANSFORMERS = "transformers warpers + multinomial"
TOKEN_STATS = "ops.token_stats"
TARGETS = {
    "plain": (Target(TRANSFORMERS, at_least=60), Target(TOKEN_STATS, at_most=1.3)),
    "top-k 50": (Target(TRANSFORMERS, at_least=30),),
    "top-p 0.9": (Target(TRANSFORMERS, at_least=50),),
    "top-k 50, top-p 0.9": (Target(TRANSFORMERS, at_least=50),),
}


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: filters × dtype × logits, and a cold one a dtype."""

    def case(label: str, dtype: torch.dtype, kind: str, cold: bool = False) -> Case:
        filters = FILTERS[label]
        chain = warpers(filters)
        offset = count()  # a new draw each call

        def build(seed: int) -> Calls:
            z = inputs.logits(kind, (ROWS, sizes.vocabulary), dtype, seed)
            baselines: dict[str, Callable[[], object]] = {TRANSFORMERS: lambda: warp_and_sample(chain, z)}
            if not filters:
                baselines[TOKEN_STATS] = lambda: ops.token_stats(z)
            return Calls(lambda: ops.sample(z, **filters, seed=seed, offset=next(offset)), bare_reads(z), baselines)

        size = ROWS * sizes.vocabulary * dtype.itemsize
        shape = shape_of(ROWS, sizes.vocabulary)
        return Case(label, shape, dtype_name(dtype), size, build, kind, TARGETS[label], cold)

    for label in FILTERS:
        for dtype in inputs.DTYPES:
            for kind in inputs.LOGITS:
                yield case(label, dtype, kind)
    for dtype in inputs.DTYPES:
        yield case("plain", dtype, "normal", cold=True)


if __name__ == "__main__":
    main("sample", cases)
