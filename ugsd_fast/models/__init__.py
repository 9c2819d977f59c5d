"""Adapters over Hugging Face audio-language models."""

from ugsd_fast.models.audio_lm import DEFAULT_PROMPT, AudioLM
from ugsd_fast.models.families import FAMILIES, Family
from ugsd_fast.models.sequence import CachedSequence

__all__ = ["DEFAULT_PROMPT", "FAMILIES", "AudioLM", "CachedSequence", "Family"]
