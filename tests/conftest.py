"""Shared by all tests: one thread, offline, tiny checkpoints of every family built once a run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests import checkpoints
from ugsd_fast import AudioLM

FAMILIES = {
    "qwen2_audio": checkpoints.build_qwen2_audio,
    "qwen2_5_omni": checkpoints.build_qwen2_5_omni,
    "qwen3_omni": checkpoints.build_qwen3_omni,
}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint of a family; ``noise`` > 0 makes a copy with that much gaussian noise on the weights."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def build(family: str, *, seed: int = 0, noise: float = 0.0) -> Path:
        path = folder / f"{family}-{seed}"
        if not path.exists():
            FAMILIES[family](path, seed=seed)
        if not noise:
            return path
        noisy = folder / f"{family}-{seed}-{noise}"
        return noisy if noisy.exists() else checkpoints.copy_checkpoint(path, noisy, noise=noise, seed=1)

    return build


@pytest.fixture(scope="session")
def audio_lm(checkpoint: Callable[..., Path]) -> Callable[..., AudioLM]:
    """An `AudioLM` of a tiny checkpoint, float32; the same object for the same arguments."""
    loaded: dict[Path, AudioLM] = {}

    def load(family: str, **kwargs: float) -> AudioLM:
        path = checkpoint(family, **kwargs)
        if path not in loaded:
            loaded[path] = AudioLM.from_pretrained(path, dtype=torch.float32, device="cpu")
        return loaded[path]

    return load


@pytest.fixture(scope="session")
def speech() -> tuple[np.ndarray, int]:
    """Two seconds of a voice-like tone with a slow swell: (samples, rate)."""
    rate = 16_000
    seconds = np.arange(2 * rate) / rate
    pitch = 140 + 30 * np.sin(2 * np.pi * 0.7 * seconds)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 8))
    return (0.1 * tone * (1 + np.sin(2 * np.pi * 3 * seconds))).astype(np.float32), rate
