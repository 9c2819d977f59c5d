"""Adapters over Hugging Face audio-language models."""

from ugsd_fast.models.audio_lm import DEFAULT_PROMPT, AudioLM
from ugsd_fast.models.families import FAMILIES, REFUSED, Family
from ugsd_fast.models.sequence import CachedSequence

__all__ = ["DEFAULT_PROMPT", "FAMILIES", "REFUSED", "AudioLM", "CachedSequence", "Family"]
