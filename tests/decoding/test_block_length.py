"""Adaptive block lengths: what each policy does with what it is told, and that lossless stays lossless."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.decoding.test_decoder import NEVER_ENDS, greedy
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.block_length import BestRate, Costs, block_length
from ugsd_fast.decoding.trace import BlockRecord

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]


def block(
    drafted: int,
    accepted: int,
    *,
    escalated: bool = True,
    entropy: Sequence[float] = (0.1,) * 24,
    draft: float = 0.01,
    verify: float = 0.1,
) -> BlockRecord:
    """A record of a block that took `draft` seconds a token and `verify` seconds to verify."""
    tokens = tuple(range(drafted))
    return BlockRecord(
        start=1,
        draft_tokens=tokens,
        entropy=tuple(entropy[:drafted]),
        uncertainty=max(entropy[:drafted]),
        escalated=escalated,
        num_accepted=accepted,
        emitted=tokens[:accepted] + (0,) * escalated,
        draft_seconds=draft * drafted,
        verify_seconds=verify if escalated else 0.0,
        verified=True,
    )


def test_fixed_stays() -> None:
    policy = block_length(UGSDConfig(block_size=4))
    for accepted in (4, 0, 2):
        policy.observe(block(4, accepted))
        assert policy.next() == 4


def test_aimd_grows_by_one_and_halves_within_its_bounds() -> None:
    policy = block_length(UGSDConfig(block_size=5, adaptive="aimd", min_block=2, max_block=7))
    lengths = [policy.next()]
    for accepted in ("all", "all", "all", "some", "some", "some", "all"):
        length = policy.next()
        policy.observe(block(length, length if accepted == "all" else length - 1))
        lengths.append(policy.next())
    assert lengths == [5, 6, 7, 7, 3, 2, 2, 3]
    policy.observe(block(3, 3, escalated=False))
    assert policy.next() == 3  # nobody judged it


class Clock:
    """Stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drafted(policy: Any, entropies: Sequence[float], seconds: float = 0.01) -> int:
    """Length of the block that a drafter with these entropies makes, at `seconds` a token."""
    longest = policy.next()
    for length in range(1, longest):
        if policy.stops is not None and policy.stops(entropies[:length], seconds):
            return length
    return int(longest)


def observe(policy: Any, record: BlockRecord) -> None:
    """Have a `BestRate` see a block whose seconds pass on its clock."""
    policy._clock.now += record.draft_seconds + record.verify_seconds
    policy.observe(record)


def best_rate(config: UGSDConfig, costs: Costs | None = None, *, watches: bool = True) -> BestRate:
    """The ``cost`` policy with a clock of the test's."""
    return BestRate(config, costs or Costs(), watches=watches, clock=Clock())


def cost_after(
    *, accepted: float, draft: float, verify: float, always: bool = True, uncertain: float = 0.0, watches: bool = True
) -> int:
    """Length that ``cost`` settles on for given rates and seconds, of a block without an uncertain token."""
    config = UGSDConfig(adaptive="cost", always_escalate=always, rule="greedy", max_block=24, entropy_threshold=1.0)
    policy = best_rate(config, watches=watches)
    rng = np.random.default_rng(0)
    for _ in range(200):
        entropies = np.where(rng.random(24) < uncertain, 2.0, 0.1).tolist()
        length = drafted(policy, entropies, draft)
        fails = np.flatnonzero(rng.random(length) >= accepted)
        escalated = always or max(entropies[:length]) > 1.0
        kept = int(fails[0]) if len(fails) and escalated else length
        observe(policy, block(length, kept, escalated=escalated, entropy=entropies, draft=draft, verify=verify))
    return drafted(policy, [0.1] * 24, draft)


def best_length(accept: float, draft: float, verify: float) -> int:
    """By the definition: expected tokens a second of a block that is always verified."""

    def rate(length: int) -> float:
        emitted = sum(accept**i for i in range(1, length + 1)) + 1
        return emitted / (length * draft + verify)

    return max(range(1, 25), key=rate)


@pytest.mark.parametrize("watches", [True, False])
@pytest.mark.parametrize(("accept", "draft", "verify"), [(0.8, 0.01, 0.1), (0.5, 0.01, 0.02), (0.95, 0.005, 0.3)])
def test_cost_finds_the_best_rate(accept: float, draft: float, verify: float, watches: bool) -> None:
    found = cost_after(accepted=accept, draft=draft, verify=verify, watches=watches)
    best = best_length(accept, draft, verify)
    assert abs(found - best) <= max(2, 0.25 * best)


def test_cost_drafts_longer_over_a_slow_network_and_shorter_when_rejected() -> None:
    near, far = (cost_after(accepted=0.85, draft=0.01, verify=seconds) for seconds in (0.02, 0.4))
    assert near < far
    assert cost_after(accepted=0.3, draft=0.01, verify=0.1) < cost_after(accepted=0.9, draft=0.01, verify=0.1)


def test_cost_ends_a_block_behind_tokens_that_are_seldom_accepted() -> None:
    policy = best_rate(UGSDConfig(adaptive="cost", always_escalate=True, rule="greedy", max_block=24))
    certain, doubted = [0.1] * 24, [0.1, 0.1, 2.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    for _ in range(50):
        drafted(policy, certain)
        observe(policy, block(8, 8, entropy=certain))
        observe(policy, block(8, 2, entropy=doubted))
    assert drafted(policy, [0.1] * 24) > 8
    assert drafted(policy, [0.1] * 5 + [2.5] + [0.1] * 18) == 6
    policy.stops([0.1, 0.1], 60.0)  # a hiccup
    assert drafted(policy, [0.1] * 24) > 8


@pytest.mark.parametrize(("ahead", "verify", "length"), [(0, 0.02, 3), (0, 1.0, 24), (8, 1.0, 3)])
def test_cost_behind_a_gate_ends_at_an_uncertain_token_unless_verdicts_are_dear(
    ahead: int, verify: float, length: int
) -> None:
    policy = best_rate(UGSDConfig(adaptive="cost", rule="greedy", max_block=24, entropy_threshold=1.0, ahead=ahead))
    uncertain = [0.1, 0.1, 2.5] + [0.1] * 21
    for _ in range(50):
        drafted(policy, uncertain)
        observe(policy, block(8, 8, entropy=uncertain, verify=verify))
        observe(policy, block(8, 2, entropy=uncertain, verify=verify))
    assert drafted(policy, [0.1] * 24) == 24  # nobody is asked, so the length costs nothing
    assert drafted(policy, uncertain) == length


def test_what_one_request_teaches_serves_the_next() -> None:
    config = UGSDConfig(adaptive="cost", always_escalate=True, rule="greedy", max_block=24)
    costs = Costs()
    first = best_rate(config, costs)
    for _ in range(2):
        assert drafted(first, [0.1] * 24) == config.block_size  # not everything was timed
        observe(first, block(5, 5))
    assert best_rate(config, costs).next() == 24
    assert best_rate(config).next() == config.block_size


@pytest.mark.parametrize("watches", [True, False])
def test_a_prompts_time_is_not_taken_for_a_tokens(watches: bool) -> None:
    costs = Costs()
    for _ in range(3):
        policy = best_rate(UGSDConfig(adaptive="cost", always_escalate=True, rule="greedy"), costs, watches=watches)
        observe(policy, replace(block(5, 5, draft=9.0, verify=9.0), start=0))
        drafted(policy, [0.1] * 24)
        observe(policy, block(5, 5, draft=0.01, verify=0.1))
    assert costs.tokens_per_second == pytest.approx(6 / 0.15)
    assert (costs.draft_seconds, costs.verify_seconds) == pytest.approx((0.01, 0.1))


@pytest.mark.parametrize("adaptive", ["entropy", "aimd", "cost"])
@pytest.mark.parametrize("drafter", [{"noise": 0.05}, {"seed": 7}], ids=["noisy", "random"])
def test_lossless_greedy_stays_the_verifiers_own(
    adaptive: Any, drafter: dict[str, Any], audio_lm: LoadModel, speech: Speech
) -> None:
    draft, verifier = audio_lm("qwen2_audio", **drafter), audio_lm("qwen2_audio")
    config = UGSDConfig(
        adaptive=adaptive,
        max_block=9,
        always_escalate=True,
        rule="greedy",
        eos_token_id=NEVER_ENDS,
        entropy_threshold=3.0,
    )
    result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=40)
    assert result.tokens == greedy(verifier, speech, 40)
    lengths = {len(record.draft_tokens) for record in result.trace.blocks}
    assert max(lengths) <= 9


@pytest.mark.parametrize("graph", [False, True], ids=["drafter", "graph"])
def test_entropy_ends_a_block_at_its_first_uncertain_token(graph: bool, audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_audio", seed=7), audio_lm("qwen2_audio")
    edge = Decoder(draft, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=40)
    threshold = float(np.quantile([entropy for record in edge.trace.blocks for entropy in record.entropy], 0.7))
    config = UGSDConfig(
        adaptive="entropy", min_block=2, max_block=8, entropy_threshold=threshold, eos_token_id=NEVER_ENDS, graph=graph
    )
    result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=60)
    blocks = result.trace.blocks
    for record in blocks[:-1]:
        over = [entropy > threshold for entropy in record.entropy]
        assert not any(over[:-1]) or over == [True, over[-1]]  # which goes on to min_block
        assert any(over) or len(over) == 8
        assert record.escalated == any(over)
    assert len({len(record.draft_tokens) for record in blocks}) > 2
    if not graph:  # which drafts ahead and cuts
        assert result.metrics.drafter_forwards == sum(len(record.draft_tokens) for record in blocks)


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_block is 3, expected an integer >= min_block=4"):
        UGSDConfig(min_block=4, max_block=3)
    with pytest.raises(ValueError, match="adaptive is 'always', expected one of fixed, entropy, aimd, cost"):
        UGSDConfig(adaptive="always")  # type: ignore[arg-type]
