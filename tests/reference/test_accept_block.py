"""The acceptance oracle: lossless rules by exact enumeration, every rule against MATH.md's definition."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import definitions, laws
from ugsd_fast.reference import Stream, accept_block, uniform

SIZES = [(2, 1), (3, 2), (5, 1), (2, 3), (4, 2), (5, 3)]
"""(V, K), up to the 125 blocks of V = 5, K = 3."""
SPECIALS = ["plain", "zeros", "equal", "disjoint"]


def oracle(rule: str) -> laws.Accept:
    def accept(
        tokens: Tensor, target: Tensor, draft: Tensor | None, logsumexp: Tensor | None, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        verdict = accept_block(tokens, target, draft, rule, draft_logsumexp=logsumexp, uniforms=uniforms)
        return verdict.num_accepted, verdict.next_token

    return accept


def as_fractions(array: definitions.Array) -> definitions.Array:
    return np.vectorize(lambda x: Fraction(int(x * 64), 64), otypes=[object])(array)


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_the_definition_itself_is_lossless(rule: str, special: str) -> None:
    """In rational arithmetic the law equals the verifier's exactly: what the code is held against is right."""
    vocabulary, block = 3, 2
    models = laws.random_models(vocabulary, block, seed=1, special=special)
    models = laws.Models([as_fractions(p) for p in models.p], [as_fractions(q) for q in models.q])
    law = np.full((vocabulary,) * (block + 1), Fraction(0))
    for draft in product(range(vocabulary), repeat=block):
        p = [models.p[i][draft[:i]] for i in range(block + 1)]
        q = [models.q[i][draft[:i]] for i in range(block)]
        weight = q[0][draft[0]] * q[1][draft[1]]
        if not weight:
            continue
        if rule == "exact":
            a = definitions.exact_thresholds(p, q, draft)
            lengths, w = [1 - a[0], a[0] * (1 - a[1]), a[0] * a[1]], [1, 1, 1]
        else:
            terms = definitions.block_terms(p, q, draft)
            h, w = terms.h, terms.w
            lengths = [(1 - h[1]) * (1 - h[2]), h[1] * (1 - h[2]), h[2]]
        for n in range(block + 1):
            mass = definitions.next_mass(p[n], q[n] if n < block else None, w[n])
            for token in range(vocabulary):
                context = (*draft[:n], token)
                share = weight * lengths[n] * mass[token] / mass.sum()
                if share:
                    law[context] = law[context] + share * laws.continuation(models, context)
    assert (law == laws.verifier_law(models)).all()


@pytest.mark.parametrize(
    ("vocabulary", "block", "special"),
    [(*size, "plain") for size in SIZES] + [(3, 2, special) for special in SPECIALS if special != "plain"],
)
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_output_law_is_the_verifiers(rule: str, vocabulary: int, block: int, special: str) -> None:
    models = laws.random_models(vocabulary, block, seed=vocabulary * 10 + block, special=special)
    law = laws.output_law(rule, models, oracle(rule))
    np.testing.assert_allclose(law, laws.verifier_law(models), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_output_law_with_a_certain_drafter(rule: str) -> None:
    """Without draft logits the law is the verifier's for every draft, not on average."""
    models = laws.random_models(4, 2, seed=3)
    law = laws.output_law(rule, models, oracle(rule), certain=True)
    np.testing.assert_allclose(law, np.broadcast_to(laws.verifier_law(models), law.shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_output_law_with_tokens_that_the_verifier_does_not_have(rule: str) -> None:
    """A drafter with a larger vocabulary: its logsumexp covers columns that the op does not see."""
    models = laws.random_models(3, 2, seed=4, drafter_vocabulary=5)
    law = laws.output_law(rule, models, oracle(rule))
    np.testing.assert_allclose(law, laws.verifier_law(models), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_emits_the_verifiers_greedy_tokens(seed: int) -> None:
    """Every draft of V = 5, K = 3 at every length: what is emitted lies on the greedy path."""
    models = laws.random_models(5, 3, seed=seed)
    problem = laws.Problem.of(models)
    target = problem.logits()[0]
    for length in range(4):
        lengths = torch.full((len(problem.drafts),), length)
        verdict = accept_block(torch.from_numpy(problem.drafts), target, rule="greedy", draft_lengths=lengths)
        for x, draft in enumerate(problem.drafts):
            n = int(verdict.num_accepted[x])
            emitted = (*draft[:n], int(verdict.next_token[x]))
            for i, token in enumerate(emitted):
                assert token == int(np.argmax(models.p[i][emitted[:i]]))
            assert n <= length


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_decisions_and_thresholds_are_the_definitions(rule: str, special: str) -> None:
    """Random uniforms, ragged lengths: n is the first failure (exact) or the last success (block) of MATH.md."""
    models = laws.random_models(4, 3, seed=8, special=special)
    problem = laws.Problem.of(models)
    target, draft, _ = problem.logits()
    rows = len(problem.drafts)
    rng = np.random.default_rng(0)
    for _ in range(4):
        lengths = rng.integers(0, 4, rows)
        uniforms = rng.random((rows, 4))
        verdict = accept_block(
            torch.from_numpy(problem.drafts),
            target,
            draft,
            rule,
            torch.from_numpy(lengths),
            uniforms=torch.from_numpy(uniforms),
        )
        for x in range(rows):
            k = lengths[x]
            p, q, drafted = problem.p[x], problem.q[x], problem.drafts[x, :k]
            if rule == "exact":
                thresholds, w = definitions.exact_thresholds(p, q, drafted), [1.0] * (k + 1)
            else:
                terms = definitions.block_terms(p[: k + 1], q[:k], drafted)
                thresholds, w = terms.h[1:], terms.w
            n = definitions.num_accepted(rule, thresholds, uniforms[x, :k])
            assert verdict.num_accepted[x] == n
            mass = definitions.next_mass(p[n], q[n] if n < k else None, w[n])
            assert int(verdict.next_token[x]) in definitions.drawable(mass, uniforms[x, 3], 1e-6)
            known = slice(0, n + 1) if rule == "exact" else slice(max(n - 1, 0), k)
            if rule == "block":  # h <= w rejects before h is known
                thresholds = np.where(uniforms[x, :k] < w[1:], thresholds, 0)
            np.testing.assert_allclose(verdict.accept_prob[x, :k][known], thresholds[known], atol=1e-6)


def test_block_accepts_at_least_as_much_as_exact() -> None:
    """Sun et al.: block verification's expected accepted length is never under the token-wise one's."""
    for seed in range(3):
        models = laws.random_models(3, 2, seed=seed)
        problem = laws.Problem.of(models)
        expected = {}
        for rule in ("exact", "block"):
            accept = partial(oracle(rule), torch.from_numpy(problem.drafts), *problem.logits())
            law = laws.acceptance_law(rule, accept, len(problem.drafts), 2).numpy()
            expected[rule] = float((problem.weight * (law * np.arange(3)).sum(-1)).sum())
        assert expected["block"] >= expected["exact"] - 1e-9


def test_expected_acceptance_of_exact_is_one_minus_total_variation() -> None:
    models = laws.random_models(5, 1, seed=2)
    problem = laws.Problem.of(models)
    target, draft, _ = problem.logits()
    verdict = accept_block(torch.from_numpy(problem.drafts), target, draft, "exact")
    overlap = np.minimum(models.p[0], models.q[0]).sum()
    assert (problem.weight * verdict.accept_prob[:, 0].numpy()).sum() == pytest.approx(overlap, abs=1e-6)


def test_uniforms_come_from_disjoint_streams() -> None:
    """The draws of (seed, offset, row): position i of the acceptance stream, and one of the residual stream."""
    models = laws.random_models(4, 3, seed=5)
    problem = laws.Problem.of(models)
    target, draft, _ = problem.logits()
    rows = torch.arange(len(problem.drafts))
    streams = [Stream.ACCEPT.at(0), Stream.ACCEPT.at(1), Stream.ACCEPT.at(2), int(Stream.RESIDUAL)]
    uniforms = torch.stack([uniform(9, 4, rows, stream) for stream in streams], -1)
    tokens = torch.from_numpy(problem.drafts)
    for rule in ("exact", "block"):
        drawn = accept_block(tokens, target, draft, rule, seed=9, offset=4)
        given = accept_block(tokens, target, draft, rule, uniforms=uniforms)
        assert all(map(torch.equal, drawn, given))
