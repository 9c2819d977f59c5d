"""What a decoding run leaves behind: one record a block, the tokens with their sources, and the metrics.

Everything is derived from the block records and the counters of the two models: nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Source = Literal["edge", "accepted", "corrected", "bonus", "verifier"]


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """One block: what was drafted, what the gate said, what came out.

    Attributes
    ----------
    start : int
        Position of the block's first token among the generated tokens.
    draft_tokens : tuple of int
        Drafted tokens up to the end-of-sequence token; empty where the verifier decodes alone.
    entropy : tuple of float
        The drafter's entropy at each draft token, nats.
    uncertainty : float
        What the gate compared with the threshold, nats.
    escalated : bool
        Whether the block was sent to the verifier.
    num_accepted : int
        Draft tokens that stand: all of a block that was not escalated.
    emitted : tuple of int
        Tokens that became final: the accepted ones and, after them, the verifier's correction or bonus token.
    draft_seconds, verify_seconds : float
        Wall time spent in the drafter and waiting for the verifier. Where the verdict is read with the next block
        (``UGSDConfig(defer_verdicts=...)``), the wait for both is in that block's `draft_seconds`.
    verified : bool
        False where the block was escalated and the verifier failed: the draft stands unverified.
    wasted : int
        Tokens that were drafted ahead of this block's verdict and thrown away because of it.
    """

    start: int
    draft_tokens: tuple[int, ...]
    entropy: tuple[float, ...]
    uncertainty: float
    escalated: bool
    num_accepted: int
    emitted: tuple[int, ...]
    draft_seconds: float
    verify_seconds: float
    verified: bool
    wasted: int = 0

    @property
    def checked(self) -> bool:
        """Whether the verifier passed judgement on draft tokens of this block."""
        return self.escalated and self.verified and bool(self.draft_tokens)

    def tokens(self) -> Iterator[TokenRecord]:
        """The emitted tokens with their sources."""
        for index, token in enumerate(self.emitted):
            if index >= self.num_accepted:
                corrected = self.num_accepted < len(self.draft_tokens)
                source: Source = "corrected" if corrected else "bonus" if self.draft_tokens else "verifier"
                yield TokenRecord(token, None, source)
            else:
                yield TokenRecord(token, self.entropy[index], "accepted" if self.checked else "edge")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One emitted token, the drafter's entropy in nats (None if the verifier wrote it) and who vouches for it.

    ``source`` is ``edge`` (accepted locally), ``accepted`` (drafted, and accepted by the verifier), ``corrected`` (the
    verifier's, instead of a rejected draft token), ``bonus`` (the verifier's, after a block accepted whole) or
    ``verifier`` (no drafter took part).
    """

    token: int
    entropy: float | None
    source: Source


@dataclass(frozen=True, slots=True)
class Metrics:
    """The METRICS of one run; seconds and bytes.

    Attributes
    ----------
    acceptance_rate : float
        Accepted draft tokens / draft tokens verified; 0 where nothing was verified.
    acceptance_length : float
        Tokens emitted per verification, bonus or correction included; 0 where nothing was verified.
    escalated_share : float
        Draft tokens in escalated blocks / all draft tokens; 0 where nothing was drafted.
    uplink_bytes, downlink_bytes, audio_bytes : int
        As sent to and from the verifier, audio apart from tokens; 0 for a verifier in the same process.
    time_to_first_token, latency : float
        From the call to the first final token, and to the last.
    tokens_per_second : float
        Emitted tokens / latency.
    verifier_forwards, drafter_forwards : int
        Forward passes of each model.
    position_histogram : tuple of int
        How many verified blocks had their draft token accepted, by its position in the block.
    wasted_drafts : int
        Tokens drafted ahead and thrown away; in no block, and not among the draft tokens above.
    """

    acceptance_rate: float
    acceptance_length: float
    escalated_share: float
    uplink_bytes: int
    downlink_bytes: int
    audio_bytes: int
    time_to_first_token: float
    latency: float
    tokens_per_second: float
    verifier_forwards: int
    drafter_forwards: int
    position_histogram: tuple[int, ...]
    wasted_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that crossed the network for one request, audio apart from tokens.

    ``ledger`` says what left the device: bytes by kind (``audio``, ``features`` or ``embeddings``, ``prompt``,
    ``tokens``, ``control``).
    """

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    audio_bytes: int = 0
    ledger: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Trace:
    """The blocks of one run, in order."""

    blocks: list[BlockRecord] = field(default_factory=list)

    def tokens(self) -> list[TokenRecord]:
        """All emitted tokens with entropy and source, in order."""
        return [token for block in self.blocks for token in block.tokens()]

    def metrics(
        self,
        *,
        latency: float,
        time_to_first_token: float,
        verifier_forwards: int,
        drafter_forwards: int,
        traffic: Traffic | None = None,
    ) -> Metrics:
        """Sum the records up; `latency` and `time_to_first_token` in seconds."""
        traffic = traffic or Traffic()
        drafted = sum(len(block.draft_tokens) for block in self.blocks)
        escalated = sum(len(block.draft_tokens) for block in self.blocks if block.escalated)
        verified = [block for block in self.blocks if block.checked]
        emitted = sum(len(block.emitted) for block in self.blocks)
        longest = max((len(block.draft_tokens) for block in verified), default=0)
        return Metrics(
            acceptance_rate=_ratio(
                sum(block.num_accepted for block in verified),
                sum(len(block.draft_tokens) for block in verified),
            ),
            acceptance_length=_ratio(sum(len(block.emitted) for block in verified), len(verified)),
            escalated_share=_ratio(escalated, drafted),
            uplink_bytes=traffic.uplink_bytes,
            downlink_bytes=traffic.downlink_bytes,
            audio_bytes=traffic.audio_bytes,
            time_to_first_token=time_to_first_token,
            latency=latency,
            tokens_per_second=_ratio(emitted, latency),
            verifier_forwards=verifier_forwards,
            drafter_forwards=drafter_forwards,
            position_histogram=tuple(
                sum(block.num_accepted > position for block in verified) for position in range(longest)
            ),
            wasted_drafts=sum(block.wasted for block in self.blocks),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What `Decoder.generate` returns for one input.

    Attributes
    ----------
    text : str
        The caption, special tokens left out; empty where no tokenizer is known.
    tokens : list of int
        Generated token ids, the end-of-sequence token included where it was reached.
    trace : Trace
        One record a block.
    metrics : Metrics
        The run summed up.
    ledger : mapping of str to int
        What left the device for a verifier behind a network: bytes by kind; see `Traffic`.
    """

    text: str
    tokens: list[int]
    trace: Trace
    metrics: Metrics
    ledger: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """``text, tokens, blocks, metrics`` as JSON takes them."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "blocks": [asdict(block) for block in self.trace.blocks],
            "metrics": asdict(self.metrics),
            **({"ledger": dict(self.ledger)} if self.ledger else {}),
        }


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """Text that has become final; it is never withdrawn.

    Attributes
    ----------
    text : str
        What this event adds; concatenated over all events it is ``result.text``.
    tokens : tuple of TokenRecord
        The tokens that became final with this event.
    block : BlockRecord
        The block they come from.
    result : Result or None
        The whole run, on the last event only.
    """

    text: str
    tokens: Sequence[TokenRecord]
    block: BlockRecord
    result: Result | None = None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
