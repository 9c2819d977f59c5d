"""One caption in progress: what is final, what the verifier has yet to hear of, and what the run leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ugsd_fast.decoding.ahead import AheadDrafter
from ugsd_fast.decoding.block import Block, DraftBlock
from ugsd_fast.decoding.block_length import BlockLength, Costs, block_length
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.decoding.drafter import Drafter
from ugsd_fast.decoding.processors import NO_STEERING, Steering, Stopping
from ugsd_fast.decoding.text import IncrementalText
from ugsd_fast.decoding.trace import BlockRecord, Result, StreamEvent, Trace
from ugsd_fast.decoding.translation import TranslatingDrafter
from ugsd_fast.errors import ModelError

if TYPE_CHECKING:
    from ugsd_fast.decoding.unread import PendingVerdict
    from ugsd_fast.verifier.base import Verdict, VerifierSession


@dataclass(frozen=True, slots=True)
class Given:
    """What one request is given, as `Decoder.generate` takes it.

    Attributes
    ----------
    row : int
        Index among the inputs of its call.
    rows : int or None
        How many there are; None where the call has one input that is not in a list.
    streams : bool
        Whether every event carries its text; otherwise only the last does, and text is decoded once.
    """

    audio: Any = None
    prompt: str | None = None
    inputs: Mapping[str, Tensor] | None = None
    verifier_inputs: Mapping[str, Tensor] | None = None
    max_new_tokens: int = 128
    steering: Steering = NO_STEERING
    row: int = 0
    rows: int | None = None
    streams: bool = True

    @property
    def place(self) -> str:
        """Where its call has it, such as ``audio[2]``."""
        name = "audio" if self.audio is not None else "inputs" if self.inputs is not None else "verifier_inputs"
        return f"{name}[{self.row}]"


def name_rows(rows: Sequence[Given], outcomes: Sequence[object]) -> None:
    """Add a note to each error among the outcomes of several rows that says which of them it ends."""
    errors = {id(outcome): outcome for outcome in outcomes if isinstance(outcome, Exception)}
    for error in errors.values():
        ended = [one for one, outcome in zip(rows, outcomes, strict=True) if outcome is error]
        if ended[0].rows is None:  # the only input
            continue
        numbers = ", ".join(str(one.row + 1) for one in ended)
        if len(ended) == 1:
            note = f"row {numbers} of {ended[0].rows}: {ended[0].place}"
        else:
            note = f"rows {numbers} of {ended[0].rows}, which shared a forward pass"
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10 keeps it, and shows it nowhere
            vars(error).setdefault("__notes__", []).append(note)


class Request:
    """State of one request between its blocks; the models' states are in `drafter` and `session`.

    Parameters
    ----------
    drafter : Drafter, DraftGraph, TranslatingDrafter or None
        Drafts this request; None where the verifier decodes alone.
    session : VerifierSession or None
        Judges it; None where nobody does.
    config : UGSDConfig
        Gate, bonus and block length.
    given : Given
        What it was given.
    eos_token_ids : frozenset of int
        Tokens that end the caption.
    decode : callable
        Token ids -> text.
    started : float
        ``time.perf_counter()`` when the caller asked.
    stopping : Stopping, optional
        What else may end the caption.
    costs : Costs, optional
        What earlier requests taught about block lengths, and this one adds to.
    """

    def __init__(
        self,
        drafter: Drafter | DraftGraph | TranslatingDrafter | None,
        session: VerifierSession | None,
        config: UGSDConfig,
        given: Given,
        *,
        eos_token_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        started: float,
        stopping: Stopping | None = None,
        costs: Costs | None = None,
    ):
        self.drafter = drafter
        self.session = session
        self.given = given
        self.unseen: list[int] = []  # final tokens that the verifier does not know yet
        self.tokens: list[int] = []
        self.result: Result | None = None  # once the caption has ended
        self.pending: PendingVerdict | None = None  # on the last block, which the next is drafted behind
        self._config = config
        self._eos = eos_token_ids
        self._started = started
        self._stopping = stopping
        self._first_token = 0.0
        self._length: BlockLength = block_length(config, costs, watches=isinstance(drafter, Drafter))
        if isinstance(drafter, Drafter):
            drafter.stops = self._length.stops
        late = config.defer_verdicts
        if late is None:
            late = isinstance(drafter, Drafter | DraftGraph) and drafter.device.type != "cpu"
        fixed = config.adaptive == "fixed" and not config.always_escalate
        heard = given.streams or given.steering.streamer is not None or stopping is not None  # token by token
        self._defers = late and fixed and not heard
        self._pending_times: dict[str, float] = {}
        self._trace = Trace()
        self._text = IncrementalText(decode)

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.given.max_new_tokens - len(self.tokens)

    def next_length(self) -> int:
        """Tokens to draft next."""
        return min(self._length.next(), self.room)

    def escalates(self, block: Block) -> bool:
        """Whether a block goes to the verifier."""
        return self.session is not None and (self._config.always_escalate or block.escalate)

    def wants_bonus(self, block: Block) -> bool:
        """Whether a token of the verifier's is to follow a block that stands whole."""
        if not block.width:
            return True
        # Where an unread block ends is for its verifier to see.
        ended = isinstance(block, DraftBlock) and block.token_ids[-1] in self._eos
        return self._config.appends_bonus and block.width < self.room and not ended

    def may_defer(self, block: Block) -> bool:
        """Whether the next block can be drafted before the verdict on this one is read.

        It can where the caption surely goes on, and by a block that is as long whatever becomes of this one.
        """
        return (
            self._defers
            and isinstance(self.drafter, Drafter | DraftGraph)
            and self.room - len(block) - self._config.appends_bonus >= self._config.block_size
            and block.token_ids[-1] not in self._eos
            and self.drafter.can_commit_unread(self._config.block_size)
        )

    def defer(self, pending: PendingVerdict, *, draft_seconds: float, verify_seconds: float) -> None:
        """Go on behind a verdict that nobody has read; `settle_pending` takes it."""
        assert isinstance(self.drafter, Drafter | DraftGraph)
        self.drafter.commit_unread(pending.accepted)
        self.pending = pending
        self._pending_times = {"draft_seconds": draft_seconds, "verify_seconds": verify_seconds}

    def settle_pending(self, verdict: Verdict | Exception) -> StreamEvent:
        """Take the outcome of the block whose verdict was pending."""
        assert self.pending is not None
        block, self.pending = self.pending.block, None
        return self.settle(block, verdict, **self._pending_times)

    def settle(
        self,
        block: Block,
        verdict: Verdict | Exception | None,
        *,
        draft_seconds: float,
        verify_seconds: float,
    ) -> StreamEvent:
        """Take a block's outcome: `verdict` of the verifier, None where it was not asked or did not answer.

        Raises
        ------
        ModelError
            If nothing follows; whatever the verifier answered, if it is an exception.
        """
        if isinstance(verdict, Exception):
            raise verdict
        escalated = self.escalates(block)
        num_accepted = verdict.num_accepted if verdict else len(block)
        next_token = verdict.next_token if verdict else -1
        emitted = block.token_ids[:num_accepted] + ((next_token,) if next_token >= 0 else ())
        if not emitted:
            raise ModelError("Decoder: the verifier's logits have no finite value, expected a next token")
        stopped = False
        if self._stopping is not None:
            kept, stopped = self._stopping.kept(self.tokens, emitted)
            emitted, num_accepted = emitted[:kept], min(num_accepted, kept)
        last = stopped or len(emitted) >= self.room or emitted[-1] in self._eos
        wasted = 0
        if last and isinstance(self.drafter, Drafter | DraftGraph):
            wasted = self.drafter.ahead
        elif isinstance(self.drafter, AheadDrafter):
            wasted = self.drafter.wasted(num_accepted, next_token)
        record = BlockRecord(
            start=len(self.tokens),
            draft_tokens=block.token_ids,
            entropy=block.entropy,
            uncertainty=block.uncertainty,
            escalated=escalated,
            num_accepted=num_accepted,
            emitted=emitted,
            draft_seconds=draft_seconds,
            verify_seconds=verify_seconds,
            verified=not escalated or verdict is not None,
            wasted=wasted,
        )
        self._trace.blocks.append(record)
        self._length.observe(record)
        self.tokens.extend(emitted)
        self.unseen = [] if verdict else [*self.unseen, *emitted]
        latency = time.perf_counter() - self._started
        self._first_token = self._first_token or latency
        delta = ""
        if self.given.streams or last:
            delta = self._text.extend(emitted, final=last)
        else:
            self._text.append(emitted)
        if last:
            self._finish(latency)
        elif self.drafter is not None:
            self.drafter.commit(num_accepted, next_token)
        return StreamEvent(delta, tuple(record.tokens()), record, self.result)

    def close(self) -> None:
        """Free what the verifier keeps."""
        if self.session is not None:
            self.session.close()

    def _finish(self, latency: float) -> None:
        session, drafter = self.session, self.drafter
        metrics = self._trace.metrics(
            latency=latency,
            time_to_first_token=self._first_token,
            verifier_forwards=session.forwards if session else 0,
            drafter_forwards=drafter.forwards if drafter else 0,
            traffic=session.traffic if session else None,
        )
        ledger = session.traffic.ledger if session else {}
        self.result = Result(self._text.text, self.tokens, self._trace, metrics, ledger)
