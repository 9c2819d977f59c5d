"""Random models and made-up clips in the layout of the embedded pair: for the ways that do not depend on training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from tests import checkpoints

RATE = 16_000
CONFIG = {"block_size": 4, "entropy_threshold": 5.0, "rule": "rank", "rank": 1}


def build_pair(folder: Path, *, max_new_tokens: int = 12) -> Path:
    """Write a pair whose drafter is its verifier with some noise."""
    verifier = checkpoints.build_qwen2_audio(folder / "verifier", seed=3)
    checkpoints.copy_checkpoint(verifier, folder / "draft", noise=0.1)
    settings = {"prompt": "Describe the voice.", "max_new_tokens": max_new_tokens, "config": CONFIG}
    (folder / "pair.json").write_text(json.dumps(settings))
    return folder


def build_clips(folder: Path, count: int = 4) -> Path:
    """Write FLAC clips of 1 s and their list."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index in range(count):
        soundfile.write(folder / f"clip-{index}.flac", tone(150 + 40 * index), RATE)
        listed.append(
            {
                "file": f"clip-{index}.flac",
                "caption": "The speaker sounds clearly happy. It is a woman speaking in a high, quick, loud voice.",
                "attributes": {"emotion": "happy"},
                "sentence": "the boat is on the water",
                "voice": f"v{index}",
            }
        )
    (folder / "clips.json").write_text(json.dumps(listed))
    return folder


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    """Something to hear."""
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)
