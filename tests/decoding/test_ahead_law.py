"""Lossless sampling while verdicts are late: whatever is drafted ahead, and thrown away, the law is the verifier's.

Exactly: at a tiny vocabulary every way in which the uniforms can fall is gone through, each with its probability. A
uniform is known by what it is drawn from: seed, draw, row, stream. If one is used twice, its second use is bound by
what the first has told of it, so that a draw that is used again where it must not be changes the law, however little.
And by chi-square through the real draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.test_sampling_law import (
    DRAWS,
    INPUTS,
    PROMPT,
    SAMPLING,
    TOKENS,
    TableModel,
    TableSequence,
    check,
    law,
    pair,
)
from tests.reference import definitions
from ugsd_fast import Decoder, LocalVerifier, UGSDConfig, ops
from ugsd_fast.decoding import verification
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.reference import Stream
from ugsd_fast.verifier import Verdict

RANDOM, REJECTED, ACCEPTED, TURNING = range(4)
"""Requests by the table of their pair: drafts are drawn, all rejected, all accepted, rejected at first only."""


class Dice:
    """Uniforms in one of the ways in which they can fall.

    Parameters
    ----------
    path : list of list of int
        For each throw that can fall in several ways, those to be tried yet; the last of them is this one's.
    """

    def __init__(self, path: list[list[int]]):
        self.probability = 1.0
        self._path, self._thrown = path, 0
        self._within: dict[Hashable, tuple[float, float]] = {}

    def throw(self, uniform: Hashable, mass: Sequence[float] | np.ndarray[Any, Any]) -> int:
        """The part of `mass` that a uniform falls into."""
        low, high = self._within.get(uniform, (0.0, 1.0))
        edges = [0.0, *np.cumsum(mass) / np.sum(mass)]
        parts = [(part, max(low, a), min(high, b)) for part, (a, b) in enumerate(pairwise(edges))]
        parts = [(part, a, b) for part, a, b in parts if b - a > 1e-9]  # less is rounding
        if len(parts) > 1:
            if self._thrown == len(self._path):
                self._path.append(list(range(len(parts))))
            parts = [parts[self._path[self._thrown][-1]]]
            self._thrown += 1
        ((part, a, b),) = parts
        self._within[uniform] = a, b
        self.probability *= (b - a) / (high - low)
        return part


def every_way(run: Callable[[Dice], Any]) -> Iterator[tuple[float, Any]]:
    """What `run` returns in each of the ways in which dice can fall, with its probability."""
    path: list[list[int]] = []
    while True:
        dice = Dice(path)
        outcome = run(dice)
        yield dice.probability, outcome
        while path and len(path[-1]) == 1:
            path.pop()
        if not path:
            return
        path[-1].pop()


def draw_by(dice: Dice, patch: pytest.MonkeyPatch) -> None:
    """Have the ops that draw throw these dice, by the rules' definitions."""

    def sample(logits: Tensor, *, seed: int, offset: int, **_: Any) -> ops.Sample:
        laws = [definitions.softmax(row) for row in logits.numpy()]
        tokens = [dice.throw((seed, offset, row, Stream.DRAFT), law) for row, law in enumerate(laws)]
        return ops.Sample(torch.tensor(tokens), torch.zeros(len(tokens)), ops.token_stats(logits))

    def accept_block(
        tokens: Tensor, target: Tensor, draft: Tensor, *, rule: str, bonus: bool, seed: int, offset: int, **_: Any
    ) -> ops.Acceptance:
        drafted = tokens[0].numpy()
        block = len(drafted)
        p, q = (np.stack([definitions.softmax(row) for row in logits[0].numpy()]) for logits in (target, draft))

        def passes(position: int, threshold: float) -> bool:
            return not dice.throw((seed, offset, 0, Stream.ACCEPT.at(position)), [threshold, 1 - threshold])

        if rule == "block":
            terms = definitions.block_terms(p, q, drafted)
            accepted = next((n for n in range(block, 0, -1) if passes(n - 1, terms.h[n])), 0)
            weight = terms.w[accepted]
        else:
            thresholds = definitions.exact_thresholds(p, q, drafted)
            accepted = next((n for n, threshold in enumerate(thresholds) if not passes(n, threshold)), block)
            weight = 1.0
        following = -1
        if accepted < block or bonus:
            mass = definitions.next_mass(p[accepted], q[accepted] if accepted < block else None, weight)
            following = dice.throw((seed, offset, 0, Stream.RESIDUAL), mass)
        return ops.Acceptance(torch.tensor([accepted]), torch.tensor([following]), torch.zeros(1, block))

    patch.setattr(ops, "sample", sample)
    patch.setattr(ops, "accept_block", accept_block)


class Late(Future[Verdict]):
    """A verdict that is there when it was asked for `patience` times, or is waited for."""

    def __init__(self, verdict: Verdict, patience: int):
        super().__init__()
        self._verdict, self._patience = verdict, patience

    def done(self) -> bool:
        self._patience -= 1
        if self._patience < 0:
            self.arrive()
        return super().done()

    def arrive(self) -> None:
        if not super().done():
            self.set_result(self._verdict)


class LateVerifier:
    """Verdicts come one by one, each behind so many tokens drafted ahead."""

    def __init__(self, verifier: LocalVerifier, patience: Sequence[Sequence[int]]):
        self._verifier = verifier
        self._patience = cycle(patience)  # of each session's verdicts, in turn
        self.tokenizer, self.max_audio_seconds, self.eos_token_ids = None, None, frozenset[int]()

    def open(self, config: UGSDConfig, **request: Any) -> Any:
        session: Any = self._verifier.open(config, **request)
        patience = cycle(next(self._patience))

        def submit(committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Late:
            return Late(session.verify(committed, block, bonus=bonus), next(patience))

        session.submit = submit
        return session

    def decode(self, tokens: Sequence[int]) -> str:
        return self._verifier.decode(tokens)


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can draft no more waits for verdicts: let them come."""

    def wait(futures: Sequence[Late]) -> None:
        for future in futures:
            future.arrive()

    monkeypatch.setattr(verification, "wait", wait)


class Tables(TableModel):
    """A table [V, V, V] for each kind of request."""

    def open(self, inputs: Any) -> Any:
        return TableSequence(self.table[int(inputs["input_ids"][0, 0])])


def tables(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Probabilities [4, V, V, V] of the next token behind each two, of a drafter and of its verifier."""
    generator = torch.Generator().manual_seed(3)
    shape = 4, vocabulary, vocabulary, vocabulary
    draft, target = (torch.randn(shape, generator=generator).mul(1.5).softmax(-1) for _ in range(2))
    draft[REJECTED:], target[REJECTED:] = 0.0, 0.0
    draft[REJECTED, ..., 0] = target[REJECTED, ..., 1] = 1.0
    draft[ACCEPTED, ..., 0] = target[ACCEPTED, ..., 0] = 1.0
    draft[TURNING, :, 0, 0] = draft[TURNING, :, 1:, 1] = target[TURNING, ..., 1] = 1.0
    return draft, target


def largest_error(
    kinds: Sequence[int], patience: Sequence[Sequence[int]], tokens: int, *, vocabulary: int = 2, **settings: Any
) -> float:
    """How far the joint law of the captions of requests, two at a time, is from their verifier's, at any captions."""
    draft, target = tables(vocabulary)
    config = UGSDConfig(**{"always_escalate": True, "eos_token_id": -1, "temperature": 1.0, **settings})
    requests = [{"input_ids": torch.tensor([[kind]])} for kind in kinds]
    found: dict[Any, float] = defaultdict(float)

    def run(dice: Dice) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            draw_by(dice, patch)
            verifier = LateVerifier(LocalVerifier(Tables(target.log())), patience)
            results = Decoder(Tables(draft.log()), verifier, config).generate(
                inputs=requests, verifier_inputs=requests, max_new_tokens=tokens, max_batch_size=2
            )
        return tuple(tuple(result.tokens) for result in results)

    for probability, captions in every_way(run):
        found[captions] += probability
    assert sum(found.values()) == pytest.approx(1.0)

    def expected(captions: Sequence[Sequence[int]]) -> float:
        p = 1.0
        for kind, caption in zip(kinds, captions, strict=True):
            for first, second, token in zip((*PROMPT, *caption), (*PROMPT, *caption)[1:], caption, strict=False):
                p *= float(target[kind, first, second, token])
        return p

    return max(abs(probability - expected(captions)) for captions, probability in found.items())


EXACT = 1e-6  # float32 logits
both_rules = pytest.mark.parametrize("rule", ["exact", "block"])


@both_rules
class TestEveryWay:
    """The law by enumeration."""

    @pytest.mark.parametrize(("size", "patience"), [(1, (2, 1)), (2, (0,)), (2, (2, 1)), (3, (1,))], ids=str)
    def test_one_request(self, rule: Any, size: int, patience: Sequence[int]) -> None:
        settings = {"rule": rule, "block_size": size, "ahead": 3}
        assert largest_error([RANDOM], [patience], 4, **settings) < EXACT
        if size == 2:
            assert largest_error([RANDOM], [patience], 4, bonus=False, **settings) < EXACT
        if patience == (0,):
            assert largest_error([RANDOM], [patience], 3, vocabulary=3, **settings) < EXACT

    def test_blocks_that_end_by_entropy(self, rule: Any) -> None:
        settings = {"adaptive": "entropy", "min_block": 1, "max_block": 3, "entropy_threshold": 0.5, "ahead": 3}
        assert largest_error([RANDOM], [(1, 2)], 4, rule=rule, **settings) < EXACT

    @pytest.mark.parametrize(
        ("size", "patience"),
        [(1, [(0,)]), (1, [(1, 0), (0,)]), (2, [(0,)]), (2, [(1,), (0,)])],
        ids=str,
    )
    def test_requests_know_nothing_of_each_other(self, rule: Any, size: int, patience: Sequence[Sequence[int]]) -> None:
        tokens = 4 - size
        assert largest_error([RANDOM, RANDOM], patience, tokens, rule=rule, block_size=size, ahead=2) < EXACT

    @pytest.mark.parametrize("patience", [[(0,)], [(0, 1)], [(2, 0), (0,)]], ids=str)
    @pytest.mark.parametrize("kinds", [(REJECTED, RANDOM), (RANDOM, REJECTED), (ACCEPTED, RANDOM)], ids=str)
    def test_beside_one_that_gets_on_otherwise(
        self, rule: Any, kinds: Sequence[int], patience: Sequence[Sequence[int]]
    ) -> None:
        assert largest_error(kinds, patience, 4, rule=rule, block_size=2, ahead=3) < EXACT

    def test_left_alone_by_one_with_more_rejections(self, rule: Any) -> None:
        """The last joins late; once the second has ended, its draws are its own again."""
        kinds, patience = [ACCEPTED, REJECTED, RANDOM], [(2, 0), (0,)]
        assert largest_error(kinds, patience, 4, rule=rule, block_size=2, ahead=3) < EXACT

    def test_alone_for_a_while(self, rule: Any) -> None:
        """The first, one rejection ahead, has blocks drafted ahead: the second, never late, drafts by itself."""
        kinds, patience = [TURNING, RANDOM], [(2,), (0,)]
        assert largest_error(kinds, patience, 4, rule=rule, block_size=1, ahead=3, bonus=False) < EXACT


def sampled(rule: Any, seed: int) -> UGSDConfig:
    return UGSDConfig(always_escalate=True, rule=rule, eos_token_id=-1, block_size=2, ahead=3, seed=seed, **SAMPLING)


@both_rules
class TestDrawn:
    """The law by chi-square, through the real draws."""

    def test_batches(self, rule: Any) -> None:
        draft, verifier = pair()
        late = LateVerifier(LocalVerifier(verifier), [(0,), (1, 3), (2, 0), (4,), (1,)])
        requests = [INPUTS] * (DRAWS // 5)
        results = Decoder(draft, late, sampled(rule, seed=12)).generate(
            inputs=requests, verifier_inputs=requests, max_new_tokens=TOKENS, max_batch_size=128
        )
        check(torch.tensor([result.tokens for result in results]), law(verifier.table, SAMPLING))
        assert sum(result.metrics.wasted_drafts for result in results) > DRAWS // 10

    def test_single_requests(self, rule: Any) -> None:
        draft, verifier = pair()
        tokens = []
        for seed in range(1_000):
            late = LateVerifier(LocalVerifier(verifier), [(seed % 3, 2)])
            result = Decoder(draft, late, sampled(rule, seed=seed)).generate(
                inputs=INPUTS, verifier_inputs=INPUTS, max_new_tokens=TOKENS
            )
            tokens.append(result.tokens)
        check(torch.tensor(tokens), law(verifier.table, SAMPLING))
