"""MATH.md in numpy, one row at a time and nothing clever: what references and ops are held against.

Nothing here is shared with the code under test. Arrays of `fractions.Fraction` (dtype object) work wherever only
arithmetic is needed, so the lossless rules can be checked without any rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np

Array = np.ndarray[Any, Any]

HIGH = 1.0 - 2.0**-53
"""The largest uniform."""


def clean(z: Array) -> Array:
    """Logits in float64, NaN masked."""
    z = np.asarray(z, dtype=np.float64)
    return np.where(np.isnan(z), -np.inf, z)


def softmax(z: Array, logsumexp: float | None = None) -> Array:
    """``e^{z - L}`` in float64; all zero where nothing is finite."""
    z = clean(z)
    top = z.max()
    if top == -np.inf:
        return np.zeros_like(z)
    if logsumexp is not None:
        return np.exp(z - logsumexp)
    e = np.exp(z - top)
    return e / math.fsum(e)


@dataclass(frozen=True)
class Statistics:
    """`TokenStats` of one row, from the formulas as they are written."""

    logsumexp: float
    entropy: float
    max_logit: float
    argmax: int
    margin: float


def statistics(z: Array, temperature: float = 1.0) -> Statistics:
    """L = log Σ e^s and H = -Σ p log p with 60 digits, for rows short enough to afford it."""
    columns = [i for i, x in enumerate(clean(z)) if x > -np.inf]
    if not columns:
        return Statistics(-math.inf, 0.0, -math.inf, -1, 0.0)
    with mpmath.workdps(60):
        s = {i: mpmath.mpf(float(z[i])) / mpmath.mpf(temperature or 1.0) for i in columns}
        total = mpmath.fsum(mpmath.exp(x) for x in s.values())
        p = [mpmath.exp(x) / total for x in s.values()]
        entropy = -mpmath.fsum(x * mpmath.log(x) for x in p)
        ordered = sorted(s.values(), reverse=True)
        margin = ordered[0] - ordered[1] if len(ordered) > 1 else mpmath.inf
        argmax = min(i for i in columns if s[i] == ordered[0])
        return Statistics(float(mpmath.log(total)), float(entropy), float(ordered[0]), argmax, float(margin))


def rank(z: Array, token: int) -> int:
    """``1 + #{v : z_v > z_x}``, and V + 1 for a token that is none."""
    z = clean(z)
    if not 0 <= token < len(z):
        return len(z) + 1
    return 1 + sum(x > z[token] for x in z)


def filtered(
    z: Array, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, slack: float = 0.0
) -> tuple[Array, Array]:
    """The columns that top-k, then top-p, then min-p keep, as two masks: surely, and perhaps.

    They differ by the columns within ``slack`` of top-p's or min-p's bound, which rounding may decide.
    """
    s = clean(z) / (temperature or 1.0)
    finite = s > -np.inf
    if not finite.any():
        return finite, finite
    if temperature == 0:
        only = np.arange(len(s)) == int(np.argmax(s))
        return only, only
    keep = finite
    if 0 < top_k < len(s):
        keep = keep & (s >= np.sort(s)[-top_k])
    surely, perhaps = keep.copy(), keep.copy()
    if top_p < 1:
        e = np.where(keep, np.exp(s - s.max()), 0.0)
        p = e / math.fsum(e)
        order = np.argsort(-s, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
        first_of_ties = np.searchsorted(-s[order], -s[order], side="left")
        larger = np.empty_like(p)
        larger[order] = before[first_of_ties]
        surely &= larger < top_p - slack
        perhaps &= larger < top_p + slack
    share = np.exp(s - s.max())
    surely &= share >= min_p * (1 + slack)
    perhaps &= share >= min_p * (1 - slack)
    top = s == s.max()
    return surely | top, perhaps | top


def drawable(mass: Array, u: float, slack: float) -> set[int]:
    """The first column whose running mass exceeds ``u * total``, and those within ``slack`` of it; -1 without mass."""
    positive = np.flatnonzero(mass > 0)
    if not len(positive):
        return {-1}
    above = np.cumsum(mass[positive]) / math.fsum(mass)
    below = np.concatenate([[0.0], above[:-1]])
    inside = (above > u - slack) & (below <= u + slack)
    inside[-1] |= u + slack >= above[-1]
    return {int(column) for column in positive[inside]}


def ratio(p: Array, q: Array, token: int) -> Any:
    """``p(x)/q(x)``; 0 for a token that is none, or that was never drawn from q."""
    if not 0 <= token < len(p) or not q[token] > 0:
        return 0
    return p[token] / q[token]


def exact_thresholds(p: Array, q: Array, tokens: Array) -> list[Any]:
    """``min(1, p_i(x_i)/q_i(x_i))`` of every drafted token."""
    return [min(1, ratio(p[i], q[i], token)) for i, token in enumerate(tokens)]


@dataclass(frozen=True)
class BlockTerms:
    """MATH.md's w_i, S_i, h_i for i = 0..K (S_K is unused)."""

    w: list[Any]
    s: list[Any]
    h: list[Any]


def block_terms(p: Array, q: Array, tokens: Array) -> BlockTerms:
    """Block verification's weights and thresholds; ``p`` has K + 1 rows, ``q`` has K, 0/0 counts as 1."""
    length = len(tokens)
    w: list[Any] = [1]
    for i, token in enumerate(tokens):
        w.append(min(1, w[-1] * ratio(p[i], q[i], token)))
    s: list[Any] = []
    h: list[Any] = []
    for i in range(length):
        residual = np.maximum(w[i] * p[i] - q[i], 0).sum()
        s.append(residual)
        denominator = residual + 1 - w[i]
        h.append(residual / denominator if denominator > 0 else 1)
    s.append(0)
    h.append(w[length])
    return BlockTerms(w, s, h)


def num_accepted(rule: str, thresholds: list[Any], uniforms: Array) -> int:
    """Accepted length of ``exact`` (a prefix) or ``block`` (the LAST success), thresholds of tokens 1..K."""
    passed = [u < t for u, t in zip(uniforms, thresholds, strict=True)]
    if rule == "exact":
        return passed.index(False) if False in passed else len(passed)
    return max((i + 1 for i, ok in enumerate(passed) if ok), default=0)


def next_mass(p: Array, q: Array | None, weight: Any) -> Array:
    """What the token after the accepted prefix is drawn from: ``max(0, w p - q)``, or p at the end of the block."""
    if q is None:
        return p
    mass = np.maximum(weight * p - q, 0)
    return mass if mass.sum() > 0 else p


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in Salmon et al. (SC 2011), on Python integers."""
    c, k = list(counter), list(key)
    for step in range(10):
        if step:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c
