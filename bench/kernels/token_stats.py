"""``ops.token_stats`` against the torch chain for entropy, argmax and the two largest, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import inputs
from bench.harness import Calls, Case, Sizes, Target, bare_reads, dtype_name, main, shape_of
from ugsd_fast import ops

ROWS = (1, 5)  # a decode step; the rows of a drafted block


def eager_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return entropy, argmax and the margin of every row, as one writes them in torch."""
    logprob = torch.log_softmax(logits, -1, dtype=torch.float32)
    entropy = -(logprob.exp() * logprob).sum(-1)
    best = logits.topk(2, dim=-1).values
    return entropy, logits.argmax(-1), best[..., 0] - best[..., 1]


def entropy_and_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return entropy and argmax of every row: what torch.compile is given."""
    logprob = torch.log_softmax(logits, -1, dtype=torch.float32)
    return -(logprob.exp() * logprob).sum(-1), logits.argmax(-1)


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: rows × dtype × logits warm, cold ones, and a call on next to no data."""
    compiled_chain = torch.compile(entropy_and_argmax, dynamic=False) if compiled else None

    def case(rows: int, columns: int, dtype: torch.dtype, kind: str, label: str, cold: bool = False) -> Case:
        def build(seed: int) -> Calls:
            z = inputs.logits(kind, (rows, columns), dtype, seed)
            baselines: dict[str, Callable[[], object]] = {"torch eager": lambda: eager_statistics(z)}
            if compiled_chain is not None and columns == sizes.vocabulary:
                baselines["torch.compile"] = lambda: compiled_chain(z)
            return Calls(lambda: ops.token_stats(z), bare_reads(z), baselines)

        whole = columns == sizes.vocabulary
        eager = Target("torch eager", at_least=20 if dtype is torch.float32 else 35)
        return Case(
            label=label,
            shape=shape_of(rows, columns),
            dtype=dtype_name(dtype),
            bytes=rows * columns * dtype.itemsize,
            build=build,
            logits=kind,
            targets=(eager, Target("torch.compile", at_least=8)) if whole else (),
            cold=cold,
        )

    for rows in ROWS:
        label = f"{rows} row{'s' * (rows > 1)}"
        for dtype in inputs.DTYPES:
            for kind in inputs.LOGITS:
                yield case(rows, sizes.vocabulary, dtype, kind, label)
            if rows == max(ROWS):
                yield case(rows, sizes.vocabulary, dtype, "normal", label, cold=True)
    yield case(1, 64, torch.float32, "normal", "64 columns: the cost of a call")


if __name__ == "__main__":
    main("token_stats", cases)
