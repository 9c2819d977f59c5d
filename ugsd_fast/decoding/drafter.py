"""The edge model's side of the loop: draft a block, hear the gate, take back what was rejected."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.block import DraftBlock, UnreadBlock, block_of, gate
from ugsd_fast.decoding.block_length import Stops, block_length
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.processors import Processed
from ugsd_fast.decoding.sampling import RULES_WITH_DRAFT_LOGITS, draw, filter_logits
from ugsd_fast.decoding.unread import UnreadVerdict, behind_unread
from ugsd_fast.device import on_device
from ugsd_fast.errors import attempt
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.sequence import CachedSequence


class Drafter:
    """Drafts the continuation of one request.

    The steps of a block follow each other without a look at their results: tokens, entropies and the gate's decision
    come to the host together, in one read a block (`stops` looks at each token's entropy, too, and so does
    `on_escalation`, until it is called).

    Parameters
    ----------
    sequence : CachedSequence
        A sequence of the edge model, on its own prompt and audio.
    config : UGSDConfig
        Sampling, gate and threshold.
    eos_token_ids : frozenset of int
        Tokens that end a caption.
    vocab_size : int
        Columns of the edge model's logits; a verifier's token beyond them cannot be fed to it.
    processed : Processed, optional
        What its logits go through before a token is drawn.

    Attributes
    ----------
    on_escalation : callable or None
        Called once, before the next step, when a block is certain to be escalated whatever else it gets.
    """

    def __init__(
        self,
        sequence: CachedSequence,
        config: UGSDConfig,
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
        processed: Processed | None = None,
    ):
        self.sequence = sequence
        self.config = config
        self.eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self.pending = torch.zeros(1, 0, dtype=torch.long, device=device)  # final, but not in the cache yet
        self.drafted = 0  # length of the block in flight; all but the last token drafted are in the cache
        self.draws = 0
        self._shared_draws = 0  # draws below may be other requests'
        self.ends = eos_token_ids
        self.processed = processed
        self._unread: UnreadVerdict | None = None
        self._new: Tensor | None = None  # [1]: how many of two pending tokens stand, where only the device knows it
        self.stops: Stops | None = block_length(config, watches=False).stops  # whether its entropies end a block
        self.on_escalation: Callable[[], None] | None = None
        self.last_token = vocab_size - 1
        self.rivals = 0  # how many of each position's best tokens a block keeps
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where it drafts."""
        return self._device

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self.sequence.forwards

    @property
    def begun(self) -> bool:
        """Whether the next block has tokens already."""
        return False

    def draft(self, length: int) -> DraftBlock:
        """Draft `length` tokens, K, in as many forward passes; `stops` may end the block before."""
        block = draft_blocks([self], [length])[0]
        if isinstance(block, Exception):
            raise block
        return block

    def check_room(self, length: int) -> None:
        """Raise `ModelError` unless a block of `length` tokens can be drafted."""
        self.sequence.check_room(self.pending.shape[1] + length - 1)

    def fitting(self, length: int) -> int:
        """`length`, or fewer where a block may end before and no more have room."""
        if self.stops is None or attempt(self.check_room, length) is None:
            return length
        fewer = range(length - 1, min(self.config.min_block, length) - 1, -1)
        return next((n for n in fewer if attempt(self.check_room, n) is None), length)

    @property
    def ahead(self) -> int:
        """Tokens drafted ahead of the last verdict."""
        return self.drafted if self._unread else 0

    def commit(self, num_accepted: int, next_token: int) -> None:
        """Keep `num_accepted` tokens of the last block and append `next_token` (-1: none)."""
        if self._unread is not None:
            self.sequence.close(self._unread.cached(num_accepted, next_token) + self.drafted - 1)
            self._unread = None
            return
        cached = self.drafted - 1
        if num_accepted < cached:
            self.sequence.rollback(cached - num_accepted)
        if self.processed is not None:
            self.processed.truncate(self.processed.length - self.drafted + num_accepted)
            if next_token >= 0:
                self.processed.append(on_device([[next_token]], self._device))
        kept = self.pending[:, : num_accepted - cached] if num_accepted > cached else self.pending[:, :0]
        if next_token >= 0:
            fed = torch.full((1, 1), min(next_token, self.last_token), dtype=torch.long, device=self._device)
            kept = torch.cat([kept, fed], dim=1)
        self.pending = kept
        self.drafted = 0

    def can_commit_unread(self, length: int) -> bool:
        """Whether a block of `length` tokens can be drafted behind the last one before its verdict is known."""
        if not isinstance(self.sequence, CachedSequence) or not self.sequence.can_be_open or self.processed is not None:
            return False
        return attempt(self.sequence.check_room, length + 1) is None

    @torch.inference_mode()
    def commit_unread(self, accepted: ops.Acceptance) -> None:
        """Go on behind a verdict that nobody has read; `commit` follows when it is known, behind the next block.

        Parameters
        ----------
        accepted : Acceptance
            The verdict on the last block: ``num_accepted`` and ``next_token`` [1], on any device.
        """
        behind = behind_unread(accepted, self.pending[0], self.drafted, self.last_token)
        self._unread = UnreadVerdict(self.sequence.length - self.drafted + 1, self.drafted)
        self.sequence.rollback_unread(behind.rejected)
        self.pending, self._new = behind.fed, behind.new
        self.drafted = 0


def draft_unread(drafters: Sequence[Drafter], lengths: Sequence[int]) -> list[UnreadBlock | Exception]:
    """What `draft_blocks` returns, with nothing read by the host."""
    return _draft(drafters, lengths, read=False)


def draft_blocks(drafters: Sequence[Drafter], lengths: Sequence[int]) -> list[DraftBlock | Exception]:
    """Draft a block for each of several requests, step by step together: one forward pass a step for all of them.

    Parameters
    ----------
    drafters : sequence of Drafter
        Of one edge model and one config, but for the seed.
    lengths : sequence of int
        Tokens to draft for each, at least 1. A request whose block is complete leaves the later steps.

    Returns
    -------
    list of DraftBlock or Exception
        The error of a request that has no room for its block, or whose logits have no finite value.
    """
    return _draft(drafters, lengths, read=True)


@torch.inference_mode()
def _draft(drafters: Sequence[Drafter], lengths: Sequence[int], *, read: bool) -> list[Any]:
    lengths = [one.fitting(length) for one, length in zip(drafters, lengths, strict=True)]
    roomy = [attempt(one.check_room, length) for one, length in zip(drafters, lengths, strict=True)]
    if any(roomy):
        able = [row for row, error in enumerate(roomy) if error is None]
        rest = [drafters[row] for row in able], [lengths[row] for row in able]
        blocks = iter(_draft(*rest, read=read) if able else [])
        return [next(blocks) if error is None else error for error in roomy]
    config, device = drafters[0].config, drafters[0].pending.device
    watched = any(drafter.stops for drafter in drafters)
    rows, width = len(drafters), max(lengths)
    offset = max(drafter.draws for drafter in drafters)  # rows of one draw differ, so must the draws of one row
    tokens: list[Tensor] = []
    entropies: list[Tensor] = []
    seen: list[list[float]] = [[] for _ in drafters]  # entropies, of rows that look at them
    logits: list[list[Tensor]] = [[] for _ in drafters]
    rivals: list[list[Tensor]] = [[] for _ in drafters]
    active = list(range(rows))
    clock = time.perf_counter()
    for step in range(width):
        if tokens:
            _foretell(drafters, tokens, entropies)
        at = drafters if len(active) == rows else [drafters[row] for row in active]
        z = _forward(at)
        if at[0].processed is not None:
            rows_of_z = zip(at, z.split(1), strict=True)
            z = torch.cat([one.processed.scores(own) for one, own in rows_of_z if one.processed is not None])
        token, entropy = draw(z, config, offset + step)
        fed = token.clamp(min=0, max=at[0].last_token)[:, None]  # a row with nothing finite draws -1
        for one, own in zip(at, fed.split(1) if len(at) > 1 else (fed,), strict=True):
            one.pending = own
            if one.processed is not None:
                one.processed.append(own)
        if config.rule in RULES_WITH_DRAFT_LOGITS:
            for row, filtered in zip(active, filter_logits(z, config).split(1), strict=True):
                logits[row].append(filtered)
        if at[0].rivals:
            for row, best in zip(active, z.topk(min(at[0].rivals, z.shape[-1])).indices.split(1), strict=True):
                rivals[row].append(best)
        if watched and step + 1 < width:
            nats = entropy.tolist()
            before, clock = clock, time.perf_counter()
            for row, value in zip(active, nats, strict=True):
                seen[row].append(value)
                stops = drafters[row].stops
                if stops is not None and stops(seen[row], clock - before):
                    lengths[row] = step + 1
        if len(active) < rows:
            where = on_device(active, device)
            token = token.new_zeros(rows).index_copy_(0, where, token)
            entropy = entropy.new_zeros(rows).index_copy_(0, where, entropy)
        tokens.append(token)
        entropies.append(entropy)
        active = [row for row in active if lengths[row] > step + 1]
        if not active:
            break
    for drafter, length in zip(drafters, lengths, strict=True):
        drafter.drafted = length
        drafter.draws = offset + len(tokens)
        if rows > 1:
            drafter._shared_draws = drafter.draws
    drafted, entropy = torch.stack(tokens, 1), torch.stack(entropies, 1)  # [rows, K]
    ends = None if min(lengths) == drafted.shape[1] else on_device(lengths, device)
    records: Any = gate(drafted, entropy, config, drafters[0].eos, ends)
    kept = [torch.stack(own, 1) if own else None for own in logits]
    if not read:
        drafted = drafted.clamp(min=0)  # a verifier cannot be fed what nothing finite was drawn from
        return [
            UnreadBlock(drafted[row : row + 1, :length], kept[row], records[row], drafters[row].ends)
            for row, length in enumerate(lengths)
        ]
    records = records.tolist()
    return [
        attempt(
            block_of,
            record,
            drafted[row : row + 1, :length],
            kept[row],
            torch.stack(rivals[row], 1) if rivals[row] else None,
        )
        for row, (record, length) in enumerate(zip(records, lengths, strict=True))
    ]


def _forward(drafters: Sequence[Drafter]) -> Tensor:
    """Append what is pending of each request; the logits [rows, V] behind it."""
    keep = [1 if one._new is None else 2 for one in drafters]
    z = forward_packed([one.sequence for one in drafters], [one.pending for one in drafters], keep)
    if max(keep) == 1:
        return z
    rows = []
    for one, first in zip(drafters, accumulate(keep, initial=0), strict=False):
        if one._new is None:
            rows.append(torch.full((1,), first, device=z.device))
        else:
            rows.append(one._new + (first - 1))
            one.sequence.rollback_unread(2 - one._new)
            one._new = None
    return z.index_select(0, torch.cat(rows))


def _foretell(drafters: Sequence[Drafter], tokens: list[Tensor], entropies: list[Tensor]) -> None:
    """Tell those that want to know that their block, of which this is the beginning, will be escalated.

    Once an entropy is over the threshold, so is the greatest; a mean can fall again. What is behind an end-of-sequence
    token does not count.
    """
    config = drafters[0].config
    if config.gate == "mean" or config.adaptive == "entropy" or (config.gate == "first" and len(tokens) > 1):
        return  # unknown before the block is complete, complete with that token, or known since the first
    if all(drafter.on_escalation is None for drafter in drafters):
        return
    records = gate(torch.stack(tokens, 1), torch.stack(entropies, 1), config, drafters[0].eos)
    for drafter, escalates in zip(drafters, records[:, 2].tolist(), strict=True):
        if escalates and drafter.on_escalation is not None:
            tell, drafter.on_escalation = drafter.on_escalation, None
            tell()
