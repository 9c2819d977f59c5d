"""How many tokens to draft next, request by request: the policies that ``UGSDConfig(adaptive=...)`` names."""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.trace import BlockRecord

# Given the entropies of a block's tokens so far, nats, and the seconds that the newest took behind the one before (None
# where nobody measured): whether the block ends here.
Stops = Callable[[Sequence[float], float | None], bool]


class BlockLength(Protocol):
    """Decides the length of each block of one request.

    Attributes
    ----------
    stops : callable or None
        Asked behind each draft token that is not the block's last by `next`; None where no entropy ends a block.
    """

    def next(self) -> int:
        """Tokens to draft at most."""
        ...

    stops: Stops | None

    def observe(self, block: BlockRecord) -> None:
        """Learn what became of a block."""
        ...


# An uncertainty of a block's tokens so far, as `ops.gate_block` reduces them.
GATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "mean": lambda entropies: sum(entropies) / len(entropies),
    "first": lambda entropies: entropies[0],
}


def block_length(config: UGSDConfig, costs: Costs | None = None, *, watches: bool = True) -> BlockLength:
    """Return a new policy for one request.

    Parameters
    ----------
    config : UGSDConfig
        Its `adaptive` is the policy's name.
    costs : Costs, optional
        What earlier requests taught.
    watches : bool
        Whether the drafter asks `BlockLength.stops` behind each token.
    """
    if config.adaptive == "aimd":
        return AdditiveIncrease(config)
    if config.adaptive == "cost":
        return BestRate(config, costs or Costs(), watches=watches)
    return Fixed(config)


class Fixed:
    """``fixed``: always ``block_size``. ``entropy``: up to ``max_block``, ending at the first uncertain token.

    The latter reads each token's entropy before it drafts the next (AdaEDL, arXiv 2410.18351, and SVIP stop on the
    drafter's entropy too). Where to stop depends on distributions, never on the drawn token, so lossless rules stay so.
    """

    def __init__(self, config: UGSDConfig):
        self._config = config
        self.stops: Stops | None = self._stops if config.adaptive == "entropy" else None

    def next(self) -> int:
        """Tokens to draft at most."""
        return self._config.longest_block

    def _stops(self, entropies: Sequence[float], _: float | None) -> bool:
        return len(entropies) >= self._config.min_block and max(entropies) > self._config.entropy_threshold

    def observe(self, block: BlockRecord) -> None:
        """Nothing to learn."""


class AdditiveIncrease:
    """``aimd``: one token more after a block that the verifier accepted whole, half as many after a rejection."""

    stops: Stops | None = None

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


class Costs:
    """What drafting and verifying took, and which draft tokens were accepted, over the requests of one decoder.

    Acceptance is told apart by the entropy of the drafter: a token belongs to the first of the classes that ends above
    it. Each class begins with a prior worth two tokens, e^(−H/2) of them accepted.
    """

    _ENDS = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # nats
    _MEMORY = 0.8  # weight of the past in the rate
    _RECENT = 15  # steps and verdicts of whose times the median counts: a machine's hiccup is none of theirs

    def __init__(self) -> None:
        middles = [0.5 * (low + high) for low, high in zip((0.0, *self._ENDS), (*self._ENDS, 5.0), strict=True)]
        self._accepted = [2 * math.exp(-0.5 * entropy) for entropy in middles]
        self._judged = [2.0] * len(middles)
        self._uncertain, self._drafted = 0.5, 4.0
        self._steps: deque[float] = deque(maxlen=self._RECENT)
        self._verdicts: deque[float] = deque(maxlen=self._RECENT)
        self.draft_seconds = 0.0  # of a token more in a block
        self.verify_seconds = 0.0  # a verdict, the way there and back included
        self._tokens = self._seconds = 0.0

    @property
    def known(self) -> bool:
        """Whether all was timed."""
        return min(self.draft_seconds, self.verify_seconds, self._seconds) > 0

    @property
    def tokens_per_second(self) -> float:
        """Of blocks that were verified, with all that a block takes beside."""
        return self._tokens / self._seconds

    @property
    def uncertain(self) -> float:
        """Share of the draft tokens whose entropy is over the threshold."""
        return self._uncertain / self._drafted

    def acceptance(self, entropy: float | None = None) -> float:
        """Share of the judged draft tokens of such an entropy that were accepted; None: of all."""
        if entropy is None:
            return sum(self._accepted) / sum(self._judged)
        index = bisect_right(self._ENDS, entropy)
        return self._accepted[index] / self._judged[index]

    def observe(self, block: BlockRecord, threshold: float) -> None:
        """Take in what became of a block's tokens."""
        self._drafted += len(block.draft_tokens)
        self._uncertain += sum(entropy > threshold for entropy in block.entropy)
        judged = block.entropy[: block.num_accepted + 1] if block.checked else ()
        for index, entropy in enumerate(judged):
            at = bisect_right(self._ENDS, entropy)
            self._judged[at] += 1
            self._accepted[at] += index < block.num_accepted

    def observe_step(self, seconds: float) -> None:
        """Take in how long one token more took."""
        self._steps.append(seconds)
        self.draft_seconds = statistics.median(self._steps)

    def observe_verdict(self, block: BlockRecord, seconds: float) -> None:
        """Take in how long a verdict took, and the block with it."""
        self._verdicts.append(block.verify_seconds)
        self.verify_seconds = statistics.median(self._verdicts)
        self._tokens = self._MEMORY * self._tokens + len(block.emitted)
        self._seconds = self._MEMORY * self._seconds + seconds


class BestRate:
    """``cost``: drafts on for as long as the next token promises more than it costs, by what was measured so far.

    A drafted block stands whole with probability S, the product of its tokens' acceptance given their entropies. If
    every block is verified, the next token adds S·a tokens on average and takes t_draft: the best rate R of tokens a
    second is reached by drafting on while S·a > R·t_draft (the marginal value theorem), and R is what was reached so
    far. With a gate, a block ends at the first token that has it escalated, unless going on may spare a verdict that
    is dearer than what is thrown away: S·e·t_verify > (1 − S)·t_draft, e being the share of uncertain tokens. While
    blocks are drafted ahead, going on costs the wait and ending costs nothing.

    Where tokens are not looked at one by one (a draft graph, models with different tokenizers), the length follows from
    the mean acceptance. Decisions follow the clock, so a run with this policy cannot be repeated exactly. They depend
    on distributions and times, never on the drawn token, so lossless rules stay so.
    """

    def __init__(
        self,
        config: UGSDConfig,
        costs: Costs,
        *,
        watches: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._config, self._costs, self._clock = config, costs, clock
        self.stops: Stops | None = self._stops if watches else None
        self._start = min(max(config.block_size, config.min_block, 2), config.longest_block)
        self._heard = False  # whether the verifier's prompt is behind
        self._time: float | None = None  # of the last block's end

    def next(self) -> int:
        """Tokens to draft at most."""
        if not self._costs.known:
            return self._start
        if self.stops:
            return self._config.longest_block
        accept = min(self._costs.acceptance(), 0.999)
        return max(range(self._config.min_block, self._config.longest_block + 1), key=lambda k: self._rate(k, accept))

    def _stops(self, entropies: Sequence[float], seconds: float | None) -> bool:
        costs, config = self._costs, self._config
        if seconds is not None and len(entropies) > 1:
            costs.observe_step(seconds)
        if not costs.known or len(entropies) < config.min_block:
            return False
        stands = math.prod(map(costs.acceptance, entropies))
        if config.always_escalate:
            return stands * costs.acceptance() <= costs.tokens_per_second * costs.draft_seconds
        if GATES[config.gate](entropies) <= config.entropy_threshold:
            return False
        spared = stands * costs.uncertain * costs.verify_seconds
        return bool(config.ahead) or spared <= (1 - stands) * costs.draft_seconds

    def observe(self, block: BlockRecord) -> None:
        """Take in times and acceptance of a block; those of prompts are not those of later blocks."""
        self._costs.observe(block, self._config.entropy_threshold)
        before, self._time = self._time, self._clock()
        if not block.checked:
            return
        if self.stops is None and block.start:
            self._costs.observe_step(block.draft_seconds / len(block.draft_tokens))
        if self._heard and before is not None:
            self._costs.observe_verdict(block, self._time - before)
        self._heard = True

    def _rate(self, length: int, accept: float) -> float:
        escalated = 1.0 if self._config.always_escalate else 1 - (1 - min(self._costs.uncertain, 1.0)) ** length
        verified = (accept - accept ** (length + 1)) / (1 - accept) + 1
        tokens = (1 - escalated) * length + escalated * verified
        return tokens / (length * self._costs.draft_seconds + escalated * self._costs.verify_seconds)
