"""``ops.logprob_rank`` against torch's log_softmax, gather and a count of the larger logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import inputs
from bench.harness import FLOOR, Calls, Case, Sizes, Target, bare_reads, dtype_name, main, shape_of
from ugsd_fast import ops

ROWS = 5


def eager_logprob_rank(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and rank of one token a row, as one writes them in torch."""
    logprob = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, tokens[:, None])[:, 0]
    return logprob, 1 + (logits > logits.gather(-1, tokens[:, None])).sum(-1)


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: dtype × logits, with and without the rows' logsumexp at hand."""

    def case(dtype: torch.dtype, kind: str, carried: bool, cold: bool = False) -> Case:
        def build(seed: int) -> Calls:
            z = inputs.logits(kind, (ROWS, sizes.vocabulary), dtype, seed)
            tokens = z.topk(4, dim=-1).indices[:, 3].contiguous()
            logsumexp = ops.token_stats(z).logsumexp if carried else None
            baselines: dict[str, Callable[[], object]] = {"torch eager": lambda: eager_logprob_rank(z, tokens)}
            return Calls(lambda: ops.logprob_rank(z, tokens, logsumexp=logsumexp), bare_reads(z), baselines)

        return Case(
            label="logsumexp given" if carried else "from logits",
            shape=shape_of(ROWS, sizes.vocabulary),
            dtype=dtype_name(dtype),
            bytes=ROWS * sizes.vocabulary * dtype.itemsize,
            build=build,
            logits=kind,
            targets=(Target("torch eager", at_least=5), *((Target(FLOOR, at_most=1.5),) if carried else ())),
            cold=cold,
        )

    for carried in (False, True):
        for dtype in inputs.DTYPES:
            for kind in inputs.LOGITS:
                yield case(dtype, kind, carried)
            yield case(dtype, "normal", carried, cold=True)


if __name__ == "__main__":
    main("logprob_rank", cases)
