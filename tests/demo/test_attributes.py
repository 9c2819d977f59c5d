"""The caption grammar: what is composed is parsed back, whatever the attributes."""

from __future__ import annotations

import pytest

from ugsd_fast.demo.attributes import (
    ATTRIBUTES,
    ELABORATIONS,
    EMOTIONS,
    INTENSITIES,
    all_attributes,
    attribute_accuracy,
    compose,
    matches,
    parse,
)

SAD = {
    "emotion": "sad",
    "intensity": "deeply",
    "gender": "man",
    "pitch": "low",
    "pace": "slow",
    "loudness": "soft",
    "melody": "falling",
}


def test_every_combination_round_trips():
    captions = set()
    for attributes in all_attributes():
        caption = compose(attributes)
        assert parse(caption) == attributes
        captions.add(caption)
    assert len(captions) == (7 * 3 + 1) * 2 * 3**4


def test_every_emotion_and_intensity_has_an_elaboration_of_its_own():
    assert set(ELABORATIONS) == {("neutral", None)} | {(e, i) for e in EMOTIONS[1:] for i in INTENSITIES}
    assert len(set(ELABORATIONS.values())) == len(ELABORATIONS)


def test_a_cut_caption_states_only_what_is_there():
    stated = parse(compose(SAD)[:60])
    assert (stated["emotion"], stated["intensity"]) == ("sad", "deeply")
    assert all(stated[name] is None for name in ATTRIBUTES[2:])


@pytest.mark.parametrize("text", ["", "The speaker sounds", "a man speaking", "sounds sadly mistaken"])
def test_text_outside_the_grammar_states_nothing(text):
    assert set(parse(text).values()) == {None}


def test_accuracy_counts_the_attributes_that_the_reference_states():
    reference = compose(SAD)
    assert attribute_accuracy(reference, reference) == 1.0
    assert attribute_accuracy(compose(SAD | {"pace": "quick"}), reference) == pytest.approx(6 / 7)
    assert attribute_accuracy("", reference) == 0.0
    assert attribute_accuracy(reference, "") == 0.0


def test_a_neutral_reference_has_no_intensity_to_compare():
    neutral = compose(SAD | {"emotion": "neutral", "intensity": None})
    assert "intensity" not in matches(compose(SAD), neutral)
    assert matches(neutral, compose(SAD))["intensity"] is False


def test_compose_refuses_what_has_no_caption():
    with pytest.raises(ValueError, match="neutral"):
        compose(SAD | {"emotion": "neutral"})
