"""Drafting ahead while a block is judged: the same captions, less waiting, and what was in vain is counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from ugsd_fast import Decoder, UGSDConfig
from ugsd_fast.decoding.drafter import DraftBlock
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.errors import VerifierUnavailable
from ugsd_fast.verifier import Verdict

RULES: dict[str, dict[str, Any]] = {
    "greedy": {"rule": "greedy", "always_escalate": True},
    "rank 3": {"rule": "rank", "rank": 3, "always_escalate": True},
    "gated": {"rule": "rank", "rank": 1, "entropy_threshold": 0.6},
    "gated, bonus": {"rule": "rank", "rank": 1, "entropy_threshold": 0.6, "bonus": True},
    "entropy blocks": {"rule": "greedy", "always_escalate": True, "adaptive": "entropy", "entropy_threshold": 0.3},
    "gated entropy blocks": {"rule": "rank", "rank": 1, "adaptive": "entropy", "max_block": 8},
    "gated entropy blocks, bonus": {"rule": "rank", "rank": 1, "adaptive": "entropy", "bonus": True, "min_block": 2},
}


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load_pair(threads=1)


class Distant:
    """A verifier that answers after a while, as one behind a network does; every `failing`-th time it does not."""

    def __init__(self, verifier: Any, seconds: float, failing: int = 0):
        self._verifier, self._seconds, self._failing = verifier, seconds, failing
        self._asked = 0
        self._pool = ThreadPoolExecutor(4)
        self.tokenizer, self.max_audio_seconds = verifier.tokenizer, verifier.max_audio_seconds
        self.eos_token_ids = verifier.eos_token_ids

    def open(self, config: UGSDConfig, **request: Any) -> Any:
        session = self._verifier.open(config, **request)
        verify = session.verify

        def submit(committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Future[Verdict]:
            self._asked += 1

            def judge(fails: bool) -> Verdict:
                if not fails:
                    verdict = verify(committed, block, bonus=bonus)
                time.sleep(self._seconds)
                if fails:
                    raise VerifierUnavailable("far away")
                return verdict

            return self._pool.submit(judge, bool(self._failing) and self._asked % self._failing == 0)

        session.submit = submit
        session.verify = lambda committed, block, bonus: submit(committed, block, bonus=bonus).result()
        return session

    def decode(self, tokens: Sequence[int]) -> str:
        return self._verifier.decode(tokens)


@pytest.mark.parametrize("ahead", [1, 6, 20])
@pytest.mark.parametrize("rule", RULES)
def test_captions_do_not_depend_on_it(rule: str, ahead: int, pair: EmbeddedPair) -> None:
    config = replace(pair.config, **RULES[rule])
    wasted = used = 0
    for clip in clips()[:3]:
        request = {"prompt": pair.prompt, "max_new_tokens": 40}
        plain = Decoder(pair.draft, pair.verifier, config).generate(clip.path, **request)
        distant = Distant(pair.verifier, 0.006)
        result = Decoder(pair.draft, distant, replace(config, ahead=ahead)).generate(clip.path, **request)
        assert result.tokens == plain.tokens
        assert [b.draft_tokens for b in result.trace.blocks] == [b.draft_tokens for b in plain.trace.blocks]
        assert [b.escalated for b in result.trace.blocks] == [b.escalated for b in plain.trace.blocks]
        for ours, theirs in zip(result.trace.blocks, plain.trace.blocks, strict=False):
            assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-4)
        assert result.metrics.wasted_drafts == sum(block.wasted for block in result.trace.blocks)
        assert result.metrics.drafter_forwards >= plain.metrics.drafter_forwards
        wasted += result.metrics.wasted_drafts
        used += result.metrics.drafter_forwards == plain.metrics.drafter_forwards + result.metrics.wasted_drafts
    assert wasted > 0 or rule.startswith("rank")
    assert used or config.appends_bonus  # a token that was guessed rightly was drafted, and is in no block


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_sampled_captions_do_not_depend_on_when_verdicts_come(rule: Any, pair: EmbeddedPair) -> None:
    config = replace(pair.config, rule=rule, always_escalate=True, temperature=0.8, seed=3, ahead=8)
    captions = [
        Decoder(pair.draft, Distant(pair.verifier, seconds), config)
        .generate(clips()[2].path, prompt=pair.prompt, max_new_tokens=40)
        .tokens
        for seconds in (0.0, 0.003, 0.02)
    ]
    assert captions[0] == captions[1] == captions[2]


def test_batches_and_failing_verifiers(pair: EmbeddedPair) -> None:
    config = replace(pair.config, rule="greedy", always_escalate=True, on_verifier_failure="wait", ahead=6)
    sources = [clip.path for clip in clips()[:3]]
    results = Decoder(pair.draft, Distant(pair.verifier, 0.005, failing=4), config).generate(
        sources, prompt=pair.prompt, max_new_tokens=30
    )
    for source, result in zip(sources, results, strict=True):
        plain = Decoder(pair.draft, pair.verifier, config).generate(source, prompt=pair.prompt, max_new_tokens=30)
        assert result.tokens == plain.tokens
    lost = Decoder(pair.draft, Distant(pair.verifier, 0.005, failing=1), replace(config, on_verifier_failure="accept"))
    edge = Decoder(pair.draft, None, config).generate(sources[0], prompt=pair.prompt, max_new_tokens=30)
    assert lost.generate(sources[0], prompt=pair.prompt, max_new_tokens=30).tokens == edge.tokens


def test_it_hides_the_way(pair: EmbeddedPair) -> None:
    """A drafter of 4 ms a token and a verifier 20 ms away: most blocks come at the drafter's pace."""
    request = {"prompt": pair.prompt, "max_new_tokens": 40}

    def latency(ahead: int) -> float:
        config = replace(pair.config, rule="rank", rank=5, always_escalate=True, ahead=ahead)
        decoder = Decoder(pair.draft, Distant(pair.verifier, 0.02), config)
        return min(decoder.generate(clips()[0].path, **request).metrics.latency for _ in range(3))

    forward = pair.draft.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.004)
        return forward(*args, **kwargs)

    pair.draft.model.forward = slow
    try:
        assert latency(6) < 0.8 * latency(0)
    finally:
        pair.draft.model.forward = forward


def test_settings() -> None:
    with pytest.raises(ValueError, match="ahead is -1, expected an integer >= 0"):
        UGSDConfig(ahead=-1)
    with pytest.raises(ValueError, match="ahead=3 with graph=True"):
        UGSDConfig(ahead=3, graph=True)
