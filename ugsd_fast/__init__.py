"""Fused decoding kernels and uncertainty-guided speculative decoding for audio-language models.

Names are imported on first use: ``import ugsd_fast`` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ugsd_fast.decoding import Decoder, Result, StreamEvent, UGSDConfig
    from ugsd_fast.errors import (
        AudioError,
        ModelError,
        UGSDError,
        VerifierRefused,
        VerifierUnavailable,
        VocabularyMismatchError,
    )
    from ugsd_fast.models import AudioLM
    from ugsd_fast.ops import use_backend
    from ugsd_fast.verifier import LocalVerifier, RemoteVerifier

__version__ = "0.1.0"

_HOME = {
    "AudioError": "errors",
    "AudioLM": "models",
    "Decoder": "decoding",
    "LocalVerifier": "verifier",
    "ModelError": "errors",
    "RemoteVerifier": "verifier",
    "Result": "decoding",
    "StreamEvent": "decoding",
    "UGSDConfig": "decoding",
    "UGSDError": "errors",
    "VerifierRefused": "errors",
    "VerifierUnavailable": "errors",
    "VocabularyMismatchError": "errors",
    "use_backend": "ops",
}
_SUBMODULES = (
    "audio",
    "cache",
    "decoding",
    "demo",
    "hf",
    "kernels",
    "models",
    "ops",
    "reference",
    "serving",
    "verifier",
)

__all__ = [
    "AudioError",
    "AudioLM",
    "Decoder",
    "LocalVerifier",
    "ModelError",
    "RemoteVerifier",
    "Result",
    "StreamEvent",
    "UGSDConfig",
    "UGSDError",
    "VerifierRefused",
    "VerifierUnavailable",
    "VocabularyMismatchError",
    "__version__",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ugsd_fast.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"ugsd_fast.{name}")
    raise AttributeError(f"module 'ugsd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBMODULES])
