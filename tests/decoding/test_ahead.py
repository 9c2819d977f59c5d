"""Drafting ahead while a block is judged: the same captions, less waiting, and what was in vain is counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from ugsd_fast import Decoder, UGSDConfig
from ugsd_fast.decoding.ahead import AheadDrafter as Drafter
from ugsd_fast.decoding.ahead import draft_ahead
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.decoding.drafter import draft_blocks
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.errors import ModelError, VerifierUnavailable
from ugsd_fast.models.sequence import CachedSequence
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

AHEAD: dict[str, Any] = {"adaptive": "entropy", "max_block": 5, "ahead": 6}


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load_pair(threads=1)


class Distant:
    """A verifier that answers after a while, as one behind a network does; every `failing`-th time it does not."""

    def __init__(self, verifier: Any, seconds: float, failing: int = 0):
        self._verifier, self._seconds, self._failing = verifier, seconds, failing
        self._asked = 0
        self._pool = ThreadPoolExecutor(4)
        self.waiting = 0
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

            self.waiting += 1
            future = self._pool.submit(judge, bool(self._failing) and self._asked % self._failing == 0)
            future.add_done_callback(self._answered)
            return future

        session.submit = submit
        session.verify = lambda committed, block, bonus: submit(committed, block, bonus=bonus).result()
        return session

    def _answered(self, _: Any) -> None:
        self.waiting -= 1

    def decode(self, tokens: Sequence[int]) -> str:
        return self._verifier.decode(tokens)


@pytest.mark.parametrize(("ahead", "branches"), [(1, 1), (6, 1), (6, 3), (20, 8)])
@pytest.mark.parametrize("rule", RULES)
def test_captions_do_not_depend_on_it(rule: str, ahead: int, branches: int, pair: EmbeddedPair) -> None:
    config = replace(pair.config, **RULES[rule])
    wasted = used = 0
    for clip in clips()[:3]:
        request = {"prompt": pair.prompt, "max_new_tokens": 40}
        plain = Decoder(pair.draft, pair.verifier, config).generate(clip.path, **request)
        distant = Distant(pair.verifier, 0.006)
        settings = replace(config, ahead=ahead, branches=branches)
        result = Decoder(pair.draft, distant, settings).generate(clip.path, **request)
        assert result.tokens == plain.tokens
        assert [b.draft_tokens for b in result.trace.blocks] == [b.draft_tokens for b in plain.trace.blocks]
        assert [b.escalated for b in result.trace.blocks] == [b.escalated for b in plain.trace.blocks]
        for ours, theirs in zip(result.trace.blocks, plain.trace.blocks, strict=False):
            assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-4)
        assert result.metrics.wasted_drafts == sum(block.wasted for block in result.trace.blocks)
        if branches == 1:  # forks draft in the same forwards what would else be drafted behind a correction
            assert result.metrics.drafter_forwards >= plain.metrics.drafter_forwards
        wasted += result.metrics.wasted_drafts
        used += result.metrics.drafter_forwards == plain.metrics.drafter_forwards + result.metrics.wasted_drafts
    assert wasted > 0 or rule.startswith("rank")
    # A token that was guessed rightly was drafted, and is in no block.
    assert used or config.appends_bonus or branches > 1


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


def drafters_of(pair: EmbeddedPair, count: int, **settings: Any) -> list[Drafter]:
    config = replace(pair.config, ahead=8, **settings)
    inputs = [pair.draft.prepare(clip.path, pair.prompt) for clip in clips()[:count]]
    options: dict[str, Any] = {"eos_token_ids": frozenset(), "vocab_size": pair.draft.vocab_size}
    return [Drafter(pair.draft.open(one), config, device=pair.draft.device, **options) for one in inputs]


def test_no_draw_is_used_again_behind_a_rejection(pair: EmbeddedPair) -> None:
    (drafter,) = drafters_of(pair, 1, rule="block", always_escalate=True, temperature=1.0)
    used = 0
    for accepted in (5, 2, 4, 0, 5):
        block = drafter.draft(5)
        draft_ahead([drafter])  # whether there was time for it or not
        used = max(used, drafter.draws)
        drafter.commit(accepted, (block.token_ids[0] + 1) % drafter.last_token)
        assert accepted == len(block) or drafter.draws >= used


def test_requests_that_share_draws_never_repeat_them(pair: EmbeddedPair) -> None:
    drafters = drafters_of(pair, 2, rule="exact", always_escalate=True, temperature=1.0)
    used = 0
    for accepted in ((5, 1), (3, 5), (0, 0), (5, 5)):
        assert max(drafter.draws for drafter in drafters) >= used
        draft_blocks(drafters, [5, 5])
        used = max(drafter.draws for drafter in drafters)
        for drafter, count in zip(drafters, accepted, strict=True):
            drafter.commit(count, 7)
            assert drafter.draws >= used  # also alone, once the other has ended


def test_without_room_nothing_is_drafted_ahead_and_blocks_are_shorter(
    pair: EmbeddedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (drafter,) = drafters_of(pair, 1, adaptive="entropy", entropy_threshold=float("inf"), max_block=8)

    def check_room(count: int) -> None:
        if drafter.sequence.length + count > limit:
            raise ModelError("full")

    assert len(drafter.draft(6)) == 6
    limit = drafter.sequence.length + 4
    monkeypatch.setattr(drafter.sequence, "check_room", check_room)
    while drafter in drafter.lines(20):
        draft_ahead([drafter])
    assert drafter.sequence.length == limit
    ahead = len(drafter.buffer)
    drafter.commit(6, -1)
    assert len(drafter.draft(8)) == ahead
    drafter.commit(ahead, 7)
    with pytest.raises(ModelError, match="full"):
        drafter.draft(8)


def test_a_block_that_may_end_early_is_cut_to_what_has_room(pair: EmbeddedPair) -> None:
    for adaptive, fits in (("entropy", 4), ("fixed", 8)):
        (drafter,) = drafters_of(pair, 1, adaptive=adaptive, block_size=8, max_block=8)
        length = drafter.sequence.length

        def check_room(count: int, most: int = length + 3) -> None:
            if count > most:
                raise ModelError("full")

        drafter.sequence.check_room = check_room  # type: ignore[method-assign]
        assert drafter.fitting(8) == fits
        assert drafter.fitting(3) == 3


def test_batches_and_failing_verifiers(pair: EmbeddedPair) -> None:
    config = replace(pair.config, rule="greedy", always_escalate=True, on_verifier_failure="wait", ahead=6, branches=2)
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
    """Most of the drafter's forwards run while a verdict is on its way, and nobody waits for them."""
    alone: dict[int, int] = {}
    for ahead in (0, 6):
        distant = Distant(pair.verifier, 0.05)
        passes: list[bool] = []
        hook = pair.draft.model.register_forward_hook(lambda *_, of=distant, to=passes: to.append(not of.waiting))
        config = replace(pair.config, rule="rank", rank=5, always_escalate=True, ahead=ahead)
        Decoder(pair.draft, distant, config).generate(clips()[0].path, prompt=pair.prompt, max_new_tokens=40)
        hook.remove()
        alone[ahead] = sum(passes)
    assert alone[6] < 0.5 * alone[0]


class TestBranches:
    """Drafting on behind the drafter's other best tokens, too: a correction that is one of them costs nothing."""

    @staticmethod
    def caption(pair: EmbeddedPair, branches: int, clip: int = 0, **changes: Any) -> tuple[int, Any]:
        """Forward passes of the drafter that nothing waited for meanwhile, and the result; verdicts come very late."""
        passes = 0
        distant = Distant(pair.verifier, 0.05)

        def count(*_: Any) -> None:
            nonlocal passes
            passes += not distant.waiting

        settings = replace(pair.config, **{**AHEAD, **changes}, branches=branches)
        hook = pair.draft.model.register_forward_hook(count)
        try:
            result = Decoder(pair.draft, distant, settings).generate(
                clips()[clip].path, prompt=pair.prompt, max_new_tokens=40
            )
        finally:
            hook.remove()
        return passes, result

    def test_a_correction_that_is_a_runner_up_is_drafted_behind_already(self, pair: EmbeddedPair) -> None:
        saved = 0
        for clip in (0, 1, 5):
            plain, one = self.caption(pair, 1, clip)
            shared, four = self.caption(pair, 4, clip)
            assert four.tokens == one.tokens
            assert four.metrics.wasted_drafts > one.metrics.wasted_drafts
            assert shared <= plain
            saved += plain - shared
        assert saved >= 12  # six tokens a correction

    def test_a_token_in_the_middle_of_a_block_is_taken_back_with_what_follows(self, pair: EmbeddedPair) -> None:
        changes = {"adaptive": "fixed", "block_size": 8, "rule": "greedy", "always_escalate": True}
        plain, one = self.caption(pair, 1, **changes)
        shared, three = self.caption(pair, 3, **changes)
        assert three.tokens == one.tokens
        assert shared < plain

    def test_batches(self, pair: EmbeddedPair) -> None:
        settings = replace(pair.config, **AHEAD, branches=3)
        sources = [clip.path for clip in clips()[:5]]
        request = {"prompt": pair.prompt, "max_new_tokens": 40}
        results = Decoder(pair.draft, Distant(pair.verifier, 0.02), settings).generate(sources, **request)
        for source, result in zip(sources, results, strict=True):
            alone = Decoder(pair.draft, pair.verifier, settings).generate(source, **request)
            assert result.tokens == alone.tokens

    def test_a_fork_that_cannot_go_on_is_no_error(self, pair: EmbeddedPair, monkeypatch: pytest.MonkeyPatch) -> None:
        fork = CachedSequence.fork

        def full(self: CachedSequence) -> CachedSequence:
            def check_room(count: int) -> None:
                raise ModelError("no room")

            forked = fork(self)
            forked.check_room = check_room  # type: ignore[method-assign]
            return forked

        plain, one = self.caption(pair, 1)
        monkeypatch.setattr(CachedSequence, "fork", full)
        passes, result = self.caption(pair, 4)
        assert (passes, result.tokens) == (plain, one.tokens)
        assert result.metrics.wasted_drafts == one.metrics.wasted_drafts

    def test_a_cache_that_takes_a_forward_of_its_own_has_none(self, pair: EmbeddedPair) -> None:
        from transformers import DynamicCache

        drafter = Drafter(
            pair.draft.open(pair.draft.prepare(clips()[0].path, pair.prompt)),
            replace(pair.config, ahead=6, branches=3),
            eos_token_ids=frozenset({1}),
            vocab_size=pair.draft.vocab_size,
            device=pair.draft.device,
        )
        block = drafter.draft(5)
        assert len(drafter.lines(6, block)) == 3
        drafter.commit(5, -1)
        block = drafter.draft(5)
        vars(drafter.sequence).pop("_packs", None)
        drafter.sequence.cache = DynamicCache()
        assert drafter.lines(6, block) == [drafter]


def test_settings() -> None:
    with pytest.raises(ValueError, match="branches is 0, expected an integer >= 1"):
        UGSDConfig(branches=0)
    with pytest.raises(ValueError, match="branches=2 with ahead=0"):
        UGSDConfig(branches=2)
    with pytest.raises(ValueError, match=r"temperature=0.5, expected ahead >= 1 and temperature 0"):
        UGSDConfig(branches=2, ahead=4, temperature=0.5)
    with pytest.raises(ValueError, match="ahead is -1, expected an integer >= 0"):
        UGSDConfig(ahead=-1)
    with pytest.raises(ValueError, match="ahead=3 with graph=True"):
        UGSDConfig(ahead=3, graph=True)
