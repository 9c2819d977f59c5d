"""A verifier's session: catching up, judging, and what it keeps of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from ugsd_fast import AudioLM, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.block import EMPTY_BLOCK, DraftBlock

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]
GREEDY = UGSDConfig(always_escalate=True, rule="greedy")


def block(*tokens: int, logits: torch.Tensor | None = None) -> DraftBlock:
    return DraftBlock(torch.tensor([tokens]), logits, tokens, (0.0,) * len(tokens), 0.0, True)


def greedy(model: AudioLM, speech: Speech, prefix: Sequence[int], count: int) -> list[int]:
    """The verifier's greedy continuation, every token from a fresh forward."""
    inputs = model.prepare(speech)
    tokens = list(prefix)
    for _ in range(count):
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
        with torch.inference_mode():
            logits = model.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prefix) :]


@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize("family", ["qwen2_audio", "qwen3_omni"])
def test_a_session_catches_up_and_judges(family: str, bonus: bool, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    session = LocalVerifier(model).open(GREEDY, audio=speech)
    seen: list[int] = [3, 4]  # accepted without the verifier
    right = greedy(model, speech, seen, 4)
    wrong = (right[2] + 1) % 400

    verdict = session.verify(seen, block(*right[:2], wrong, right[3]), bonus=bonus)
    assert (verdict.num_accepted, verdict.next_token) == (2, right[2])
    seen += right[:3]

    right = greedy(model, speech, seen, 4)
    verdict = session.verify([], block(*right[:3]), bonus=bonus)
    assert (verdict.num_accepted, verdict.next_token) == (3, right[3] if bonus else -1)
    seen += right[: 3 + bonus]

    # Without a bonus nothing is pending: the block's first position was predicted by the last forward.
    verdict = session.verify([], block(*greedy(model, speech, seen, 2)), bonus=True)
    assert verdict.num_accepted == 2
    assert session.forwards == 3


def test_an_empty_block_asks_for_the_next_token(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_5_omni")
    session = LocalVerifier(model).open(GREEDY, audio=speech)
    tokens = [session.verify([], EMPTY_BLOCK, bonus=True).next_token for _ in range(5)]
    assert tokens == greedy(model, speech, [], 5)
    # Nothing pending and nothing drafted: the answer is known without a forward.
    session = LocalVerifier(model).open(GREEDY, audio=speech)
    assert session.verify([], block(*tokens[:2]), bonus=False).next_token == -1
    assert session.verify([], EMPTY_BLOCK, bonus=True).next_token == tokens[2]
    assert session.forwards == 1


def test_ids_beyond_the_vocabulary_are_rejected(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    session = LocalVerifier(model).open(GREEDY, audio=speech)
    right = greedy(model, speech, [], 2)
    verdict = session.verify([], block(right[0], model.vocab_size + 5, 1), bonus=True)
    assert (verdict.num_accepted, verdict.next_token) == (1, right[1])


@pytest.mark.parametrize("columns", [-100, 0, 100])
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_draft_logits_of_another_width(rule: str, columns: int, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    config = UGSDConfig(always_escalate=True, rule=rule, temperature=1.0)  # type: ignore[arg-type]
    session = LocalVerifier(model).open(config, audio=speech)
    logits = torch.zeros(1, 2, model.vocab_size + columns)
    logits[..., 7] = 30.0  # certain of a token that the verifier hardly knows
    verdict = session.verify([], block(7, 7, logits=logits), bonus=True)
    assert 0 <= verdict.next_token < model.vocab_size
    assert verdict.num_accepted < 2


def test_a_closed_session_says_so(audio_lm: LoadModel, speech: Speech) -> None:
    session = LocalVerifier(audio_lm("qwen2_audio")).open(GREEDY, audio=speech)
    session.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.verify([], EMPTY_BLOCK, bonus=True)
