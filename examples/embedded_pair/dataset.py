"""The data set: shards of synthetic speech with captions, and the mel features that the models hear.

A shard is one process, one seed, one order: espeak-ng carries state from call to call, so this is what makes clips
reproducible while shards are made in parallel.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import WhisperFeatureExtractor

from ugsd_fast.demo.attributes import Attributes, compose

SAMPLE_RATE = 16_000
CLIP_SECONDS = 4
MEL_FRAMES = 200


@dataclass(frozen=True)
class Shard:
    """One part of a split: which voices and sentences it may use and how many clips it holds."""

    name: str
    seed: int
    clips: int
    voices: str
    sentences: str


def plan(train_shards: int) -> list[Shard]:
    """Shards of every split. Tuning and test sentences are never trained on; ``tune`` and ``test`` voices neither."""
    return [Shard(f"train-{i:02d}", 1000 + i, 1000, "train", "train") for i in range(train_shards)] + [
        Shard("tune-seen", 2000, 300, "train", "held-out"),
        Shard("tune-unseen", 2001, 300, "tune", "held-out"),
        Shard("test-seen", 3000, 300, "train", "held-out"),
        Shard("test-unseen", 3001, 300, "test", "held-out"),
        Shard("clips", 4000, 32, "test", "held-out"),
    ]


def feature_extractor() -> WhisperFeatureExtractor:
    """The front end of both models: 80 mel bands every 20 ms, clips of at most 4 s."""
    return WhisperFeatureExtractor(
        feature_size=80,
        sampling_rate=SAMPLE_RATE,
        hop_length=320,
        chunk_length=CLIP_SECONDS,
        n_fft=1024,
        return_attention_mask=True,
    )


def _measure() -> dict[str, float]:
    from examples.embedded_pair.speech import measure_variants

    return measure_variants()


def _held_out_voices(name: str) -> frozenset[str]:
    from examples.embedded_pair.speech import FEMALE, MALE, TEST_VARIANTS, TUNE_VARIANTS

    everyone = frozenset(FEMALE + MALE)
    return {"train": everyone - TEST_VARIANTS - TUNE_VARIANTS, "tune": TUNE_VARIANTS, "test": TEST_VARIANTS}[name]


def _balanced(attributes: list[Attributes], shard: Shard) -> list[Attributes]:
    """The demo clips show every emotion equally often; other splits stay as drawn."""
    if shard.name == "clips":
        from examples.embedded_pair.speech import EMOTIONS, INTENSITIES

        for index, item in enumerate(attributes):
            item["emotion"] = EMOTIONS[index % len(EMOTIONS)]
            level = INTENSITIES[index // len(EMOTIONS) % len(INTENSITIES)]
            item["intensity"] = None if item["emotion"] == "neutral" else level
    return attributes


def make_shard(shard: Shard, fundamentals: dict[str, float], folder: Path) -> None:
    """Synthesise one shard and write ``<name>.npz`` (features, frame counts) and ``<name>.json`` (captions).

    Held-out shards also keep their audio, ``<name>-audio.npz``: evaluation runs from the waveform.
    """
    from examples.embedded_pair.speech import Synthesizer, draw_attributes, draw_voice, sentences, speak

    rng = np.random.default_rng(shard.seed)
    synthesizer = Synthesizer()
    texts = sentences(held_out=shard.sentences == "held-out")
    variants = _held_out_voices(shard.voices)
    records, waves = [], []
    for attributes in _balanced([draw_attributes(rng) for _ in range(shard.clips)], shard):
        voice = draw_voice(rng, variants, attributes["gender"])
        sentence = texts[rng.integers(len(texts))]
        waves.append(speak(synthesizer, sentence, voice, attributes, fundamentals, rng))
        records.append(
            {"sentence": sentence, "voice": voice.name, "attributes": attributes, "caption": compose(attributes)}
        )
    extractor = feature_extractor()
    features, frames = [], []
    for wave in waves:
        heard = extractor(
            wave, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="np"
        )
        features.append(heard["input_features"][0].astype(np.float16))
        frames.append(int(heard["attention_mask"].sum()))
    np.savez(folder / f"{shard.name}.npz", features=np.stack(features), frames=np.array(frames, dtype=np.int32))
    if shard.sentences == "held-out":
        audio = {f"{index:04d}": np.round(wave * 32767).astype(np.int16) for index, wave in enumerate(waves)}
        np.savez_compressed(folder / f"{shard.name}-audio.npz", **audio)
    (folder / f"{shard.name}.json").write_text(json.dumps(records, indent=0))


def make_dataset(folder: Path, train_shards: int, workers: int = 2) -> None:
    """Make every shard that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        fundamentals = pool.submit(_measure).result()
    todo = [shard for shard in plan(train_shards) if not (folder / f"{shard.name}.json").exists()]
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        for job in [pool.submit(make_shard, shard, fundamentals, folder) for shard in todo]:
            job.result()


@dataclass
class Split:
    """Features [N, 80, 200] (float16), frame counts [N] and records (caption, attributes, voice, sentence)."""

    features: np.ndarray
    frames: np.ndarray
    records: list[dict]

    @property
    def captions(self) -> list[str]:
        return [record["caption"] for record in self.records]


def load_split(folder: Path, names: list[str]) -> Split:
    """Read shards back and join them."""
    arrays = [np.load(folder / f"{name}.npz") for name in names]
    return Split(
        features=np.concatenate([array["features"] for array in arrays]),
        frames=np.concatenate([array["frames"] for array in arrays]),
        records=[record for name in names for record in json.loads((folder / f"{name}.json").read_text())],
    )


def load_audio(folder: Path, name: str) -> list[np.ndarray]:
    """Waveforms (float32) of one held-out shard."""
    with np.load(folder / f"{name}-audio.npz") as audio:
        return [audio[key].astype(np.float32) / 32767 for key in sorted(audio.files)]
