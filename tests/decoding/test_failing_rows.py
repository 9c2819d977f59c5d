"""One bad request of several: the error names it, the others lose nothing, and nothing stays open."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.decoding.test_ahead import Distant
from tests.decoding.test_decoder import NEVER_ENDS
from tests.decoding.test_edges import head
from tests.decoding.test_translation import Writer, open_drafter
from tests.models import tiny
from ugsd_fast import AudioError, AudioLM, Decoder, LocalVerifier, ModelError, UGSDConfig
from ugsd_fast.decoding.config import OnVerifierFailure
from ugsd_fast.decoding.translation import draft_translated
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.errors import VerifierRefused, VerifierUnavailable, attempt
from ugsd_fast.verifier import Verdict
from ugsd_fast.verifier.local import LocalSession

LoadModel = Callable[..., AudioLM]
TOKENS = 16
LOSSLESS: dict[str, Any] = {"always_escalate": True, "rule": "greedy", "eos_token_id": NEVER_ENDS}


class Watched(LocalVerifier):
    """Counts the sessions that are open; those of the rows in `refuses` answer with an error."""

    def __init__(self, model: AudioLM, refuses: dict[int, Exception] | None = None):
        super().__init__(model)
        self.sessions: list[LocalSession] = []
        self.open_sessions = 0
        self._refuses = refuses or {}

    def open(self, config: UGSDConfig, **request: Any) -> LocalSession:
        session = super().open(config, **request)
        verify, close = session.verify, session.close
        error = self._refuses.get(len(self.sessions))

        def judge(committed: Sequence[int], block: Any, *, bonus: bool) -> Any:
            if error is not None:
                raise error
            return verify(committed, block, bonus=bonus)

        def end() -> None:
            self.open_sessions -= 1
            close()

        session.verify, session.close = judge, end  # type: ignore[method-assign]
        self.sessions.append(session)
        self.open_sessions += 1
        return session

    def verify_batch(self, calls: Sequence[VerifyCall]) -> list[Verdict | Exception]:
        if not self._refuses:
            return super().verify_batch(calls)
        return [attempt(call.session.verify, call.committed, call.block, bonus=call.bonus) for call in calls]


@pytest.fixture(scope="module")
def clips() -> list[tuple[np.ndarray, int]]:
    return [
        (np.random.default_rng(row).normal(0, 0.1, 8000 + 2000 * row).astype(np.float32), 16_000) for row in range(5)
    ]


@pytest.fixture
def models(audio_lm: LoadModel) -> tuple[AudioLM, AudioLM]:
    return audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@pytest.mark.parametrize("room", [1, 2, 5])
def test_unreadable_clips_cost_the_others_nothing(
    room: int, models: tuple[AudioLM, AudioLM], clips: list[Any], tmp_path: Path
) -> None:
    verifier = Watched(models[1])
    decoder = Decoder(models[0], verifier, UGSDConfig(**LOSSLESS))
    own = [decoder.generate(clip, max_new_tokens=TOKENS).tokens for clip in clips]
    given: list[Any] = list(clips)
    given[0], given[3] = tmp_path / "none.wav", (np.zeros(8000, np.float32), 16_000)
    results = decoder.generate(given, max_new_tokens=TOKENS, max_batch_size=room, return_exceptions=True)
    assert [results[row].tokens for row in (1, 2, 4)] == [own[row] for row in (1, 2, 4)]
    for row, message in ((0, "no such file"), (3, "is silent")):
        assert isinstance(results[row], AudioError)
        assert message in str(results[row])
        assert notes(results[row]) == [f"row {row + 1} of 5: audio[{row}]"]
    assert verifier.open_sessions == 0
    with pytest.raises(AudioError, match="is silent") as raised:
        decoder.generate([*clips[:2], given[3]], max_new_tokens=TOKENS, max_batch_size=room)
    assert notes(raised.value) == ["row 3 of 3: audio[2]"]
    assert verifier.open_sessions == 0


def test_all_rows_may_fail_and_one_input_has_no_note(models: tuple[AudioLM, AudioLM]) -> None:
    decoder = Decoder(models[0], LocalVerifier(models[1]))
    silent = (np.zeros(8000, np.float32), 16_000)
    results = decoder.generate([silent] * 3, return_exceptions=True)
    assert [type(result) for result in results] == [AudioError] * 3
    assert decoder.generate([], return_exceptions=True) == []
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(AudioError, match="is silent") as raised:
            call(silent)
        assert notes(raised.value) == []
    with pytest.raises(ValueError, match="return_exceptions is given with one input"):
        decoder.generate(silent, return_exceptions=True)


@pytest.mark.parametrize("error", [VerifierUnavailable("far away"), VerifierRefused("too many"), ModelError("odd")])
@pytest.mark.parametrize("policy", ["accept", "raise"])
def test_a_verifier_that_answers_one_row_with_an_error(
    policy: OnVerifierFailure, error: Exception, models: tuple[AudioLM, AudioLM], clips: list[Any]
) -> None:
    config = UGSDConfig(on_verifier_failure=policy, **LOSSLESS)
    own = Decoder(models[0], LocalVerifier(models[1]), config).generate(clips, max_new_tokens=TOKENS)
    verifier = Watched(models[1], {1: error})
    results = Decoder(models[0], verifier, config).generate(clips, max_new_tokens=TOKENS, return_exceptions=True)
    accepted = policy == "accept" and isinstance(error, VerifierUnavailable)
    assert (results[1] is error) != accepted
    assert [results[row].tokens for row in (0, 2, 3, 4)] == [own[row].tokens for row in (0, 2, 3, 4)]
    assert verifier.open_sessions == 0
    if not accepted:
        assert notes(error)[-1:] == ["row 2 of 5: audio[1]"]
        verifier = Watched(models[1], {1: error})
        with pytest.raises(type(error), match=str(error)):
            Decoder(models[0], verifier, config).generate(clips, max_new_tokens=TOKENS)
        assert verifier.open_sessions == 0


@pytest.mark.parametrize("side", ["draft", "verifier"])
def test_logits_without_a_finite_value_end_their_own_row(
    side: str, models: tuple[AudioLM, AudioLM], clips: list[Any]
) -> None:
    config = UGSDConfig(**LOSSLESS)
    decoder = Decoder(models[0], LocalVerifier(models[1]), config)
    own = decoder.generate(clips[:3], max_new_tokens=TOKENS)

    def spoil(logits: Tensor, forward: int) -> None:
        if forward == (7 if side == "draft" else 1):
            rows = slice(1, 2) if side == "draft" else slice(6, 12)  # packed: one position a drafter, six a block
            assert logits.shape[:2] == (1, 3 if side == "draft" else 18)
            logits[:, rows] = torch.nan

    with head(models[0] if side == "draft" else models[1], spoil):
        results = decoder.generate(clips[:3], max_new_tokens=TOKENS, return_exceptions=True)
    assert isinstance(results[1], ModelError)
    assert "no finite value" in str(results[1])
    assert notes(results[1]) == ["row 2 of 3: audio[1]"]
    assert [results[row].tokens for row in (0, 2)] == [own[row].tokens for row in (0, 2)]


@pytest.mark.parametrize("side", ["draft", "verifier"])
def test_a_forward_that_fails_ends_all_rows_that_share_it(
    side: str, models: tuple[AudioLM, AudioLM], clips: list[Any]
) -> None:
    verifier = Watched(models[1])
    decoder = Decoder(models[0], verifier, UGSDConfig(**LOSSLESS))
    own = decoder.generate(clips, max_new_tokens=TOKENS)
    caches: list[weakref.ref[Any]] = []

    forwards = 0

    def fail(_: Tensor, __: int) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 2:
            caches.extend(weakref.ref(session.sequence) for session in verifier.sessions[-2:])
            raise RuntimeError("out of memory")

    with head(models[0] if side == "draft" else models[1], fail):
        results = decoder.generate(clips, max_new_tokens=TOKENS, max_batch_size=2, return_exceptions=True)
    assert results[0] is results[1]
    assert isinstance(results[0], RuntimeError)
    assert notes(results[0]) == ["rows 1, 2 of 5, which shared a forward pass"]
    assert [result.tokens for result in results[2:]] == [result.tokens for result in own[2:]]
    assert verifier.open_sessions == 0
    verifier.sessions.clear()
    gc.collect()
    assert not any(cache() for cache in caches), "an exception in the list keeps caches in memory"
    forwards = 0
    with head(models[0] if side == "draft" else models[1], fail), pytest.raises(RuntimeError, match="out of memory"):
        decoder.generate(clips, max_new_tokens=TOKENS, max_batch_size=2)
    assert verifier.open_sessions == 0


def test_prepared_inputs_that_do_not_fit_their_model(models: tuple[AudioLM, AudioLM], clips: list[Any]) -> None:
    """The verifier's prompt is looked at with the first block that goes there."""
    draft, judge = models
    decoder = Decoder(draft, LocalVerifier(judge), UGSDConfig(**LOSSLESS))
    inputs, verifier_inputs = ([model.prepare(clip) for clip in clips[:3]] for model in models)
    own = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS)
    verifier_inputs[2]["input_ids"] = verifier_inputs[2]["input_ids"][:, -5:]
    results = decoder.generate(
        inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS, return_exceptions=True
    )
    assert [result.tokens for result in results[:2]] == [result.tokens for result in own[:2]]
    assert isinstance(results[2], ModelError)
    assert "audio placeholders" in str(results[2])
    assert notes(results[2]) == ["row 3 of 3: inputs[2]"]


@pytest.mark.parametrize("spoilt", ["draft", "verifier"])
def test_a_prompt_that_leaves_no_room(spoilt: str) -> None:
    draft, judge = AudioLM(tiny.build("whisper", noise=0.1).model), AudioLM(tiny.build("whisper").model)
    build = tiny.build("whisper")
    decoder = Decoder(draft, LocalVerifier(judge), UGSDConfig(**LOSSLESS))
    inputs, verifier_inputs = ([dict(build.inputs(row)) for row in range(3)] for _ in range(2))
    own = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS)
    long = inputs[1] if spoilt == "draft" else verifier_inputs[1]
    limit = judge.model.config.max_target_positions
    long["decoder_input_ids"] = torch.full((1, limit - 8), 5)
    results = decoder.generate(
        inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS, return_exceptions=True
    )
    assert isinstance(results[1], ModelError)
    assert f"expected at most {limit}" in str(results[1])
    assert [results[row].tokens for row in (0, 2)] == [own[row].tokens for row in (0, 2)]


def test_a_stopping_criterion_that_fails_for_one_row(models: tuple[AudioLM, AudioLM], clips: list[Any]) -> None:
    decoder = Decoder(models[0], LocalVerifier(models[1]), UGSDConfig(**LOSSLESS))
    prompts = ["Who speaks?", "How loud is it?", "Why?"]
    own = decoder.generate(clips[:3], prompt=prompts, max_new_tokens=TOKENS)
    second = models[1].prepare(clips[1], prompts[1])["input_ids"][0]

    class Picky(StoppingCriteria):
        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            if torch.equal(ids[0, : len(second)], second) and ids.shape[1] > len(second) + 7:
                raise KeyError("a bug of the caller's")
            return torch.zeros(1, dtype=torch.bool)

    results = decoder.generate(
        clips[:3],
        prompt=prompts,
        max_new_tokens=TOKENS,
        stopping_criteria=StoppingCriteriaList([Picky()]),
        return_exceptions=True,
    )
    assert isinstance(results[1], KeyError)
    assert [results[row].tokens for row in (0, 2)] == [own[row].tokens for row in (0, 2)]


def test_a_translated_draft_that_has_no_room() -> None:
    writers = [Writer("bytes", "The speaker") for _ in range(3)]

    def refuse(count: int) -> None:
        raise ModelError(f"no room for {count}")

    writers[1].check_room = refuse  # type: ignore[method-assign]
    blocks = draft_translated([open_drafter(writer, "byte_bpe") for writer in writers], [4, 4, 2])
    assert isinstance(blocks[1], ModelError)
    for row, length in ((0, 4), (2, 2)):
        alone = open_drafter(Writer("bytes", "The speaker"), "byte_bpe").draft(length)
        block = blocks[row]
        assert not isinstance(block, Exception)
        assert block.token_ids == alone.token_ids
    with pytest.raises(ModelError, match="no room"):
        open_drafter(writers[1], "byte_bpe").draft(4)


def test_while_drafting_ahead(models: tuple[AudioLM, AudioLM], clips: list[Any]) -> None:
    config = UGSDConfig(ahead=4, on_verifier_failure="raise", **LOSSLESS)
    own = Decoder(models[0], LocalVerifier(models[1]), config).generate(clips[:3], max_new_tokens=TOKENS)
    distant = Distant(Watched(models[1], {2: VerifierUnavailable("far away")}), 0.002)
    results = Decoder(models[0], distant, config).generate(clips[:3], max_new_tokens=TOKENS, return_exceptions=True)
    assert isinstance(results[2], VerifierUnavailable)
    assert [result.tokens for result in results[:2]] == [result.tokens for result in own[:2]]


def test_a_stream_that_fails_or_is_left_closes_its_session(models: tuple[AudioLM, AudioLM], clips: list[Any]) -> None:
    verifier = Watched(models[1], {0: VerifierRefused("no")})
    decoder = Decoder(models[0], verifier, UGSDConfig(**LOSSLESS))
    with pytest.raises(VerifierRefused, match="no"):
        list(decoder.stream(clips[0]))
    assert verifier.open_sessions == 0
    for _ in decoder.stream(clips[0]):
        break
    assert verifier.open_sessions == 0
    decoder.stream(clips[0])
    gc.collect()
    assert verifier.open_sessions == 0
