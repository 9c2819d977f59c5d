"""A verifier behind a network: ``ugsd-fast serve``."""

from __future__ import annotations

from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.security import TLS, Tokens

__all__ = ["TLS", "Limits", "Tokens"]
