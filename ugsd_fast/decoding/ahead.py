"""Drafting ahead of verdicts: behind the block in flight, and behind what its verdict may turn out to be."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ugsd_fast.decoding.block import Block, DraftBlock, block_of, gate
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.drafter import Drafter, draft_blocks
from ugsd_fast.device import on_device
from ugsd_fast.errors import attempt
from ugsd_fast.models.sequence import CachedSequence

RUNNERS_UP = 3  # tokens that are tried in the place of an uncertain one


class AheadDrafter(Drafter):
    """A drafter under ``UGSDConfig(ahead=...)``: it goes on while a block is judged (`draft_ahead`).

    What it drafts then waits in `buffer` for the verdict, of which `branches` lets it try several.

    Parameters
    ----------
    sequence, config, **options
        As in `Drafter`.

    Attributes
    ----------
    buffer : list of DraftBlock
        Tokens behind the block in flight, each a block of its own.
    """

    def __init__(self, sequence: CachedSequence, config: UGSDConfig, **options: Any):
        super().__init__(sequence, config, **options)
        self.buffer: list[DraftBlock] = []
        self.rivals = RUNNERS_UP + 1 if config.branches > 1 else 0
        # By the tokens that stand from the block's first on, and the one that follows them.
        self._forks: dict[tuple[int, int], AheadDrafter] = {}
        self._flying: Block | None = None  # that was looked at for forks
        self._doubted = 0  # tokens drafted ahead that were
        self._final = 0
        self._origin = 0  # the draw of the caption's first token: draws count with positions

    @property
    def begun(self) -> bool:
        """Whether the next block has tokens already."""
        return bool(self.buffer)

    def draft(self, length: int) -> DraftBlock:
        """Draft `length` tokens, K, in as many forward passes; `stops` may end the block before.

        Tokens that were drafted ahead come first.
        """
        if not self.buffer:
            return super().draft(length)
        count = 1
        while count < length and not self._ended(self.buffer[count - 1]) and not self._stopped(count):
            if count == len(self.buffer):
                lines = self.lines(length)
                if self not in lines:
                    break  # no room
                for line, error in zip(lines, draft_ahead(lines), strict=True):
                    if error is not None:
                        self.give_up(line, error)
            count += 1
        steps = self.buffer[:count]
        tokens = torch.cat([step.tokens for step in steps], 1)
        entropy = on_device([[step.entropy[0] for step in steps]], self._device)
        kept = [step.logits for step in steps if step.logits is not None]
        record = gate(tokens, entropy, self.config, self.eos)[0].tolist()
        rivals = [step.rivals for step in steps if step.rivals is not None]
        block = block_of(record, tokens, torch.cat(kept, 1) if kept else None, torch.cat(rivals, 1) if rivals else None)
        self.drafted = len(block)
        self._drop(len(block))
        return block

    def lines(self, room: int, block: Block | None = None) -> list[AheadDrafter]:
        """Who can draft a token more, up to `room` behind `block` (in flight): this drafter, and its forks.

        A fork is made where the drafter is uncertain, for each of its next best tokens: the verifier's correction is
        most likely one of them. It goes on as if that verdict had come, and has forks in its turn.
        """
        if room <= 0:
            return []
        tree = self._tree()
        # What cannot share a forward with others would take longer with them.
        if self.config.branches > 1 and self.processed is None and self.sequence.pack_key(self.pending) is not None:
            for line in tree:
                room_for_forks = self.config.branches - len(tree)
                doubts = line._doubts(block if line is self else None)
                tree += [line._fork(position, token) for position, token in islice(doubts, room_for_forks)]
        furthest = self._final + (len(block) if block is not None else 0) + room
        able = []
        for line in tree:
            if line._reach < furthest and line._goes_on(block if line is self else None):
                full = attempt(line.check_room, 1)
                if full is None:
                    able.append(line)
                elif line is not self:
                    self.give_up(line, full)
        return able

    @property
    def ahead(self) -> int:
        """Tokens drafted ahead of the last verdict."""
        return sum(len(line.buffer) for line in self._tree())

    def give_up(self, line: AheadDrafter, error: Exception) -> None:
        """Drop a fork that cannot go on; raise the error of this drafter itself."""
        if line is self:
            raise error
        for one in self._tree():
            one._forks = {verdict: fork for verdict, fork in one._forks.items() if fork is not line}

    def wasted(self, num_accepted: int, next_token: int) -> int:
        """How many tokens drafted ahead `commit` would throw away."""
        fork = self._forks.get((num_accepted, next_token))
        if fork is not None:
            return self.ahead - fork.ahead
        if not self._foreseen(num_accepted, next_token):
            return self.ahead
        return sum(
            fork.ahead for (position, _), fork in self._forks.items() if position < num_accepted + (next_token >= 0)
        )

    def commit(self, num_accepted: int, next_token: int) -> None:
        """Keep `num_accepted` tokens of the last block and append `next_token` (-1: none).

        What was drafted ahead stays if that is what it was drafted for, and is taken back otherwise.
        """
        forks, self._forks = self._forks, {}
        self._flying = None
        fork = forks.get((num_accepted, next_token))
        if fork is not None:
            fork.sequence.forwards = max(fork.forwards, self.forwards)
            vars(self).update(vars(fork))
            return
        stand = num_accepted + (next_token >= 0)
        self._final += stand
        if num_accepted < self.drafted:
            # How much of a block was accepted may have hung on the draws that are thrown away: new ones follow.
            self._origin = ((self.draws >> 32) + 1) << 32
        if self.buffer and self._foreseen(num_accepted, next_token):
            self._forks = {(at - stand, token): fork for (at, token), fork in forks.items() if at >= stand}
            self._drop(stand - self.drafted)
            self.drafted = 0
            return
        self.drafted += len(self.buffer)
        self._drop(len(self.buffer))
        super().commit(num_accepted, next_token)
        # The draws of a request that is alone do not depend on when verdicts came.
        self._origin = max(self._origin, self._shared_draws - self._final)
        self.draws = self._origin + self._final

    def can_commit_unread(self, length: int) -> bool:
        """Whether a block can be drafted behind an unread verdict: never, as forks and draws follow from verdicts."""
        return False

    def _fork(self, position: int, token: int) -> AheadDrafter:
        """One that goes on as if `position` tokens of the block in flight, or behind it, stood and `token` followed."""
        fork = copy.copy(self)
        fork.sequence, fork.buffer, fork._forks = self.sequence.fork(), list(self.buffer), {}
        fork.commit(position, token)
        self._forks[position, token] = fork
        return fork

    def _tree(self) -> list[AheadDrafter]:
        return [self, *(line for fork in self._forks.values() for line in fork._tree())]

    def _doubts(self, block: Block | None) -> Iterator[tuple[int, int]]:
        """Positions where this line is uncertain, with each runner-up there; a position comes once."""
        if block is not None and block is not self._flying:
            self._flying = block
            known = {position for position, _ in self._forks}
            uncertain = [k for k, nats in enumerate(block.entropy) if nats > self.config.entropy_threshold]
            for position in uncertain or [max(range(len(block)), key=block.entropy.__getitem__)]:
                if position not in known:
                    yield from ((position, token) for token in self._runners_up(block, position))
        while self._doubted < len(self.buffer):
            step, position = self.buffer[self._doubted], self.drafted + self._doubted
            self._doubted += 1
            if step.escalate:
                yield from ((position, token) for token in self._runners_up(step, 0))

    def _runners_up(self, block: Block, position: int) -> list[int]:
        assert block.rivals is not None
        best = block.rivals[0, position].tolist()
        return [token for token in best if token != block.token_ids[position] and token not in self.ends]

    def _goes_on(self, block: Block | None) -> bool:
        """Whether anything can follow what was drafted ahead, or `block`."""
        last = self.buffer[-1] if self.buffer else block
        return (block is None or len(block) == self.drafted) and (last is None or not self._ended(last))

    @property
    def _reach(self) -> int:
        return self._final + self.drafted + len(self.buffer)

    def _drop(self, count: int) -> None:
        """Forget the next `count` tokens drafted ahead."""
        del self.buffer[:count]
        self._doubted = max(self._doubted - count, 0)

    def _foreseen(self, num_accepted: int, next_token: int) -> bool:
        guessed = next_token < 0 or (bool(self.buffer) and self.buffer[0].token_ids[0] == next_token)
        return num_accepted == self.drafted and guessed

    def _stopped(self, count: int) -> bool:
        return self.stops is not None and self.stops([step.entropy[0] for step in self.buffer[:count]], None)

    def _ended(self, block: Block) -> bool:
        return bool(len(block)) and block.token_ids[-1] in self.ends


def draft_ahead(drafters: Sequence[AheadDrafter]) -> list[Exception | None]:
    """Draft one token more for each request, behind its block in flight and what was drafted ahead before.

    Returns the errors of those that cannot.
    """
    lengths = [drafter.drafted for drafter in drafters]
    steps = draft_blocks(drafters, [1] * len(drafters))
    for drafter, length, step in zip(drafters, lengths, steps, strict=True):
        drafter.drafted = length
        if not isinstance(step, Exception):
            drafter.buffer.append(step)
    return [step if isinstance(step, Exception) else None for step in steps]
