"""How many tokens to draft next, request by request: the policies that ``UGSDConfig(adaptive=...)`` names."""

from __future__ import annotations

from typing import Protocol

from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.trace import BlockRecord


class BlockLength(Protocol):
    """Decides the length of each block of one request."""

    def next(self) -> int:
        """Tokens to draft at most."""
        ...

    def observe(self, block: BlockRecord) -> None:
        """Learn what became of a block."""
        ...


def block_length(config: UGSDConfig) -> BlockLength:
    """Return a new policy for one request."""
    if config.adaptive == "aimd":
        return AdditiveIncrease(config)
    if config.adaptive == "cost":
        return BestRate(config)
    return Fixed(config)


class Fixed:
    """``fixed``: always ``block_size``. ``entropy``: up to ``max_block``, ending at the first uncertain token.

    The latter reads each token's entropy before it drafts the next (AdaEDL, arXiv 2410.18351, and SVIP stop on the
    drafter's entropy too). Where to stop depends on distributions, never on the drawn token, so lossless rules stay so.
    """

    def __init__(self, config: UGSDConfig):
        self._length = config.longest_block

    def next(self) -> int:
        """Tokens to draft at most."""
        return self._length

    def observe(self, block: BlockRecord) -> None:
        """Nothing to learn."""


class AdditiveIncrease:
    """``aimd``: one token more after a block that the verifier accepted whole, half as many after a rejection."""

    def __init__(self, config: UGSDConfig):
        self._shortest, self._longest = config.min_block, config.longest_block
        self._length = config.block_size

    def next(self) -> int:
        """Tokens to draft."""
        return self._length

    def observe(self, block: BlockRecord) -> None:
        """Follow the verifier's judgement; blocks that it did not see change nothing."""
        if not block.checked:
            return
        rejected = block.num_accepted < len(block.draft_tokens)
        length = self._length // 2 if rejected else self._length + 1
        self._length = min(max(length, self._shortest), self._longest)


class BestRate:
    """``cost``: the length with the most expected tokens a second, from what was measured so far in this request.

    A draft token is accepted with probability a, and is uncertain with probability e, both estimated from the tokens
    seen. A block of K is then escalated with probability P = 1 − (1 − e)^K and takes K·t_draft + P·t_verify; it emits K
    tokens unescalated, and else the accepted prefix, (a − a^{K+1}) / (1 − a) on average, and one of the verifier's.
    t_verify is the wait for a verdict: a network's round trip is in it. Lengths follow the clock, so a run with this
    policy cannot be repeated exactly.
    """

    _MEMORY = 0.7  # weight of the past in the running means of seconds

    def __init__(self, config: UGSDConfig):
        self._lengths = range(config.min_block, config.longest_block + 1)
        self._start = min(max(config.block_size, config.min_block), config.longest_block)
        self._always, self._threshold = config.always_escalate, config.entropy_threshold
        self._draft_seconds = self._verify_seconds = 0.0
        self._accepted, self._judged = 3.0, 4.0  # a prior worth four tokens
        self._uncertain, self._drafted = 0.5, 4.0

    def next(self) -> int:
        """Tokens to draft."""
        if not self._verify_seconds or not self._draft_seconds:
            return self._start
        return max(self._lengths, key=self._rate)

    def observe(self, block: BlockRecord) -> None:
        """Take in times and acceptance of a block."""
        count = len(block.draft_tokens)
        if not count:
            return
        self._draft_seconds = self._mean(self._draft_seconds, block.draft_seconds / count)
        self._drafted += count
        self._uncertain += sum(entropy > self._threshold for entropy in block.entropy)
        if block.checked:
            self._verify_seconds = self._mean(self._verify_seconds, block.verify_seconds)
            self._accepted += block.num_accepted
            self._judged += min(block.num_accepted + 1, count)

    def _mean(self, mean: float, value: float) -> float:
        return value if not mean else self._MEMORY * mean + (1 - self._MEMORY) * value

    def _rate(self, length: int) -> float:
        accept = min(self._accepted / self._judged, 0.999)
        escalated = 1.0 if self._always else 1 - (1 - min(self._uncertain / self._drafted, 1.0)) ** length
        verified = (accept - accept ** (length + 1)) / (1 - accept) + 1
        tokens = (1 - escalated) * length + escalated * verified
        return tokens / (length * self._draft_seconds + escalated * self._verify_seconds)
