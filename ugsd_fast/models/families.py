"""What differs between model families, as data: no family has a decoding loop of its own.

Each entry names the classes to load and how many placeholder tokens the prompt needs for a clip: a prompt with too many
is silently cut short of audio by some families and fails deep inside others, so the count is checked before a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family of audio-language models.

    Attributes
    ----------
    model_types : tuple of str
        ``config.model_type`` of the checkpoint and of the model that is loaded from it.
    model_class, processor_class : str
        Names in transformers.
    audio_tokens : callable
        (model config, mel frames) -> placeholders in the prompt.
    trims_features : bool
        Whether mel frames that are only padding can be cut off before the audio tower.
    cuts_audio : bool
        Whether the processor silently cuts a clip that is longer than its window.
    has_vision : bool
        Whether the processor has image and video parts as well.
    """

    model_types: tuple[str, ...]
    model_class: str
    processor_class: str
    audio_tokens: Callable[[Any, int], int]
    trims_features: bool
    cuts_audio: bool
    has_vision: bool


def _pooled_frames(_: Any, frames: int) -> int:
    """A convolution of stride 2, then average pooling of 2: 25 tokens a second."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _windowed_frames(config: Any, frames: int) -> int:
    """Three convolutions of stride 2 within windows of mel frames: 13 tokens a second."""
    window = 2 * config.audio_config.n_window
    rest = frames % window
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return rest + frames // window * 13


FAMILIES = (
    Family(
        model_types=("qwen2_audio",),
        model_class="Qwen2AudioForConditionalGeneration",
        processor_class="Qwen2AudioProcessor",
        audio_tokens=_pooled_frames,
        trims_features=False,
        cuts_audio=True,
        has_vision=False,
    ),
    Family(
        model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
        model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        processor_class="Qwen2_5OmniProcessor",
        audio_tokens=_pooled_frames,
        trims_features=True,
        cuts_audio=True,
        has_vision=True,
    ),
    Family(
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        processor_class="Qwen3OmniMoeProcessor",
        audio_tokens=_windowed_frames,
        trims_features=False,
        cuts_audio=False,
        has_vision=True,
    ),
)


def family_of(model_type: str) -> Family | None:
    """The family of a ``config.model_type``, None where there is no entry for it."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
