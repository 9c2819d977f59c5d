"""Exceptions a caller may want to tell apart; each message says what, got, expected.

All of them are also the built-in exception that fits (``ValueError``, ``OSError`` or ``RuntimeError``), so code that
does not know this library still catches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UGSDError(Exception):
    """Base of every error that this library raises on purpose."""


class AudioError(UGSDError, ValueError):
    """An audio input that cannot be captioned: unreadable, empty, silent, not finite, or too long."""


class ModelError(UGSDError, ValueError):
    """A model that cannot be loaded, or cannot be decoded speculatively; the message names the reason."""


class VocabularyMismatchError(ModelError):
    """Drafter and verifier give the same token id different meanings."""


class VerifierUnavailable(UGSDError, RuntimeError):
    """The verifier did not answer; ``UGSDConfig.on_verifier_failure`` decides what happens next."""


class VerifierRefused(UGSDError, ValueError):
    """The verifier cannot be used as asked: token, uplink level, limits or protocol; trying again is of no use."""


def attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Exception:
    """What a call returns, or the exception that it raises: one of several requests that goes wrong is no other's."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error
