"""What the decoding loop asks of a verifier, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import LogitsProcessor

from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.trace import Traffic


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of one block.

    Attributes
    ----------
    num_accepted : int
        Draft tokens that stand, counted from the block's start.
    next_token : int
        The correction or bonus token that follows them; -1 where the block stands whole and no bonus was asked for.
    """

    num_accepted: int
    next_token: int


class VerifierSession(Protocol):
    """One request at a verifier, which keeps its own prompt, audio and cache.

    One behind a network has two methods more. ``submit`` asks as `verify` does, and returns a future. ``begin()`` is
    called once, at most, as soon as it is certain that a block will be escalated, so that the verifier can have the
    prompt computed when it comes; what goes wrong there is for `verify` to tell.
    """

    @property
    def traffic(self) -> Traffic:
        """Bytes that crossed the network so far."""
        ...

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        ...

    def verify(self, committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Verdict:
        """Judge a block in one forward pass, over everything not seen before and the block.

        Parameters
        ----------
        committed : sequence of int
            Final tokens since the last call that the verifier does not know yet: those accepted without it. Its own
            correction or bonus token is not among them.
        block : DraftBlock
            Draft tokens, possibly none: then the verdict's ``next_token`` is the verifier's own next token.
        bonus : bool
            Whether a block that stands whole is followed by a token of the verifier's.

        Raises
        ------
        VerifierUnavailable
            If no verdict could be had. The session stays as it was before the call.
        """
        ...

    def close(self) -> None:
        """Free the session's cache."""
        ...


class Verifier(Protocol):
    """A model that judges drafts: in this process (`LocalVerifier`) or behind a network (`RemoteVerifier`).

    One that can judge blocks of several sessions at once has a ``verify_batch``, too: see `LocalVerifier.verify_batch`.
    One whose ``reads_blocks`` is true is given each `UnreadBlock` as it is under ``always_escalate``, and reads it with
    its verdict; others are given blocks that were read.
    """

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a caption."""
        ...

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest audio that it takes, None where there is no limit."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, None where none is known."""
        ...

    def open(
        self,
        config: UGSDConfig,
        *,
        audio: Any = None,
        prompt: str | None = None,
        inputs: Mapping[str, Tensor] | None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
    ) -> VerifierSession:
        """Start a session on audio and prompt, or on prepared inputs. Nothing is computed before the first block.

        Raises
        ------
        ValueError
            If there are logits processors and the verifier cannot apply them.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens."""
        ...
