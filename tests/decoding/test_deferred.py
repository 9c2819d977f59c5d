"""Verdicts that are read with the next block: what comes out is what would have come out, with fewer reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, MinLengthLogitsProcessor, StoppingCriteriaList

from tests.decoding.test_batches import HostReads, clips_of_speech
from tests.decoding.test_decoder import NEVER_ENDS
from ugsd_fast import AudioLM, Decoder, LocalVerifier, ModelError, UGSDConfig
from ugsd_fast.decoding.drafter import Drafter
from ugsd_fast.errors import attempt

__all__ = ["clips_of_speech"]

LoadModel = Callable[..., AudioLM]
Clips = list[tuple[np.ndarray, int]]
TIMELESS: dict[str, Any] = {"draft_seconds": 0.0, "verify_seconds": 0.0}


@pytest.mark.parametrize("room", [1, 3, "graph"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "rank", "rank": 3},
        {"rule": "rank", "rank": 3, "bonus": True, "block_size": 1},
        {"rule": "greedy", "block_size": 3},
        {"rule": "typical", "temperature": 0.8, "seed": 3, "bonus": True},
        {"rule": "block", "temperature": 0.9, "top_k": 20},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_same_captions_as_read_at_once(
    settings: dict[str, Any], room: int | str, audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    """One at a time, in a batch of which some end early, and in a draft graph."""
    draft, model = audio_lm("qwen2_5_omni", noise=0.05), audio_lm("qwen2_5_omni")
    graph = room == "graph"
    free = UGSDConfig(entropy_threshold=0.0, eos_token_id=NEVER_ENDS, graph=graph, **settings)
    clips = clips_of_speech[: 2 if graph else room]
    before = Decoder(draft, LocalVerifier(model), free).generate(clips, max_new_tokens=40)
    doubts = sorted(block.uncertainty for result in before for block in result.trace.blocks)
    some = sum(doubts[len(doubts) // 2 :][:2]) / 2  # between two, or rounding would decide
    late = [max(set(result.tokens), key=result.tokens.index) for result in before]
    for threshold in (0.0, some):
        for ends in (NEVER_ENDS, late):
            config = replace(free, entropy_threshold=threshold, eos_token_id=ends)
            runs = [
                Decoder(draft, LocalVerifier(model), replace(config, defer_verdicts=defers)).generate(
                    clips, max_new_tokens=40
                )
                for defers in (False, True)
            ]
            for one, other in zip(*runs, strict=True):
                assert one.tokens == other.tokens
                for block, same in zip(one.trace.blocks, other.trace.blocks, strict=True):
                    np.testing.assert_allclose(block.entropy, same.entropy, rtol=0, atol=1e-4)
                    timeless = [
                        replace(record, entropy=(), uncertainty=0.0, wasted=0, **TIMELESS) for record in (block, same)
                    ]
                    assert timeless[0] == timeless[1]
                assert one.metrics.verifier_forwards == other.metrics.verifier_forwards
                assert other.metrics.drafter_forwards == one.metrics.drafter_forwards + other.trace.blocks[-1].wasted


@pytest.mark.parametrize(("rows", "graph"), [(1, False), (3, False), (1, True)], ids=["1", "3", "graph"])
def test_one_host_read_a_block(rows: int, graph: bool, audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    """But for the last blocks, whose verdicts decide whether another follows; prompts are checked on the host, too."""
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    counts = {}
    for defers in (False, True):
        config = UGSDConfig(entropy_threshold=0.0, eos_token_id=NEVER_ENDS, defer_verdicts=defers, graph=graph)
        for tokens in (30, 60):
            with HostReads() as reads:
                results = Decoder(draft, LocalVerifier(verifier), config).generate(
                    clips_of_speech[:rows], max_new_tokens=tokens
                )
            assert all(block.escalated for result in results for block in result.trace.blocks)
            counts[defers, tokens] = reads.count, max(len(result.trace.blocks) for result in results)
    more = {
        defers: tuple(after - before for after, before in zip(counts[defers, 60], counts[defers, 30], strict=True))
        for defers in (False, True)
    }
    assert more[True][1] > 4
    assert more[False][0] == 2 * more[False][1]
    assert more[True][0] == more[True][1]


def test_a_correction_that_ends_the_caption(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    """The block that was drafted behind it was in vain, and is counted so."""
    draft, verifier = audio_lm("qwen2_5_omni", noise=0.05), LocalVerifier(audio_lm("qwen2_5_omni"))
    config = UGSDConfig(entropy_threshold=0.0, rule="greedy", bonus=False, eos_token_id=NEVER_ENDS)
    ended = 0
    for clip in clips_of_speech:
        blocks = Decoder(draft, verifier, config).generate(clip, max_new_tokens=60).trace.blocks
        for index, block in enumerate(blocks[1:8], 1):
            end = block.emitted[-1]
            before = {token for other in blocks[:index] for token in (*other.draft_tokens, *other.emitted)}
            if end in before | set(block.draft_tokens) or end in block.emitted[:-1]:
                continue
            plain, late = (
                Decoder(draft, verifier, replace(config, eos_token_id=end, defer_verdicts=defers)).generate(
                    clip, max_new_tokens=60
                )
                for defers in (False, True)
            )
            assert plain.tokens == late.tokens
            assert late.tokens[-1] == end
            assert [block.wasted for block in late.trace.blocks] == [0] * index + [config.block_size]
            assert late.metrics.drafter_forwards == plain.metrics.drafter_forwards + config.block_size
            ended += 1
            break
    assert ended > 1


def spoil(calls: Iterator[int], which: int, _: Any, __: Any, logits: Tensor) -> Tensor | None:
    return torch.full_like(logits, torch.nan) if next(calls) == which else None


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("side", ["draft", "verifier"])
@pytest.mark.parametrize("call", [2, 9])
def test_logits_that_are_not_finite(
    call: int, side: str, rows: int, audio_lm: LoadModel, clips_of_speech: Clips
) -> None:
    """The same error as where verdicts are read at once, in the draft behind a pending verdict and in a verdict."""
    sides = {"draft": audio_lm("qwen2_audio", noise=0.05), "verifier": audio_lm("qwen2_audio")}
    messages = []
    for defers in (False, True):
        config = UGSDConfig(entropy_threshold=0.0, rule="greedy", eos_token_id=NEVER_ENDS, defer_verdicts=defers)
        calls = itertools.count()
        hook = sides[side].model.get_output_embeddings().register_forward_hook(partial(spoil, calls, call))
        decoder = Decoder(sides["draft"], LocalVerifier(sides["verifier"]), config)
        results = decoder.generate(clips_of_speech[:rows], max_new_tokens=64, return_exceptions=True)
        hook.remove()
        messages.append([str(result) for result in results])
        assert all(isinstance(result, ModelError) for result in results)
        assert "no finite value" in str(results[0])
    assert messages[0] == messages[1]


class Own(LocalVerifier):
    """Has a say of its own in verdicts."""

    asked = 0

    def verify_batch(self, calls: Any) -> Any:
        self.asked += 1
        return super().verify_batch(calls)


class OwnSession(LocalVerifier):
    """Its sessions are to be asked as they are."""

    asked = 0

    def open(self, config: UGSDConfig, **request: Any) -> Any:
        session = super().open(config, **request)
        verify = session.verify

        def judge(*args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return verify(*args, **kwargs)

        session.verify = judge  # type: ignore[method-assign]
        return session


def test_what_is_read_at_once(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    """On a CPU all, unless it is asked for; lengths, processors, streams and drafting ahead hang on verdicts."""
    draft, model = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    gated = UGSDConfig(entropy_threshold=0.0, eos_token_id=NEVER_ENDS)
    late = replace(gated, defer_verdicts=True)
    request: dict[str, Any] = {"max_new_tokens": 30}
    processors = LogitsProcessorList([MinLengthLogitsProcessor(1, 0)])
    stops = StoppingCriteriaList([MaxLengthCriteria(100_000)])
    with patch.object(Drafter, "commit_unread", side_effect=AssertionError):
        for config, more in (
            (gated, {}),
            (replace(late, adaptive="aimd"), {}),
            (replace(late, always_escalate=True), {}),
            (replace(late, ahead=3), {}),
            (late, {"logits_processor": processors}),
            (late, {"stopping_criteria": stops}),
            (late, {"streamer": Mock()}),
        ):
            Decoder(draft, LocalVerifier(model), config).generate(clips_of_speech[0], **request, **more)
        list(Decoder(draft, LocalVerifier(model), late).stream(clips_of_speech[0], **request))
        with pytest.raises(AssertionError):
            Decoder(draft, LocalVerifier(model), late).generate(clips_of_speech[0], **request)


def test_verifiers_with_methods_of_their_own_are_asked(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    draft, model = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    config = UGSDConfig(entropy_threshold=0.0, eos_token_id=NEVER_ENDS, defer_verdicts=True)
    for verifier, rows in ((Own(model), 2), (OwnSession(model), 1)):
        results = Decoder(draft, verifier, config).generate(clips_of_speech[:rows], max_new_tokens=30)
        assert verifier.asked == len(results[0].trace.blocks)


def test_a_device_that_fails_when_it_is_read(audio_lm: LoadModel, clips_of_speech: Clips) -> None:
    """As on a GPU, where errors of kernels come up at the next copy: it ends the rows that shared it."""
    draft, model = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    config = UGSDConfig(entropy_threshold=0.0, eos_token_id=NEVER_ENDS, defer_verdicts=True)
    decoder = Decoder(draft, LocalVerifier(model), config)
    for exceptions in (True, False):
        error = RuntimeError("CUDA error")
        with patch("ugsd_fast.decoding.decoder.read_together", side_effect=error):
            failed = attempt(decoder.generate, clips_of_speech[:2], max_new_tokens=30, return_exceptions=exceptions)
        assert failed == [error] * 2 if exceptions else failed is error
        assert getattr(error, "__notes__", []) == ["rows 1, 2 of 2, which shared a forward pass"]
