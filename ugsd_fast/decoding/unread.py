"""Verdicts that only the device knows so far: how a drafter goes on behind them, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.block import Block, DraftBlock, UnreadBlock
from ugsd_fast.errors import attempt

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verdict


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


@dataclass(frozen=True, slots=True)
class UnreadVerdict:
    """A block whose verdict the host has not read yet.

    Attributes
    ----------
    base : int
        Tokens that were in the drafter's cache before it.
    drafted : int
        Its tokens; all but the last came into the cache while it was drafted.
    """

    base: int
    drafted: int

    def cached(self, num_accepted: int, next_token: int) -> int:
        """Tokens in the cache once the next forward has been given what follows it, by the verdict."""
        at_once = self.drafted - 1
        return self.base + min(num_accepted, at_once) + 1 + (num_accepted > at_once and next_token >= 0)


class Behind(NamedTuple):
    """What a drafter has to do to go on behind a verdict that only the device knows.

    Attributes
    ----------
    rejected : LongTensor[1]
        Cached tokens to forget.
    fed : LongTensor[1, 2]
        For the next forward: the last draft token and its successor where the block stands whole and has one, or else
        the one token that follows and any other, which is to be forgotten.
    new : LongTensor[1]
        How many of these stand.
    """

    rejected: Tensor
    fed: Tensor
    new: Tensor


def behind_unread(accepted: ops.Acceptance, last: Tensor, drafted: int, last_token: int) -> Behind:
    """How to go on behind the verdict (of a batch of one) on `drafted` tokens, the newest of which, [1], is `last`."""
    num_accepted, following = accepted.num_accepted.to(last.device), accepted.next_token.to(last.device)
    whole = num_accepted == drafted
    fed = following.clamp(0, last_token)
    return Behind(
        rejected=(drafted - 1 - num_accepted).clamp(min=0),
        fed=torch.stack([torch.where(whole, last, fed), fed], 1),
        new=1 + (whole & (following >= 0)),
    )
