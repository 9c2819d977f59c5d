"""The exact output law of an acceptance rule, found by driving an implementation over the unit cube of uniforms.

An implementation is seen from outside only: it maps tokens, logits and uniforms to (accepted, next token). Both
decisions are monotone in one uniform when the others are fixed, so their thresholds are found by bisection, to
2^-32, and nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from tests.reference.definitions import HIGH, Array

Accept = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""(tokens [B, K], target logits, draft logits or None, draft logsumexp or None, uniforms [B, K + 1]) -> (n, next)."""

BISECTIONS = 32


@dataclass(frozen=True)
class Models:
    """Verifier and drafter as trees: ``p[i]`` has shape ``[V] * (i + 1)``, the law of token i after each context.

    The drafter's vocabulary W may be larger than V: its tokens from V on are none of the verifier's.
    """

    p: list[Array]
    q: list[Array]

    @property
    def block(self) -> int:
        return len(self.q)

    @property
    def vocabulary(self) -> int:
        return self.p[0].shape[-1]

    @property
    def drafter_vocabulary(self) -> int:
        return self.q[0].shape[-1]


def random_models(
    vocabulary: int, block: int, seed: int, *, special: str = "plain", drafter_vocabulary: int | None = None
) -> Models:
    """Models whose probabilities are multiples of 1/64, exact in every float format."""
    rng = np.random.default_rng(seed)
    width = drafter_vocabulary or vocabulary

    def tree(depth: int, columns: int, sparse: bool) -> Array:
        rows = rng.dirichlet(np.full(columns, 0.3 if sparse else 1.0), size=vocabulary**depth)
        counts = np.stack([rng.multinomial(64, row) for row in rows])
        return counts.reshape(*[vocabulary] * depth, columns) / 64

    p = [tree(i, vocabulary, special == "zeros") for i in range(block + 1)]
    q = [tree(i, width, special == "zeros") for i in range(block)]
    if special == "equal":
        q = [level.copy() for level in p[:block]]
    if special == "disjoint":
        half = vocabulary // 2 or 1
        for level in p[:block]:
            level[..., half:] = 0
            level[..., 0] += 1 - level.sum(-1)
        for level in q:
            level[..., :half] = 0
            level[..., -1] += 1 - level.sum(-1)
    return Models(p, q)


@dataclass(frozen=True)
class Problem:
    """Every block that can be drafted, as rows of one batch."""

    drafts: Array  # [X, K]
    weight: Array  # [X], probability that the drafter gives it
    p: Array  # [X, K + 1, V]
    q: Array  # [X, K, W]

    @classmethod
    def of(cls, models: Models) -> Problem:
        """Unroll the trees along every draft; contexts after a token that is none are never reached."""
        drafts = np.array(list(product(range(models.drafter_vocabulary), repeat=models.block)))
        contexts = [tuple(min(t, models.vocabulary - 1) for t in draft) for draft in drafts]
        p = np.stack([[models.p[i][c[:i]] for i in range(models.block + 1)] for c in contexts])
        q = np.stack([[models.q[i][c[:i]] for i in range(models.block)] for c in contexts])
        weight = np.ones(len(drafts))
        for i in range(models.block):
            weight *= q[np.arange(len(drafts)), i, drafts[:, i]]
        return cls(drafts, weight, p, q)

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target logits, draft logits over the verifier's columns, and the draft's logsumexp, 0."""
        with np.errstate(divide="ignore"):
            target = torch.from_numpy(np.log(self.p)).float()
            draft = torch.from_numpy(np.log(self.q[..., : self.p.shape[-1]])).float()
        return target, draft.contiguous(), torch.zeros(draft.shape[:2])


def bisect(reached: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return, for each element, sup{u : reached(u)} for a predicate that holds up to a point in [0, 1)."""
    low, high = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        holds = reached(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where(reached(torch.full(shape, HIGH, dtype=torch.float64)), 1.0, (low + high) / 2)


def acceptance_law(rule: str, accept: Callable[[Tensor], tuple[Tensor, Tensor]], rows: int, block: int) -> Tensor:
    """The probability of each accepted length of each row: ``[rows, K + 1]``.

    ``exact`` stops at the first uniform at or over its threshold; ``block`` takes the last one under it.
    """
    thresholds = torch.empty(rows, block, dtype=torch.float64)
    for i in range(block):
        uniforms = torch.full((rows, block + 1), HIGH, dtype=torch.float64)
        if rule == "exact":
            uniforms[:, :i] = 0.0

        def reached(u: Tensor, i: int = i, uniforms: Tensor = uniforms) -> Tensor:
            uniforms[:, i] = u
            return accept(uniforms)[0] > i

        thresholds[:, i] = bisect(reached, (rows,))
    law = torch.ones(rows, block + 1, dtype=torch.float64)
    for n in range(block + 1):
        if rule == "exact":
            law[:, n] = thresholds[:, :n].prod(-1)
            if n < block:
                law[:, n] *= 1 - thresholds[:, n]
        else:
            law[:, n] = (1 - thresholds[:, n:]).prod(-1)
            if n > 0:
                law[:, n] *= thresholds[:, n - 1]
    return law


def uniforms_accepting(rule: str, accepted: int, rows: int, block: int) -> Tensor:
    """Uniforms under which ``accepted`` tokens are kept wherever that can happen at all."""
    uniforms = torch.full((rows, block + 1), HIGH, dtype=torch.float64)
    if rule == "exact":
        uniforms[:, :accepted] = 0.0
    elif accepted:
        uniforms[:, accepted - 1] = 0.0
    return uniforms


def output_law(rule: str, models: Models, accept: Accept, *, certain: bool = False) -> Array:
    """Return the law of K + 1 output tokens: ``[V] * (K + 1)``, or ``[X, ...]`` for certain drafts one by one.

    A round that emits fewer tokens is continued by the verifier.
    """
    problem = Problem.of(models)
    rows, block, vocabulary = len(problem.drafts), models.block, models.vocabulary
    inputs: list[Tensor | None] = [torch.from_numpy(problem.drafts), *problem.logits()]
    if certain:
        inputs[2:] = None, None
    elif models.drafter_vocabulary == vocabulary:
        inputs[3] = None
    # One copy of every row for each edge between two tokens: their bisections run side by side.
    edges = vocabulary - 1
    copies = [None if x is None else x.repeat_interleave(edges, 0) for x in inputs]

    def verdict(uniforms: Tensor) -> tuple[Tensor, Tensor]:
        return accept(*inputs, uniforms)

    lengths = acceptance_law(rule, verdict, rows, block).numpy()
    weight = np.ones(rows) if certain else problem.weight
    total = np.zeros((rows, *[vocabulary] * (block + 1)))
    for n in range(block + 1):
        base = uniforms_accepting(rule, n, rows, block)
        got, _ = verdict(base)
        possible = (got == n).numpy()
        assert (lengths[~possible, n] < 1e-9).all(), "a length with mass cannot be reached"

        def at_most(u: Tensor, base: Tensor = base) -> Tensor:
            uniforms = torch.cat([base[:, :block].repeat_interleave(edges, 0), u.reshape(-1, 1)], -1)
            return accept(*copies, uniforms)[1].view(rows, edges) <= torch.arange(edges)

        cumulative = bisect(at_most, (rows, edges)).numpy()
        cumulative = np.concatenate([np.zeros((rows, 1)), cumulative, np.ones((rows, 1))], -1)
        following = np.diff(cumulative, axis=-1)  # [X, V]
        for x in np.flatnonzero(possible & (weight * lengths[:, n] > 0)):
            prefix = tuple(problem.drafts[x, :n])
            for token in range(vocabulary):
                mass = weight[x] * lengths[x, n] * following[x, token]
                if mass > 0:
                    context = (*prefix, token)
                    total[(x, *context)] += mass * continuation(models, context)
    return total if certain else total.sum(0)


def continuation(models: Models, context: tuple[int, ...]) -> Array:
    """The verifier's law of the tokens after ``context`` up to K + 1 tokens; 1 where none are missing."""
    law = np.array(1, dtype=models.p[0].dtype)
    for i in range(len(context), models.block + 1):
        law = law[..., None] * models.p[i][context]
    return law


def verifier_law(models: Models) -> Array:
    """The law of K + 1 tokens of the verifier alone."""
    return continuation(models, ())
