"""Verifiers: who judges an uncertain block."""

from ugsd_fast.verifier.base import Verdict, Verifier, VerifierSession
from ugsd_fast.verifier.local import LocalVerifier
from ugsd_fast.verifier.remote import RemoteVerifier

__all__ = ["LocalVerifier", "RemoteVerifier", "Verdict", "Verifier", "VerifierSession"]
