"""Verifiers: who judges an uncertain block."""

from ugsd_fast.verifier.base import Verdict, Verifier, VerifierSession
from ugsd_fast.verifier.local import LocalVerifier

__all__ = ["LocalVerifier", "Verdict", "Verifier", "VerifierSession"]
