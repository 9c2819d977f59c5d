"""Synthetic emotional speech: espeak-ng (formant synthesis) and rule-based signal processing.

Every clip follows from the seed of its shard. espeak-ng keeps state between calls, so a shard is synthesised in one
process, in a fixed order (see ``dataset.py``).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import espeakng_loader
import numpy as np
import soxr
from scipy.signal import fftconvolve, lfilter

from ugsd_fast.demo.attributes import EMOTIONS, GENDERS, INTENSITIES, LOUDNESSES, MELODIES, PACES, PITCHES, Attributes

SAMPLE_RATE = 16_000
MAX_SECONDS = 4.0

FEMALE = [
    "Alicia",
    "Andrea",
    "Annie",
    "anika",
    "aunty",
    "belinda",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "grandma",
    "linda",
    "shelby",
    "steph",
    "steph2",
    "steph3",
]
MALE = [
    "Alex",
    "Andy",
    "AnxiousAndy",
    "Denis",
    "Diogo",
    "Gene",
    "Gene2",
    "Henrique",
    "Hugo",
    "Jacky",
    "Lee",
    "Marco",
    "Mario",
    "Michael",
    "Mike",
    "Nguyen",
    "Reed",
    "Storm",
    "Tweaky",
    "adam",
    "announcer",
    "antonio",
    "benjamin",
    "boris",
    "croak",
    "david",
    "ed",
    "edward",
    "grandpa",
    "gustave",
    "ian",
    "iven",
    "iven2",
    "john",
    "kaukovalta",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt5",
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "m8",
    "marcelo",
    "max",
    "michel",
    "miguel",
    "mike2",
    "norbert",
    "pablo",
    "paul",
    "pedro",
    "quincy",
    "rob",
    "robert",
    "sandro",
    "travis",
    "victor",
]
ACCENTS = ("en-us", "en-us-nyc", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
TEST_VARIANTS = frozenset(
    [
        "f3",
        "anika",
        "grandma",
        "belinda",
        "m3",
        "Storm",
        "Marco",
        "announcer",
        "grandpa",
        "victor",
        "Lee",
        "Mike",
        "mike2",
        "marcelo",
    ]
)
TUNE_VARIANTS = frozenset(["f4", "linda", "m5", "sandro", "travis", "norbert"])

# Words a minute; Hz of the mean fundamental frequency; dB of the active signal. Bands are apart by design: each is
# an attribute that a listener could name.
RATES = dict(zip(PACES, (125, 180, 265), strict=True))
FUNDAMENTALS = {
    "man": dict(zip(PITCHES, (84, 112, 146), strict=True)),
    "woman": dict(zip(PITCHES, (176, 217, 272), strict=True)),
}
LEVELS_DB = dict(zip(LOUDNESSES, (-37.0, -27.0, -17.0), strict=True))
GLIDES = dict(zip(MELODIES, (-0.22, 0.0, 0.22), strict=True))
MAGNITUDES = dict(zip(INTENSITIES, (0.25, 0.5, 1.0), strict=True))

# espeak-ng's pitch parameter and the factor by which it moves a voice's fundamental frequency.
_PITCH_PARAMETER = np.array([0, 25, 50, 75, 99])
_PITCH_FACTOR = np.array([0.63, 0.78, 1.0, 1.31, 1.70])
_RATE, _PITCH, _RANGE = 1, 3, 4

_SUBJECTS = [
    "the children",
    "my neighbour",
    "our teacher",
    "the doctor",
    "her brother",
    "the driver",
    "a stranger",
    "the old sailor",
    "our cousin",
    "the waiter",
    "my sister",
    "the farmer",
    "the captain",
    "his mother",
    "the painter",
    "the student",
]
_VERBS = [
    "found",
    "opened",
    "carried",
    "forgot",
    "painted",
    "dropped",
    "watched",
    "borrowed",
    "cleaned",
    "counted",
    "noticed",
    "repaired",
    "followed",
    "moved",
    "wanted",
    "picked",
]
_OBJECTS = [
    "the letter",
    "a basket",
    "the window",
    "the red boat",
    "a lantern",
    "the garden gate",
    "some apples",
    "the broken clock",
    "a ticket",
    "the blue jacket",
    "the piano",
    "two suitcases",
    "the kitchen table",
    "a heavy box",
    "the bicycle",
    "the map",
]
_ENDINGS = [
    "today",
    "again",
    "at noon",
    "last night",
    "on Monday",
    "by the river",
    "after lunch",
    "near the station",
    "in the rain",
    "outside",
]


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker: an accent, an espeak-ng variant and a vocal-tract scale."""

    accent: str
    variant: str
    gender: str
    scale: float

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


class Synthesizer:
    """espeak-ng through ctypes: text to float32 samples at ``rate`` Hz."""

    def __init__(self) -> None:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        library.espeak_SetSynthCallback.argtypes = [self._callback_type]
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
        library.espeak_SetParameter.argtypes = [ctypes.c_int] * 3
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self.rate = library.espeak_Initialize(1, 0, espeakng_loader.get_data_path().encode(), 0)
        self._chunks: list[np.ndarray] = []
        self._library = library
        self._callback = self._callback_type(self._collect)  # espeak-ng keeps the pointer: it must stay referenced
        library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count, events) -> int:
        if samples and count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(self, text: str, voice: str, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> np.ndarray:
        self._chunks.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(1)  # its noise is seeded with the time otherwise
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, 1, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._chunks).astype(np.float32) / 32768


def fundamental(samples: np.ndarray, rate: int) -> float:
    """Median fundamental frequency in Hz of the voiced frames, by autocorrelation."""
    size, hop = 1024, 512
    power = float(np.mean(samples**2))
    found = []
    for start in range(0, len(samples) - size, hop):
        frame = samples[start : start + size]
        if float(np.mean(frame**2)) < 0.3 * power:
            continue
        correlation = np.fft.irfft(np.abs(np.fft.rfft((frame - frame.mean()) * np.hanning(size), 4 * size)) ** 2)
        low, high = rate // 400, rate // 60
        lag = low + int(np.argmax(correlation[low:high]))
        if correlation[lag] > 0.3 * correlation[0]:
            found.append(rate / lag)
    return float(np.median(found)) if found else 0.0


def measure_variants() -> dict[str, float]:
    """Fundamental frequency of each espeak-ng variant at the neutral pitch setting."""
    synthesizer = Synthesizer()
    return {
        variant: fundamental(synthesizer("We will leave the house at noon.", f"en-us+{variant}"), synthesizer.rate)
        for variant in FEMALE + MALE
    }


def sentences(held_out: bool) -> list[str]:
    """All sentences of one side of the split; no sentence is on both sides."""
    chosen = []
    index = 0
    for subject in _SUBJECTS:
        for verb in _VERBS:
            for thing in _OBJECTS:
                for ending in _ENDINGS:
                    if (index * 7919 % 10007 % 10 == 0) == held_out:
                        chosen.append(f"{subject} {verb} {thing} {ending}")
                    index += 1
    return chosen


def draw_voice(rng: np.random.Generator, variants: frozenset[str], gender: str) -> Voice:
    """A voice of one gender out of ``variants``."""
    names = [name for name in (FEMALE if gender == "woman" else MALE) if name in variants]
    return Voice(
        accent=ACCENTS[rng.integers(len(ACCENTS))],
        variant=names[rng.integers(len(names))],
        gender=gender,
        scale=float(rng.uniform(0.93, 1.07)),
    )


def draw_attributes(rng: np.random.Generator) -> Attributes:
    """Independent uniform attributes; a neutral voice has no intensity."""
    emotion = EMOTIONS[rng.integers(len(EMOTIONS))]
    intensity = INTENSITIES[rng.integers(len(INTENSITIES))]
    return {
        "emotion": emotion,
        "intensity": None if emotion == "neutral" else intensity,
        "gender": GENDERS[rng.integers(len(GENDERS))],
        "pitch": PITCHES[rng.integers(len(PITCHES))],
        "pace": PACES[rng.integers(len(PACES))],
        "loudness": LOUDNESSES[rng.integers(len(LOUDNESSES))],
        "melody": MELODIES[rng.integers(len(MELODIES))],
    }


def _trim(samples: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def _warp(samples: np.ndarray, rate: int, scale: float, glide: float, vibrato: float) -> np.ndarray:
    """Resample to ``SAMPLE_RATE`` at a speed that varies over time: moves pitch and formants together."""
    clean = soxr.resample(samples, rate, SAMPLE_RATE, quality="MQ")
    count = int(len(clean) / scale)
    when = np.linspace(0.0, 1.0, count)
    speed = 1.0 + glide * (when - 0.5) * 2 + vibrato * np.sin(2 * np.pi * 5.5 * np.arange(count) / SAMPLE_RATE)
    position = np.cumsum(speed)
    position *= (len(clean) - 1) / position[-1]
    return np.interp(position, np.arange(len(clean)), clean)


def _peak(samples: np.ndarray, frequency: float, gain_db: float, quality: float) -> np.ndarray:
    """Peaking equaliser (RBJ biquad)."""
    amplitude = 10 ** (gain_db / 40)
    omega = 2 * np.pi * frequency / SAMPLE_RATE
    alpha = np.sin(omega) / (2 * quality)
    numerator = [1 + alpha * amplitude, -2 * np.cos(omega), 1 - alpha * amplitude]
    denominator = [1 + alpha / amplitude, -2 * np.cos(omega), 1 - alpha / amplitude]
    return lfilter(numerator, denominator, samples)


def _envelope(samples: np.ndarray) -> np.ndarray:
    decay = np.exp(-1 / (0.02 * SAMPLE_RATE))
    return lfilter([1 - decay], [1, -decay], np.abs(samples))


def _colour(samples: np.ndarray, emotion: str, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """The audible mark of an emotion: its kind says which, its size says how much."""
    samples = samples / np.abs(samples).max()
    seconds = np.arange(len(samples)) / SAMPLE_RATE
    if emotion == "angry":  # pressed and harsh: saturation and a raised spectral tilt
        driven = np.tanh((1 + 14 * magnitude) * samples)
        return driven + 1.2 * magnitude * np.diff(driven, prepend=0.0)
    if emotion == "sad":  # dull and fading
        pole = np.exp(-2 * np.pi * 700 * magnitude**-0.9 / SAMPLE_RATE)
        dull = lfilter([(1 - pole) ** 2], [1, -2 * pole, pole**2], samples)
        return dull * np.exp(-1.8 * magnitude * seconds / seconds[-1])
    if emotion == "fearful":  # trembling
        depth = 0.95 * magnitude**0.7
        tremble = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(8, 10) * seconds + rng.uniform(0, 6.28))
        return samples * (1 - depth * tremble)
    if emotion == "disgusted":  # nasal
        return _peak(samples, rng.uniform(950, 1100), 5 + 16 * magnitude, 2.5)
    if emotion == "surprised":  # an audible breath taken in before the first word
        length = int(SAMPLE_RATE * (0.08 + 0.24 * magnitude))
        breath = _peak(rng.standard_normal(length), 1800, 12, 1.0) * np.linspace(0.1, 1.0, length)
        breath *= 0.6 * magnitude * np.sqrt(np.mean(samples**2)) / np.sqrt(np.mean(breath**2))
        return np.concatenate([breath, np.zeros(int(0.06 * SAMPLE_RATE)), samples])
    if emotion == "calm":  # breathy: aspiration noise under the voice
        noise = np.diff(rng.standard_normal(len(samples)), prepend=0.0)
        return samples + 0.45 * magnitude * noise * _envelope(samples)
    return samples


def _room(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Recording conditions: a gentle equaliser, at times a small room, and background noise."""
    samples = _peak(samples, rng.uniform(150, 600), rng.uniform(-3, 3), 0.7)
    samples = _peak(samples, rng.uniform(2000, 6000), rng.uniform(-3, 3), 0.7)
    if rng.random() < 0.4:
        length = int(SAMPLE_RATE * rng.uniform(0.08, 0.2))
        tail = rng.standard_normal(length) * np.exp(-6 * np.arange(length) / length)
        tail *= rng.uniform(0.1, 0.3) / np.sqrt(np.sum(tail**2))
        samples = samples + fftconvolve(samples, tail)[: len(samples)]
    noise = lfilter([1.0], [1, -rng.uniform(0, 0.9)], rng.standard_normal(len(samples)))
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-rng.uniform(25, 45) / 20)
    return samples + noise


def speak(
    synthesizer: Synthesizer,
    sentence: str,
    voice: Voice,
    attributes: Attributes,
    fundamentals: dict[str, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Synthesise one clip.

    Parameters
    ----------
    synthesizer : Synthesizer
    sentence : str
        What is said, without its closing punctuation.
    voice : Voice
    attributes : dict
        See ``ugsd_fast.demo.attributes.ATTRIBUTES``; ``gender`` is the voice's.
    fundamentals : dict
        Fundamental frequency of each variant (``measure_variants``).
    rng : numpy.random.Generator

    Returns
    -------
    numpy.ndarray
        float32 [samples] at ``SAMPLE_RATE``, at most ``MAX_SECONDS``.
    """
    emotion, intensity, melody = attributes["emotion"], attributes["intensity"], attributes["melody"]
    magnitude = MAGNITUDES[intensity] * float(np.exp(0.08 * rng.standard_normal())) if intensity else 0.0
    target = FUNDAMENTALS[voice.gender][attributes["pitch"]] * rng.uniform(0.95, 1.05) / voice.scale
    pitch = float(np.interp(target / fundamentals[voice.variant], _PITCH_FACTOR, _PITCH_PARAMETER))
    happy = magnitude if emotion == "happy" else 0.0
    raw = synthesizer(
        sentence + {"falling": ".", "level": ",", "rising": "?"}[melody],
        voice.name,
        rate=round(RATES[attributes["pace"]] * rng.uniform(0.95, 1.05)),
        pitch=round(pitch),
        pitch_range=round((20 if melody == "level" else 40) + 40 * happy),
    )
    samples = _warp(_trim(raw), synthesizer.rate, voice.scale, GLIDES[melody] * rng.uniform(0.85, 1.15), 0.11 * happy)
    samples = _room(_colour(samples, emotion, magnitude, rng), rng)[: int(MAX_SECONDS * SAMPLE_RATE)]
    envelope = _envelope(samples)
    active = np.sqrt(np.mean(np.square(samples)[envelope > 0.2 * envelope.max()]))
    gain = 10 ** ((LEVELS_DB[attributes["loudness"]] + rng.uniform(-1.5, 1.5)) / 20) / active
    return np.clip(samples * gain, -1, 1).astype(np.float32)
