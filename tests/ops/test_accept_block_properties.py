"""The six rules on thousands of drawn blocks, every backend against MATH.md's definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import cases
from tests.reference import definitions
from tests.reference.definitions import Array, drawable, softmax, statistics
from ugsd_fast import ops
from ugsd_fast.reference import Stream, uniform

EXAMPLES = 250
"""Per rule; each holds up to five blocks."""

ROUNDING = 2e-6
"""Relative error granted to a probability, as the tolerance table grants to a logsumexp."""

RULES = ("greedy", "rank", "exact", "block", "typical", "relaxed")
ROWS = ("normal", "masked", "nan", "ties", "equal", "huge", "tiny", "nearly-certain", "one-left", "empty", "copy")


@dataclass(frozen=True)
class Blocks:
    """Arguments of one call, and the numbers of its rule."""

    tokens: Tensor
    target: Tensor
    draft: Tensor | None
    lengths: Tensor | None
    settings: dict[str, float]
    seed: int
    offset: int
    bonus: bool


@st.composite
def blocks(draw: st.DrawFn, rule: str) -> Blocks:
    """Shapes, specials and dtypes are drawn; the values come from a seeded generator."""
    batch, block = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    vocabulary = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 257, 4097]))
    dtype = draw(st.sampled_from(list(cases.DTYPES.values())))
    seed = draw(st.integers(0, 2**64 - 1))
    rng = cases.generator(seed % 2**31)

    def rows(count: int) -> Tensor:
        kinds = draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3))
        z = torch.randn(batch, count, vocabulary, generator=rng) * 3
        for i in range(count):
            kind = kinds[i % len(kinds)]
            if kind != "copy":
                z[:, i] = cases.KINDS[kind](z[:, i])
        return z.to(dtype)

    target, draft = rows(block + 1), rows(block)
    for i in range(block):
        if draw(st.booleans()):  # drafter and verifier agree at this position, wholly or nearly
            draft[:, i] = target[:, i] if draw(st.booleans()) else (target[:, i].float() * 1.01).to(dtype)
    tokens = torch.randint(-1, vocabulary + 1, (batch, block), generator=rng)
    if draw(st.booleans()):  # most drafts are likely tokens
        tokens = torch.where(torch.rand(batch, block, generator=rng) < 0.8, target[:, :block].argmax(-1), tokens)
    numbers: dict[str, float] = {
        "rank": draw(st.integers(0, 5)),
        "epsilon": draw(st.sampled_from([0.0, 0.09, 0.5])),
        "delta": draw(st.sampled_from([0.0, 0.3, 2.0])),
        "top_n": draw(st.integers(0, 5)),
        "relax_delta": draw(st.sampled_from([0.0, 0.1, 0.6])),
    }
    return Blocks(
        tokens=tokens if draw(st.booleans()) else tokens.int(),
        target=target,
        draft=draft if rule in ("exact", "block") and draw(st.integers(0, 3)) else None,
        lengths=torch.randint(0, block + 1, (batch,), generator=rng) if draw(st.booleans()) else None,
        settings=numbers,
        seed=seed,
        offset=draw(st.integers(0, 2**33)),
        bonus=draw(st.booleans()),
    )


def passes(rule: str, z: Array, token: int, numbers: dict[str, float]) -> set[bool]:
    """Whether a rule that draws nothing accepts a token; both where rounding decides."""
    z = definitions.clean(z)
    if not 0 <= token < len(z) or z[token] == -np.inf:
        return {False}
    if rule == "greedy":
        return {token == int(np.argmax(z))}
    rank = definitions.rank(z, token)
    if rule == "rank":
        return {rank <= numbers["rank"]}
    p = softmax(z)
    if rule == "typical":
        entropy = statistics(z).entropy if len(z) < 50 else -float((p[p > 0] * np.log(p[p > 0])).sum())
        bound = min(numbers["epsilon"], numbers["delta"] * np.exp(-entropy))
        return {bool(p[token] > bound + sign * ROUNDING * (p[token] + bound)) for sign in (-1, 1)}
    if rank > numbers["top_n"]:
        return {False}
    if z[token] == z.max():
        return {True}
    return {bool(p[token] >= p.max() - numbers["relax_delta"] + sign * ROUNDING) for sign in (-1, 1)}


def certain(token: int, vocabulary: int) -> Array:
    """The law of a drafter that was certain of a token; nothing, for a token that is none."""
    return (np.arange(vocabulary) == token).astype(float)


@dataclass(frozen=True)
class Allowed:
    """Every verdict on one block that rounding allows: thresholds, and the next tokens by accepted length."""

    lengths: set[int]
    thresholds: list[float]
    slack: list[float]
    following: dict[int, set[int]]


def allowed(rule: str, case: Blocks, b: int, uniforms: Array) -> Allowed:
    """Work out one block of a case by the definitions."""
    length = case.tokens.shape[1] if case.lengths is None else int(case.lengths[b])
    tokens = case.tokens[b, :length].tolist()
    target = case.target[b].float().numpy()
    if rule not in ("exact", "block"):
        lengths, open_end = set(), True
        thresholds = []
        for i, token in enumerate(tokens):
            verdict = passes(rule, target[i], token, case.settings)
            thresholds.append(float(True in verdict and open_end))
            if open_end and False in verdict:
                lengths.add(i)
            open_end = open_end and True in verdict
        if open_end:
            lengths.add(length)
        following = {n: {statistics_argmax(target[n])} for n in lengths}
        return Allowed(lengths, thresholds, [1.0 if len(lengths) > 1 else 0.0] * length, following)

    p = np.stack([softmax(row) for row in target])
    if case.draft is None:
        q = np.stack([certain(token, p.shape[1]) for token in tokens]) if tokens else p[:0]
    else:
        q = np.stack([softmax(row) for row in case.draft[b, :length].float().numpy()]) if length else p[:0]
    if rule == "exact":
        thresholds, w = definitions.exact_thresholds(p, q, tokens), [1.0] * (length + 1)
        slack = [4 * ROUNDING * t for t in thresholds]
    else:
        terms = definitions.block_terms(p[: length + 1], q, tokens)
        thresholds, w = terms.h[1:], terms.w
        # h = S / (S + 1 - w) amplifies the rounding of S and w by the inverse of its denominator.
        spread = [max(s + 1 - x, 1e-300) for s, x in zip(terms.s, terms.w, strict=True)][1:]
        slack = [8 * ROUNDING * max(1.0, 1 / d) * (h > 0) for d, h in zip(spread, thresholds, strict=True)]
        if length:
            slack[-1] = 8 * ROUNDING * thresholds[-1]
    sure = [u < t - s for u, t, s in zip(uniforms, thresholds, slack, strict=False)]
    maybe = [u < t + s for u, t, s in zip(uniforms, thresholds, slack, strict=False)]
    lengths = set()
    if rule == "exact":
        for n in range(length + 1):
            if all(maybe[:n]) and (n == length or not sure[n]):
                lengths.add(n)
    else:
        for n in range(length + 1):
            if not any(sure[n:]) and (n == 0 or maybe[n - 1]):
                lengths.add(n)
    following = {}
    for n in lengths:
        mass = definitions.next_mass(p[n], q[n] if n < length else None, w[n])
        residual = np.maximum(w[n] * p[n] - q[n], 0).sum() if n < length else 1.0
        if residual > 1e-4:
            following[n] = drawable(mass, uniforms[-1], ROUNDING + ROUNDING / residual)
        else:  # nothing but rounding is left to draw from: any token of p's will do
            following[n] = set(np.flatnonzero(p[n] > 0).tolist()) or {-1}
    return Allowed(lengths, [float(t) for t in thresholds], slack, following)


def statistics_argmax(z: Array) -> int:
    z = definitions.clean(z)
    return int(np.argmax(z)) if z.max() > -np.inf else -1


@pytest.mark.parametrize("rule", RULES)
def test_every_backend_decides_as_defined(rule: str) -> None:
    decided = 0

    @settings(settings.get_profile("ops"), max_examples=EXAMPLES)
    @given(blocks(rule))
    def check(case: Blocks) -> None:
        nonlocal decided
        batch, block = case.tokens.shape
        rows = torch.arange(batch)
        streams = [Stream.ACCEPT.at(i) for i in range(block)] + [int(Stream.RESIDUAL)]
        uniforms = torch.stack([uniform(case.seed, case.offset, rows, s) for s in streams], -1).numpy()
        expected = [allowed(rule, case, b, uniforms[b]) for b in range(batch)]
        decided += sum(len(one.lengths) == 1 for one in expected)
        for backend in cases.backends_of("accept_block"):
            with backend.use():
                verdict = ops.accept_block(
                    case.tokens,
                    case.target,
                    case.draft,
                    rule=rule,
                    draft_lengths=case.lengths,
                    bonus=case.bonus,
                    seed=case.seed,
                    offset=case.offset,
                    **case.settings,
                )
            for b, one in enumerate(expected):
                assert_allowed(str(backend), rule, verdict, b, one, case.bonus)

    check()
    assert decided > EXAMPLES, "rounding decides too many of the drawn blocks"


def assert_allowed(backend: str, rule: str, verdict: ops.Acceptance, b: int, one: Allowed, bonus: bool) -> None:
    n, following = int(verdict.num_accepted[b]), int(verdict.next_token[b])
    length = len(one.thresholds)
    assert n in one.lengths, (backend, b, n, one)
    if n == length and not bonus:
        assert following == -1, backend
    else:
        assert following in one.following[n], (backend, b, n, following, one)
    probability = verdict.accept_prob[b].tolist()
    assert all(0 <= x <= 1 for x in probability), backend
    assert all(x == 0 for x in probability[length:]), backend
    # What is known of each rule's probabilities: up to the first rejection, or from the last success on.
    known = range(max(n - 1, 0), length) if rule == "block" else range(min(n + 1, length))
    for i in known:
        if rule == "block" and i >= n and probability[i] == 0:
            continue  # rejected by its weight alone
        assert abs(probability[i] - one.thresholds[i]) <= one.slack[i] + 1e-6, (backend, b, i, probability, one)
    if rule == "block":
        assert all(x == 1 for x in probability[: max(n - 1, 0)]), backend
    elif rule == "exact":
        assert all(x == 0 for x in probability[n + 1 :]), backend
