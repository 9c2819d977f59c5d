"""Asking a verifier for verdicts, one or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ugsd_fast.decoding.drafter import Block, DraftBlock, Drafter, UnreadBlock, draft_ahead
from ugsd_fast.errors import attempt

if TYPE_CHECKING:
    from ugsd_fast import ops
    from ugsd_fast.verifier.base import Verdict


class VerifyCall(NamedTuple):
    """What `VerifierSession.verify` is asked: the session, and its arguments."""

    session: Any
    committed: Sequence[int]
    block: Block
    bonus: bool


@dataclass(frozen=True, slots=True)
class PendingVerdict:
    """A verdict that only the device knows so far.

    Attributes
    ----------
    session : LocalSession
        Which can do nothing else before it is read.
    block : DraftBlock or UnreadBlock
        What is judged.
    accepted : Acceptance
        Of a batch of one.
    """

    session: Any
    block: Block
    accepted: ops.Acceptance

    @property
    def notes(self) -> Tensor:
        """What the host has to know, float64: the verdict, and the block where nobody has read it."""
        verdict = torch.cat([self.accepted.num_accepted, self.accepted.next_token]).double()  # exact for token ids
        block = self.block
        return torch.cat([verdict, block.record.to(verdict.device)]) if isinstance(block, UnreadBlock) else verdict

    def read(self, notes: Sequence[float] | None = None) -> Verdict:
        """The verdict, given its notes on the host, or with a copy of its own."""
        return self.session.settle(self.block, self.notes.tolist() if notes is None else notes)


def verify_ahead(
    calls: Sequence[VerifyCall], drafters: Sequence[Drafter], rooms: Sequence[int]
) -> list[Verdict | Exception]:
    """Verdicts as `verify_calls` gives them; while they are on their way, up to `rooms` tokens are drafted ahead.

    All that is drafted ahead shares its forward passes, the branches of one request too.
    """
    futures: list[Future[Verdict]] = [
        session.submit(committed, block, bonus=bonus) for session, committed, block, bonus in calls
    ]
    try:
        return _wait_drafting(calls, drafters, rooms, futures)
    except BaseException:
        for future in futures:
            future.cancel()  # nobody will hear of it
        raise


def _wait_drafting(
    calls: Sequence[VerifyCall], drafters: Sequence[Drafter], rooms: Sequence[int], futures: Sequence[Future[Verdict]]
) -> list[Verdict | Exception]:
    failed: dict[int, Exception] = {}
    while waiting := [index for index, future in enumerate(futures) if index not in failed and not future.done()]:
        able = [(index, line) for index in waiting for line in drafters[index].lines(rooms[index], calls[index].block)]
        if able:
            for (index, line), error in zip(able, draft_ahead([line for _, line in able]), strict=True):
                given_up = None if error is None else attempt(drafters[index].give_up, line, error)
                if given_up is not None:
                    failed[index] = given_up
                    futures[index].cancel()
        else:
            wait([futures[index] for index in waiting])
    return [failed[index] if index in failed else attempt(future.result) for index, future in enumerate(futures)]


def verify_calls(verifier: Any, calls: Sequence[VerifyCall]) -> list[Verdict | Exception]:
    """Verdicts of several sessions of one verifier, in the order of the calls; one that cannot be had is an exception.

    A verifier with a ``verify_batch`` is asked once.
    """
    if len(calls) > 1 and hasattr(verifier, "verify_batch"):
        return verifier.verify_batch(calls)
    return [attempt(session.verify, committed, block, bonus=bonus) for session, committed, block, bonus in calls]


def read_together(
    pending: Sequence[PendingVerdict | Exception], blocks: Sequence[UnreadBlock | Exception]
) -> tuple[list[Verdict | Exception], list[DraftBlock | Exception]]:
    """Verdicts and blocks that only the device knows so far, in one copy to the host; errors stay where they are."""
    notes = [None if isinstance(one, Exception) else one.notes for one in pending]
    records = [None if isinstance(block, Exception) else block.record for block in blocks]
    known = [tensor for tensor in (*notes, *records) if tensor is not None]
    host = torch.cat([tensor.to(known[0].device) for tensor in known]).tolist() if known else []
    ends = accumulate((0 if tensor is None else len(tensor) for tensor in (*notes, *records)), initial=0)
    parts = [host[start:end] for start, end in pairwise(ends)]
    return (
        [one if isinstance(one, Exception) else attempt(one.read, part) for one, part in zip(pending, parts)],
        [
            block if isinstance(block, Exception) else attempt(block.read, part)
            for block, part in zip(blocks, parts[len(pending) :], strict=True)
        ],
    )
