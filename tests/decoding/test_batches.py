"""Several requests at once: each as if it were alone, in forwards that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.decoding.test_decoder import NEVER_ENDS, counted_forwards, greedy
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.request import Given
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.errors import VerifierUnavailable

LoadModel = Callable[..., AudioLM]
Clips = list[tuple[np.ndarray, int]]
TOKENS = 32


@pytest.fixture(scope="module")
def clips_of_speech() -> Clips:
    """Sounds of different content and, where a processor does not pad, of different length."""
    made = []
    for index in range(5):
        rng = np.random.default_rng(index)
        time = np.arange(8000 + 4000 * index) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * (150 + 60 * index) * time * (1 + 0.2 * np.sin(5 * time)))
        made.append(((tone + rng.normal(0, 0.05, len(time))).astype(np.float32), 16_000))
    return made


@pytest.mark.parametrize("drafter", [{"noise": 0.0}, {"noise": 0.05}, {"seed": 7}], ids=["copy", "noisy", "random"])
@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni"])
def test_lossless_greedy_is_each_clips_own_generate(
    family: str, drafter: dict[str, Any], audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    draft, verifier = audio_lm(family, **drafter), audio_lm(family)
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=NEVER_ENDS)
    results = Decoder(draft, LocalVerifier(verifier), config).generate(clips_of_speech, max_new_tokens=TOKENS)
    assert [result.tokens for result in results] == [greedy(verifier, clip, TOKENS) for clip in clips_of_speech]


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "rank", "rank": 3},
        {"rule": "typical", "bonus": True, "adaptive": "aimd", "max_block": 7},
        {"rule": "relaxed", "adaptive": "entropy", "max_block": 9, "min_block": 2},
    ],
    ids=["rank", "typical aimd", "relaxed entropy"],
)
@pytest.mark.parametrize("room", [2, 5])
def test_each_request_of_a_gated_batch_goes_its_own_way(
    settings: dict[str, Any], room: int, audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    draft, verifier = audio_lm("qwen2_5_omni", seed=7), audio_lm("qwen3_omni")
    edge = Decoder(draft, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(clips_of_speech, max_new_tokens=TOKENS)
    end = edge[2].tokens[11]  # ends some captions early
    threshold = float(np.median([block.uncertainty for result in edge for block in result.trace.blocks]))
    config = UGSDConfig(entropy_threshold=threshold, eos_token_id=end, **settings)
    decoder = Decoder(draft, LocalVerifier(verifier), config)
    alone = [decoder.generate(clip, max_new_tokens=TOKENS) for clip in clips_of_speech]
    together = decoder.generate(clips_of_speech, max_new_tokens=TOKENS, max_batch_size=room)
    assert len({len(result.tokens) for result in alone}) > 1
    assert sum(block.escalated for result in alone for block in result.trace.blocks) > 0
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        assert one.text == other.text
        for ours, theirs in zip(one.trace.blocks, other.trace.blocks, strict=True):
            assert (ours.draft_tokens, ours.escalated, ours.num_accepted, ours.emitted) == (
                theirs.draft_tokens,
                theirs.escalated,
                theirs.num_accepted,
                theirs.emitted,
            )
            np.testing.assert_allclose(ours.entropy, theirs.entropy, rtol=0, atol=1e-4)
        assert one.metrics.verifier_forwards == other.metrics.verifier_forwards
        assert one.metrics.drafter_forwards == other.metrics.drafter_forwards


def test_requests_share_their_forwards(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=NEVER_ENDS)
    with counted_forwards(draft=draft, verifier=verifier) as counts:
        results = Decoder(draft, LocalVerifier(verifier), config).generate(clips_of_speech[:4], max_new_tokens=TOKENS)
    rounds = [len(result.trace.blocks) for result in results]
    longest = max(sum(len(block.draft_tokens) for block in result.trace.blocks) for result in results)
    assert counts["verifier"] == max(rounds)
    assert longest <= counts["draft"] <= max(rounds) * config.block_size
    assert counts["verifier_audio"] == counts["draft_audio"] == 1  # clips of one shape are heard together


def test_sampled_rows_are_independent_and_repeatable(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    model = audio_lm("qwen2_audio")
    for rule in ("exact", "block"):
        config = UGSDConfig(always_escalate=True, rule=rule, temperature=0.9, seed=2, eos_token_id=NEVER_ENDS)
        decoder = Decoder(model, LocalVerifier(model), config)
        same = [clips_of_speech[0]] * 3
        first, again = (decoder.generate(same, max_new_tokens=16) for _ in range(2))
        assert [result.tokens for result in first] == [result.tokens for result in again]
        assert len({tuple(result.tokens) for result in first}) == 3
        assert all(result.metrics.acceptance_rate == 1.0 for result in first)


class HostReads(TorchFunctionMode):
    """Counts what brings a tensor's values to the host, or host values to a device so that the host waits for it."""

    names = frozenset({"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = func is torch.tensor and bool(kwargs and kwargs.get("device"))
        self.count += waits or getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "graph"), [(1, False), (4, False), (1, True)], ids=["1", "4", "graph"])
def test_one_host_read_a_block_and_one_more_where_a_gate_asks(
    rows: int, graph: bool, audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    """Whatever the number of rows; counted between blocks, as prompts are checked on the host. See test_deferred.py."""
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    free = UGSDConfig(eos_token_id=NEVER_ENDS, graph=graph)
    edge = Decoder(draft, None, free)
    checked = Decoder(draft, LocalVerifier(verifier), replace(free, always_escalate=True))
    gated = Decoder(draft, LocalVerifier(verifier), replace(free, entropy_threshold=0.0))
    for decoder, reads_a_block in ((edge, 1), (checked, 1), (gated, 2)):
        given = [Given(clip, max_new_tokens=TOKENS, row=row) for row, clip in enumerate(clips_of_speech[:rows])]
        requests = [decoder._open(one) for one in given]
        with HostReads() as reads:
            seen = []
            for row, _ in decoder._run(requests, iter(()), rows):
                if row == 0:
                    seen.append(reads.count)
        assert set(np.diff(seen)) == {reads_a_block}


class Reading(LocalVerifier):
    """Wants to know blocks before it judges them."""

    reads_blocks = False


class ReadingInVain(LocalVerifier):
    """Has read a block when it fails, and is asked again."""

    calls = 0

    def verify_batch(self, calls: Any) -> Any:
        self.calls += 1
        if self.calls % 2 and all(call.block.token_ids for call in calls):
            return [VerifierUnavailable("scripted")] * len(calls)
        return super().verify_batch(calls)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "greedy"},
        {"rule": "exact", "temperature": 1.0},
        {"rule": "block", "temperature": 0.7, "top_k": 20},
        {"rule": "rank", "bonus": True},
        {"rule": "typical", "adaptive": "aimd"},
    ],
)
def test_blocks_read_with_their_verdicts_are_those_read_before(
    settings: dict[str, Any], audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    """Requests that end within a block among them."""
    draft, model = audio_lm("qwen2_audio", noise=0.03), audio_lm("qwen2_audio")
    free = UGSDConfig(always_escalate=True, eos_token_id=NEVER_ENDS, **settings)
    endless = Decoder(draft, LocalVerifier(model), free).generate(clips_of_speech[:4], max_new_tokens=24)
    late = [max(set(result.tokens), key=result.tokens.index) for result in endless]
    config = replace(free, eos_token_id=late[:3], on_verifier_failure="wait")
    runs = [
        Decoder(draft, verifier, config).generate(clips_of_speech[:4], max_new_tokens=24)
        for verifier in (LocalVerifier(model), Reading(model), ReadingInVain(model))
    ]
    assert len({len(result.tokens) for result in runs[0]}) > 1
    timeless = {"draft_seconds": 0.0, "verify_seconds": 0.0}
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert one.tokens == other.tokens
            traces = zip(one.trace.blocks, other.trace.blocks, strict=True)
            assert all(replace(block, **timeless) == replace(same, **timeless) for block, same in traces)


def test_a_verifier_that_fails_some_of_a_batch(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    draft, model = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")

    class Flaky(LocalVerifier):
        calls = 0

        def verify_batch(self, calls: Any) -> Any:
            self.calls += 1
            if self.calls % 2:
                return super().verify_batch(calls)
            failed = VerifierUnavailable("scripted")
            rest = super().verify_batch(calls[1:]) if len(calls) > 1 else []
            return [failed, *rest]

    settings: dict[str, Any] = {"always_escalate": True, "rule": "greedy", "eos_token_id": NEVER_ENDS}
    waited = Decoder(draft, Flaky(model), UGSDConfig(on_verifier_failure="wait", **settings))
    own = [greedy(model, clip, 16) for clip in clips_of_speech[:3]]
    assert [result.tokens for result in waited.generate(clips_of_speech[:3], max_new_tokens=16)] == own
    accepted = Decoder(draft, Flaky(model), UGSDConfig(on_verifier_failure="accept", **settings))
    first, *others = accepted.generate(clips_of_speech[:3], max_new_tokens=16)
    assert not all(block.verified for block in first.trace.blocks)
    assert [result.tokens for result in others] == own[1:]
    raising = Decoder(draft, Flaky(model), UGSDConfig(on_verifier_failure="raise", **settings))
    with pytest.raises(VerifierUnavailable, match="scripted"):
        raising.generate(clips_of_speech[:3], max_new_tokens=16)


def test_verify_batch_is_verify_of_each(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    model = audio_lm("qwen2_audio")
    verifier, drafter = LocalVerifier(model), Decoder(audio_lm("qwen2_audio", noise=0.05), None)
    config = UGSDConfig(rule="greedy", always_escalate=True)
    requests = [drafter._open(Given(clip, max_new_tokens=TOKENS)) for clip in clips_of_speech[:3]]
    for bonus in (True, False, True):
        blocks = [request.drafter.draft(2 + row) for row, request in enumerate(requests)]  # type: ignore[union-attr]
        committed: list[list[int]] = [[], [5, 6], [7]]
        single, packed = (
            [
                VerifyCall(verifier.open(config, audio=clip), new, block, bonus)
                for clip, new, block in zip(clips_of_speech, committed, blocks, strict=False)
            ]
            for _ in range(2)
        )
        one = [call.session.verify(call.committed, call.block, bonus=bonus) for call in single]
        assert verifier.verify_batch(packed) == one
        again = [call._replace(committed=[]) for call in packed]
        assert verifier.verify_batch(again) == [call.session.verify([], call.block, bonus=bonus) for call in single]
        for request, block in zip(requests, blocks, strict=True):
            request.drafter.commit(len(block), -1)  # type: ignore[union-attr]


def test_lists_of_different_length_are_refused(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    model = audio_lm("qwen2_audio")
    decoder = Decoder(model, LocalVerifier(model))
    inputs = [model.prepare(clip) for clip in clips_of_speech[:2]]
    with pytest.raises(ValueError, match="prompt is a list of 3, expected 2"):
        decoder.generate(clips_of_speech[:2], prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="verifier_inputs is a list of 1, expected 2"):
        decoder.generate(inputs=inputs, verifier_inputs=inputs[:1])
    with pytest.raises(ValueError, match="verifier_inputs is a dict, expected a list of 2"):
        decoder.generate(inputs=inputs, verifier_inputs=inputs[0])
    with pytest.raises(ValueError, match="prompt is a list of 1, expected one input's"):
        decoder.generate(clips_of_speech[0], prompt=["a"])
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        decoder.generate(clips_of_speech, max_batch_size=0)
    assert decoder.generate([]) == []
    prompts = decoder.generate(clips_of_speech[:2], prompt=["Who speaks?", "How loud is it?"], max_new_tokens=8)
    alone = decoder.generate(clips_of_speech[1], prompt="How loud is it?", max_new_tokens=8)
    assert prompts[1].tokens == alone.tokens
