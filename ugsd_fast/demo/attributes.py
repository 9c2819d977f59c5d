"""Speech attributes and the caption grammar that names them.

The embedded pair writes captions of one fixed shape, so that a caption can be read back into the attributes that it
states and scored without a judge model. :func:`compose` writes the caption of an attribute dict,
:func:`parse` reads one back, :func:`attribute_accuracy` compares two captions. The tables below are the only place
where the wording is defined; the training scripts in ``examples/embedded_pair`` import them.
"""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Attributes = dict[str, str | None]

ATTRIBUTES = ("emotion", "intensity", "gender", "pitch", "pace", "loudness", "melody")
EMOTIONS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised", "calm")
INTENSITIES = ("slightly", "clearly", "deeply")
GENDERS = ("man", "woman")
PITCHES = ("low", "medium", "high")
PACES = ("slow", "steady", "quick")
LOUDNESSES = ("soft", "moderate", "loud")
MELODIES = ("falling", "level", "rising")

NEUTRAL_ADVERB = "quite"
"""Stands where the intensity stands: a neutral voice has none."""

ELABORATIONS: dict[tuple[str, str | None], str] = {
    ("neutral", None): "as though reading out a timetable with nothing in it that matters to anyone listening",
    ("happy", "slightly"): "as though a pleasant thought had just crossed the mind and left a small smile",
    ("happy", "clearly"): "as though good news had arrived this morning and the whole day felt brighter",
    ("happy", "deeply"): "as though the best moment of the year were happening and had to be shared",
    ("sad", "slightly"): "as though an old memory had come back and dimmed the afternoon a little",
    ("sad", "clearly"): "as though something dear had been lost and every word were hard to say",
    ("sad", "deeply"): "as though grief had settled in for good and no comfort could reach it",
    ("angry", "slightly"): "as though a minor annoyance had been left to simmer under polite words",
    ("angry", "clearly"): "as though a promise had been broken once again and somebody must answer for it",
    ("angry", "deeply"): "as though a line had been crossed and nothing could hold the rage back",
    ("fearful", "slightly"): "as though an odd noise outside had made it hard to feel at ease",
    ("fearful", "clearly"): "as though danger were close by and there were nowhere safe to hide",
    ("fearful", "deeply"): "as though terror had taken hold and the next breath might be the last",
    ("disgusted", "slightly"): "as though the milk had turned and the taste would not quite go away",
    ("disgusted", "clearly"): "as though something rotten had been put on the plate and called dinner",
    ("disgusted", "deeply"): "as though the very sight of it turned the stomach and soured the air",
    ("surprised", "slightly"): "as though the answer were not the one expected but easy enough to accept",
    ("surprised", "clearly"): "as though a door had opened by itself and a friend from abroad stood there",
    ("surprised", "deeply"): "as though the impossible had just happened in plain view and left no explanation",
    ("calm", "slightly"): "as though most of the work were done and the rest could wait",
    ("calm", "clearly"): "as though sitting by a quiet lake with the whole evening still ahead",
    ("calm", "deeply"): "as though half asleep under warm blankets without one worry left in the world",
}

PRONOUNS = {"man": "he", "woman": "she"}

_PATTERNS = {
    "emotion": re.compile(rf"sounds (?:\w+ )?({'|'.join(EMOTIONS)})\b"),
    "intensity": re.compile(rf"sounds ({'|'.join(INTENSITIES)})\b"),
    "gender": re.compile(rf"It is a ({'|'.join(GENDERS)})\b"),
    "pitch": re.compile(rf"in a ({'|'.join(PITCHES)})\b"),
    "pace": re.compile(rf"in a \w+, ({'|'.join(PACES)})\b"),
    "loudness": re.compile(rf"in a \w+, \w+, ({'|'.join(LOUDNESSES)})\b"),
    "melody": re.compile(rf"in a \w+, \w+, \w+, ({'|'.join(MELODIES)})\b"),
}


def compose(attributes: Attributes) -> str:
    """Write the caption of one attribute dict.

    Parameters
    ----------
    attributes : dict
        A value for each name in ``ATTRIBUTES``; ``intensity`` is None exactly where ``emotion`` is ``"neutral"``.

    Returns
    -------
    str
        The caption.

    Examples
    --------
    >>> caption = compose({"emotion": "sad", "intensity": "deeply", "gender": "man", "pitch": "low",
    ...                    "pace": "slow", "loudness": "soft", "melody": "falling"})
    >>> caption[:29]
    'The speaker sounds deeply sad'
    >>> parse(caption)["pace"]
    'slow'
    """
    emotion, intensity, gender = attributes["emotion"], attributes["intensity"], attributes["gender"]
    if emotion is None or gender is None or (emotion, intensity) not in ELABORATIONS:
        raise ValueError(f"compose: no caption for emotion {emotion!r} with intensity {intensity!r}, gender {gender!r}")
    return (
        f"The speaker sounds {intensity or NEUTRAL_ADVERB} {emotion}, {ELABORATIONS[emotion, intensity]}. "
        f"It is a {gender} speaking in a {attributes['pitch']}, {attributes['pace']}, {attributes['loudness']}, "
        f"{attributes['melody']} voice, and {PRONOUNS[gender]} keeps to it until the end of the sentence."
    )


def parse(caption: str) -> Attributes:
    """Read the attributes that a caption states.

    Parameters
    ----------
    caption : str
        A caption, possibly cut short or malformed.

    Returns
    -------
    dict
        A value for each name in ``ATTRIBUTES``, None where the caption states none.
    """
    found = {name: pattern.search(caption) for name, pattern in _PATTERNS.items()}
    return {name: match.group(1) if match else None for name, match in found.items()}


def matches(hypothesis: str, reference: str) -> dict[str, bool]:
    """Compare two captions attribute by attribute; only what the reference states is compared.

    Parameters
    ----------
    hypothesis, reference : str
        Captions.

    Returns
    -------
    dict
        Attribute name to whether both captions state the same value.
    """
    stated, expected = parse(hypothesis), parse(reference)
    return {name: stated[name] == value for name, value in expected.items() if value is not None}


def attribute_accuracy(hypothesis: str, reference: str) -> float:
    """Share of the attributes stated by the reference that the hypothesis states with the same value.

    Parameters
    ----------
    hypothesis, reference : str
        Captions.

    Returns
    -------
    float
        In [0, 1]; 0 where the reference states no attribute.
    """
    same = matches(hypothesis, reference)
    return sum(same.values()) / len(same) if same else 0.0


def all_attributes() -> Iterator[Attributes]:
    """Every attribute dict that has a caption, in a fixed order.

    Yields
    ------
    dict
        A value for each name in ``ATTRIBUTES``.
    """
    for values in product(ELABORATIONS, GENDERS, PITCHES, PACES, LOUDNESSES, MELODIES):
        (emotion, intensity), *rest = values
        yield dict(zip(ATTRIBUTES, (emotion, intensity, *rest), strict=True))
