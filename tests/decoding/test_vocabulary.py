"""Pairs whose ids mean different text are refused, before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ugsd_fast import AudioLM, Decoder, LocalVerifier, VocabularyMismatchError
from ugsd_fast.decoding.vocabulary import check_vocabularies


class Side:
    """A model with nothing but a tokenizer."""

    def __init__(self, vocabulary: dict[str, int], added: dict[str, int] | None = None):
        self._vocabulary, self._added = vocabulary, added or {}
        self.tokenizer: Any = self

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self._added}

    def get_added_vocab(self) -> dict[str, int]:
        return self._added


def test_special_tokens_may_differ() -> None:
    check_vocabularies(Side({"a": 0, "b": 1}, {"<|AUDIO|>": 2}), Side({"a": 0, "b": 1}, {"<|ref|>": 2, "<x>": 3}))


def test_the_first_difference_is_named() -> None:
    with pytest.raises(
        VocabularyMismatchError, match=r"differ in 2 of 3 text tokens: 'b' is 1 .* and 2 for the verifier"
    ):
        check_vocabularies(Side({"a": 0, "b": 1, "c": 2}), Side({"a": 0, "b": 2, "c": 1}))
    with pytest.raises(VocabularyMismatchError, match=r"'c' is 2 for the drafter and None"):
        check_vocabularies(Side({"a": 0, "b": 1, "c": 2}), Side({"a": 0, "b": 1}))


def test_without_a_tokenizer_ids_are_taken_at_their_word() -> None:
    side = Side({"a": 0})
    side.tokenizer = None
    check_vocabularies(side, Side({"b": 0}))


def test_families_share_their_text_tokens(audio_lm: Callable[..., AudioLM]) -> None:
    models = [audio_lm(family) for family in ("qwen2_audio", "qwen2_5_omni", "qwen3_omni")]
    assert len({model.vocab_size for model in models}) == 3
    for model in models[1:]:
        Decoder(models[0], LocalVerifier(model))
