"""Settings of one decoding run, checked once, when they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ugsd_fast.ops import LOSSLESS_RULES

Rule = Literal["greedy", "rank", "exact", "block", "typical", "relaxed"]
Gate = Literal["max", "mean", "first"]
Adaptive = Literal["fixed", "entropy", "aimd", "cost"]
OnVerifierFailure = Literal["accept", "wait", "raise"]

_ROW_SEED = 0x9E3779B97F4A7C15  # odd: seeds of 2**64 rows differ


@dataclass(frozen=True, kw_only=True)
class UGSDConfig:
    """Uncertainty-guided speculative decoding, with the paper's defaults (arXiv 2603.11397).

    Parameters
    ----------
    block_size : int
        Tokens drafted before the gate is asked.
    entropy_threshold : float
        Nats. A block whose uncertainty is greater goes to the verifier; ``0`` sends every block whose drafter is not
        certain, ``inf`` none.
    gate : {"max", "mean", "first"}
        How the entropies of a block's tokens become its uncertainty.
    rule : {"greedy", "rank", "exact", "block", "typical", "relaxed"}
        Acceptance rule of the verifier. Only ``greedy``, ``exact`` and ``block`` are lossless, and they only together
        with ``always_escalate``: a block that the gate accepts locally was never seen by the verifier.
    rank : int
        ``rule="rank"`` accepts a draft token that is among the verifier's ``rank`` best.
    epsilon, delta : float
        ``rule="typical"`` (Medusa).
    top_n, relax_delta : int, float
        ``rule="relaxed"``: among the ``top_n`` best and at most ``relax_delta`` less probable than the best.
    always_escalate : bool
        No gate: ordinary speculative decoding.
    bonus : bool, optional
        Whether a block that is accepted whole is followed by one token of the verifier's. The default, None, adds it
        under the lossless rules and, as in the paper, not under the others.
    temperature, top_k, top_p, min_p : float, int, float, float
        Sampling of drafter and verifier alike; temperature 0 is greedy.
    seed : int
        Of the counter-based uniforms: the same seed gives the same tokens on every backend.
    adaptive : {"fixed", "entropy", "aimd", "cost"}
        How long blocks are: ``block_size`` always; up to the first token whose entropy is over the threshold; one more
        after full acceptance and half after a rejection; or what promises most tokens a second by the draft, verify and
        round-trip times and the acceptance of tokens of such an entropy so far. See `ugsd_fast.decoding.block_length`.
    min_block, max_block : int, optional
        Bounds of an adaptive block length; ``max_block`` is by default four times ``block_size``.
    ahead : int
        Most tokens drafted while a block is at a verifier behind a network, on the assumption that it stands and is
        followed by the drafter's own next token; thrown away where it is not. 0: none. A verifier in this process
        answers before anything could be drafted.
    branches : int
        Most continuations that are drafted ahead together, in the same forward passes: behind the block as drafted
        and, from 2 on, behind the drafter's next best tokens in the place of the uncertain ones, in the block and
        ahead. Where the verifier's correction is one of them, nothing of the wait is lost. Greedy drafts only.
    graph : bool
        Draft in a static cache, with a step that runs at fixed addresses: on a GPU it is captured once in a CUDA graph
        and replayed. On other devices the same step runs uncaptured. Batches decode one by one.
    defer_verdicts : bool, optional
        Whether the host leaves the verdict of a verifier in this process on the device, drafts the next block behind it
        and reads both in one copy: one wait for the device a block, escalated or not. Tokens come a block later, and
        where the correction ends the caption, that block was in vain (a sampled batch may then draw other tokens). The
        verdict is read at once where the caption or the next block's length hang on it: for a block that ends in an
        end-of-sequence token or has no room for another behind it, for streams, stopping criteria, logits processors,
        `ahead` and ``adaptive`` lengths. So it is where the drafter's cache cannot go on behind it (windows, padded
        prompts, FlashAttention) or its tokenizer is another, and with a verifier whose methods are replaced. The
        default, None, defers unless the drafter is on a CPU, where a read waits for nothing.
    eos_token_id : int or sequence of int, optional
        Ends a caption; by default what the models' own generation configs name.
    on_verifier_failure : {"accept", "wait", "raise"}
        When the verifier does not answer: keep the draft and mark it unverified, try again, or give up.

    Raises
    ------
    ValueError
        If a setting is outside its range, or a combination has no meaning; the message names field, got and expected.

    Examples
    --------
    >>> UGSDConfig(block_size=4).lossless
    False
    >>> UGSDConfig(always_escalate=True, rule="greedy").lossless
    True
    """

    block_size: int = 5
    entropy_threshold: float = 1.5
    rule: Rule = "rank"
    rank: int = 20
    gate: Gate = "max"
    always_escalate: bool = False
    bonus: bool | None = None
    epsilon: float = 0.09
    delta: float = 0.3
    top_n: int = 10
    relax_delta: float = 0.6
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    adaptive: Adaptive = "fixed"
    min_block: int = 1
    max_block: int | None = None
    ahead: int = 0
    branches: int = 1
    graph: bool = False
    defer_verdicts: bool | None = None
    eos_token_id: int | Sequence[int] | None = None
    on_verifier_failure: OnVerifierFailure = "accept"

    def __post_init__(self) -> None:
        _require(self, "block_size", _is_int(self.block_size) and self.block_size >= 1, "an integer >= 1")
        _require(self, "entropy_threshold", self.entropy_threshold >= 0, "nats >= 0")
        _require(self, "rank", _is_int(self.rank) and self.rank >= 1, "an integer >= 1")
        _require(self, "top_n", _is_int(self.top_n) and self.top_n >= 1, "an integer >= 1")
        _require(self, "epsilon", 0 <= self.epsilon <= 1, "a probability")
        _require(self, "delta", self.delta >= 0, "a number >= 0")
        _require(self, "relax_delta", 0 <= self.relax_delta <= 1, "a probability")
        _require(self, "temperature", self.temperature >= 0, "a number >= 0 (0 is greedy)")
        _require(self, "top_k", _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 is off)")
        _require(self, "top_p", 0 < self.top_p <= 1, "in (0, 1] (1 is off)")
        _require(self, "min_p", 0 <= self.min_p < 1, "in [0, 1) (0 is off)")
        _require(self, "seed", _is_int(self.seed) and 0 <= self.seed < 2**64, "an integer in [0, 2**64)")
        kinds = {"rule": Rule, "gate": Gate, "adaptive": Adaptive, "on_verifier_failure": OnVerifierFailure}
        for name, kind in kinds.items():
            _require(self, name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        _require(self, "ahead", _is_int(self.ahead) and self.ahead >= 0, "an integer >= 0")
        _require(self, "branches", _is_int(self.branches) and self.branches >= 1, "an integer >= 1")
        if self.branches > 1 and not (self.ahead and self.temperature == 0):
            raise ValueError(
                f"UGSDConfig: branches={self.branches} with ahead={self.ahead} and temperature={self.temperature}, "
                "expected ahead >= 1 and temperature 0 (a drawn token is no runner-up of another)"
            )
        _require(self, "graph", isinstance(self.graph, bool), "True or False")
        _require(self, "defer_verdicts", self.defer_verdicts in (None, True, False), "True, False or None")
        if self.ahead and self.graph:
            raise ValueError(f"UGSDConfig: ahead={self.ahead} with graph=True, expected one of them")
        _require(self, "min_block", _is_int(self.min_block) and self.min_block >= 1, "an integer >= 1")
        longest = self.max_block is None or (_is_int(self.max_block) and self.max_block >= self.min_block)
        _require(self, "max_block", longest, f"an integer >= min_block={self.min_block}")
        if self.rule == "greedy" and self.temperature > 0:
            raise ValueError(
                f"UGSDConfig: rule='greedy' with temperature={self.temperature}, expected temperature 0 "
                "(greedy compares argmaxes; use rule='exact' or 'block' to sample without loss)"
            )

    @property
    def lossless(self) -> bool:
        """Whether the output is the verifier's own: its greedy tokens, or its distribution."""
        return self.always_escalate and self.rule in LOSSLESS_RULES

    @property
    def appends_bonus(self) -> bool:
        """``bonus`` with its default resolved."""
        return self.rule in LOSSLESS_RULES if self.bonus is None else self.bonus

    @property
    def longest_block(self) -> int:
        """``max_block`` with its default resolved: most tokens that a block can have."""
        if self.adaptive == "fixed":
            return self.block_size
        return max(4 * self.block_size, self.min_block) if self.max_block is None else self.max_block

    def of_row(self, row: int) -> UGSDConfig:
        """The same settings for one row of a batch, with uniforms of its own."""
        return self if not row else replace(self, seed=(self.seed + row * _ROW_SEED) % 2**64)

    @property
    def eos_token_ids(self) -> frozenset[int] | None:
        """``eos_token_id`` as a set, None where the models decide."""
        if self.eos_token_id is None:
            return None
        return frozenset([self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(config: UGSDConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"UGSDConfig: {name} is {getattr(config, name)!r}, expected {expected}")
