"""``ops.accept_block`` against transformers' ``_speculative_sampling`` and a greedy match by torch.argmax.

The inputs have a known verdict: all 5 drafted tokens kept, none, or 2 and 3 by turns. The floor counts every
row once that the verdict depends on: of the verifier's rows, those up to the first rejection and the row of the
next token (``block`` needs the K first ones always); of the drafter's, the one of the residual and, where their
logsumexp is not given, all that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor
from transformers.generation.utils import _speculative_sampling

from bench import inputs
from bench.harness import FLOOR, Call, Calls, Case, Sizes, Target, bare_reads, dtype_name, in_turns, main, shape_of
from ugsd_fast import ops

BLOCK = 5  # K
TRANSFORMERS = "transformers _speculative_sampling"
TRANSFORMERS_FLOAT32 = "the same on float32 copies, as generate"
GREEDY = "greedy match by torch.argmax"
# Tokens kept, by turns, for each share of accepted tokens.
VERDICTS = {"0": (0,), "0.5": (2, 3), "1": (5,)}


def greedy_match(tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many drafted tokens are the verifier's argmax, and its next token, as one writes it in torch."""
    best = target.argmax(-1)
    kept = (tokens == best[:, :-1]).long().cumprod(-1).sum(-1)
    return kept, best.gather(1, kept[:, None])


def needed_rows(rule: str, accepted: int, carried: bool) -> tuple[int, int]:
    """Return how many rows of the verifier's and of the drafter's logits a verdict depends on."""
    rejected = accepted < BLOCK
    compared = BLOCK if rule == "block" else accepted + rejected
    return max(compared, accepted + 1), (rejected if carried else compared)


def cases(sizes: Sizes, compiled: bool) -> Iterator[Case]:
    """Make the op's cases: the sampling rules at three acceptances, then the rules that compare."""

    def sampling(rule: str, share: str, dtype: torch.dtype, kind: str, carried: bool, cold: bool = False) -> Case:
        offset = count()  # new uniforms each call

        def build(seed: int) -> Calls:
            blocks = [
                inputs.drafted_block(kind, BLOCK, sizes.vocabulary, dtype, accepted, 97 * seed)
                for accepted in VERDICTS[share]
            ]

            def subject(block: inputs.Block) -> object:
                logsumexp = block.logsumexp if carried else None
                return ops.accept_block(
                    block.tokens, block.target, block.draft, rule=rule, draft_logsumexp=logsumexp, offset=next(offset)
                )

            def transformers(block: inputs.Block) -> object:
                return _speculative_sampling(block.tokens, block.draft, BLOCK, block.target)

            def transformers_float32(block: inputs.Block) -> object:
                return _speculative_sampling(block.tokens, block.draft.float(), BLOCK, block.target.float())

            def greedy(block: inputs.Block) -> object:
                return greedy_match(block.tokens, block.target)

            def by_turns(call: Callable[[inputs.Block], object]) -> Call:
                return in_turns([partial(call, block) for block in blocks])

            reads = []
            for accepted, block in zip(VERDICTS[share], blocks):
                target_rows, draft_rows = needed_rows(rule, accepted, carried)
                needed = [block.target[:, :target_rows]] + ([block.draft[:, :draft_rows]] if draft_rows else [])
                reads.append(bare_reads(*needed))
            baselines = {TRANSFORMERS: by_turns(transformers), GREEDY: by_turns(greedy)}
            if dtype is not torch.float32:
                baselines[TRANSFORMERS_FLOAT32] = by_turns(transformers_float32)
            floor = {name: in_turns([one[name] for one in reads]) for name in reads[0]}
            return Calls(by_turns(subject), floor, baselines)

        rows = sum(sum(needed_rows(rule, accepted, carried)) for accepted in VERDICTS[share]) / len(VERDICTS[share])
        return Case(
            label=f"{rule}, acceptance {share}, {'draft logsumexp given' if carried else 'from logits'}",
            shape=shape_of(BLOCK + 1, sizes.vocabulary),
            dtype=dtype_name(dtype),
            bytes=round(rows * sizes.vocabulary * dtype.itemsize),
            build=build,
            logits=kind,
            targets=(Target(TRANSFORMERS, at_least=25), Target(GREEDY, at_least=1)),
            cold=cold,
        )

    def comparing(rule: str, dtype: torch.dtype, kind: str) -> Case:
        def build(seed: int) -> Calls:
            target = inputs.logits(kind, (1, BLOCK + 1, sizes.vocabulary), dtype, seed)
            tokens = target[:, :BLOCK].argmax(-1)
            return Calls(
                subject=lambda: ops.accept_block(tokens, target, rule=rule),
                floor=bare_reads(target),
                baselines={GREEDY: lambda: greedy_match(tokens, target)},
            )

        return Case(
            label=f"{rule}, acceptance 1",
            shape=shape_of(BLOCK + 1, sizes.vocabulary),
            dtype=dtype_name(dtype),
            bytes=(BLOCK + 1) * sizes.vocabulary * dtype.itemsize,
            build=build,
            logits=kind,
            targets=(Target(FLOOR, at_most=2),) if rule in ("greedy", "rank") else (),
        )

    for rule in ("exact", "block"):
        for share in VERDICTS:
            for carried in (False, True):
                for dtype in inputs.DTYPES:
                    for kind in inputs.LOGITS:
                        yield sampling(rule, share, dtype, kind, carried)
    for rule in ("greedy", "rank", "typical", "relaxed"):
        for dtype in inputs.DTYPES:
            for kind in inputs.LOGITS:
                yield comparing(rule, dtype, kind)
    for dtype in inputs.DTYPES:
        yield sampling("exact", "1", dtype, "normal", carried=True, cold=True)


if __name__ == "__main__":
    main("accept_block", cases)
