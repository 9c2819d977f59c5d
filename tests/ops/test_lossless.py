"""Lossless rules on every backend: exact laws by enumeration, and chi-square of whole rounds at V = 32000."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.reference import laws
from ugsd_fast import ops
from ugsd_fast.ops.backend import select
from ugsd_fast.reference import Stream, accept_block, uniform

SAMPLING_RULES = ("exact", "block")
SIZES = [(2, 1), (3, 2), (5, 1), (2, 3), (4, 2), (5, 3)]
"""(V, K), up to the 125 blocks of V = 5, K = 3."""
SEEDS = (1, 2, 3)
BLOCK = 2
"""Draft tokens of the rounds whose law is sampled."""
FILTERS = {"plain": {}, "filtered": {"top_k": 100, "top_p": 0.95, "temperature": 1.2}}
KERNELS_WITH_UNIFORMS = [backend for backend in cases.backends_of("accept_block") if backend.name == "cpp"]
"""The oracle, which takes uniforms too, has its own enumeration in tests/reference."""


def with_uniforms(rule: str) -> laws.Accept:
    """The kernel's entry point that takes uniforms in place of seeds."""

    def accept(
        tokens: Tensor, target: Tensor, draft: Tensor | None, logsumexp: Tensor | None, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        implementation = select("accept_block", "cpu")
        numbers = (0.0, None, 0.0, None, logsumexp, True, 0, None, 0, None)
        accepted, following, _ = implementation(
            target, tokens, draft, rule, None, *numbers, uniforms=uniforms.contiguous()
        )
        return accepted, following

    return accept


@pytest.mark.parametrize("backend", KERNELS_WITH_UNIFORMS, ids=str, indirect=True)
class TestLosslessByEnumeration:
    """Every block that can be drafted at V <= 5, K <= 3, integrated over the unit cube: no sampling."""

    @pytest.mark.parametrize(
        ("vocabulary", "block", "special"),
        [(*size, special) for size in SIZES for special in ("plain", "zeros", "equal", "disjoint")],
    )
    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_output_law_is_the_verifiers(self, rule: str, vocabulary: int, block: int, special: str) -> None:
        models = laws.random_models(vocabulary, block, seed=vocabulary * 10 + block, special=special)
        law = laws.output_law(rule, models, with_uniforms(rule))
        np.testing.assert_allclose(law, laws.verifier_law(models), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_certain_drafter(self, rule: str) -> None:
        models = laws.random_models(4, 2, seed=3)
        law = laws.output_law(rule, models, with_uniforms(rule), certain=True)
        np.testing.assert_allclose(law, np.broadcast_to(laws.verifier_law(models), law.shape), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_drafter_with_tokens_that_the_verifier_does_not_have(self, rule: str) -> None:
        models = laws.random_models(3, 2, seed=4, drafter_vocabulary=5)
        law = laws.output_law(rule, models, with_uniforms(rule))
        np.testing.assert_allclose(law, laws.verifier_law(models), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_greedy_emits_the_verifiers_greedy_tokens(self, seed: int) -> None:
        models = laws.random_models(5, 3, seed=seed)
        problem = laws.Problem.of(models)
        tokens, target = torch.from_numpy(problem.drafts), problem.logits()[0]
        for length in range(4):
            verdict = ops.accept_block(tokens, target, rule="greedy", draft_lengths=torch.full((len(tokens),), length))
            for draft, n, following in zip(problem.drafts, verdict.num_accepted, verdict.next_token, strict=True):
                emitted = (*draft[:n], int(following))
                assert n <= length
                assert all(token == np.argmax(models.p[i][emitted[:i]]) for i, token in enumerate(emitted))


@cases.on_backends("accept_block")
class TestLosslessBySampling:
    """Chi-square of whole rounds: tokens by `sample`, verdict by `accept_block`, one seed and offset for both."""

    @staticmethod
    @lru_cache(maxsize=2)
    def rows(vocabulary: int, seed: int, filters: str) -> tuple[Tensor, Tensor]:
        """Verifier and drafter rows after the filters; filtering itself is tested elsewhere."""
        target = cases.random_logits(BLOCK + 1, vocabulary, seed=seed, scale=2.5)
        draft = target[:BLOCK] + cases.random_logits(BLOCK, vocabulary, seed=seed + 100, scale=0.7)
        settings = FILTERS[filters]
        with ops.use_backend("reference"):
            return ops.filter_logits(target, **settings), ops.filter_logits(draft, **settings)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("filters", FILTERS)
    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_emitted_tokens_follow_the_verifiers_law(
        self, rule: str, filters: str, seed: int, backend: cases.Backend
    ) -> None:
        vocabulary, rounds = backend.law_size
        target, draft = self.rows(vocabulary, seed, filters)
        tokens = torch.stack(
            [ops.sample(row.expand(rounds, -1), seed=seed, offset=i).tokens for i, row in enumerate(draft)], -1
        )
        verdict = ops.accept_block(
            tokens,
            target.expand(rounds, -1, -1),
            draft.expand(rounds, -1, -1),
            rule=rule,
            seed=seed,
            offset=0,
        )
        n, following = verdict.num_accepted, verdict.next_token
        p = target.double().softmax(-1)
        rest = torch.multinomial(p, rounds, replacement=True, generator=cases.generator(seed)).T  # [rounds, K + 1]
        position = torch.arange(BLOCK + 1)
        emitted = torch.cat([tokens, following[:, None]], -1)
        emitted = torch.where(
            position < n[:, None], emitted, torch.where(position == n[:, None], following[:, None], rest)
        )
        assert 0 < (n == BLOCK).sum() < rounds
        for i in range(2):
            p_values = cases.token_law_p_values(emitted[:, i], p[i])
            assert min(p_values.values()) > 1e-3, (i, p_values)
        # Pairs: which quarter of its law each of the first two tokens fell into.
        quarter = [((p[i].cumsum(0) - p[i] / 2) * 4).long().clamp(max=3) for i in range(2)]
        law = torch.stack([torch.bincount(quarter[i], p[i], minlength=4) for i in range(2)])
        pair = quarter[0][emitted[:, 0]] * 4 + quarter[1][emitted[:, 1]]
        assert cases.chi_square(torch.bincount(pair, minlength=16), torch.outer(law[0], law[1]).flatten()) > 1e-3

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_small_vocabulary_over_many_rounds(self, rule: str, backend: cases.Backend) -> None:
        """Many rounds at V = 4 with the op's own uniforms: joint law of the first two tokens."""
        rounds = 100_000 if backend.native else 2000
        models = laws.random_models(4, 1, seed=6)
        p, q = torch.from_numpy(models.p[0]), torch.from_numpy(models.q[0])
        tokens = ops.sample(q.log().float().expand(rounds, 4), seed=2, offset=5).tokens[:, None]
        after = torch.from_numpy(models.p[1])  # [V, V]
        target = torch.stack([p.expand(rounds, 4), after[tokens[:, 0]]], 1).log().float()
        draft = q.log().float().expand(rounds, 1, 4)
        verdict = ops.accept_block(tokens, target, draft, rule=rule, seed=2, offset=5)
        whole = verdict.num_accepted == 1
        first = torch.where(whole, tokens[:, 0], verdict.next_token)
        assert cases.chi_square(torch.bincount(first, minlength=4), p) > 1e-3
        pairs = (tokens[:, 0] * 4 + verdict.next_token)[whole]
        law = torch.minimum(p, q)[:, None] * after
        assert cases.chi_square(torch.bincount(pairs, minlength=16), (law / law.sum()).flatten()) > 1e-3


@cache
def ten_thousand_verdicts(rule: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """One block drafted at V = 300 under 10,000 rows of uniforms: inputs, the oracle's lengths and next tokens."""
    rounds, part = 10_000, 1000
    target = cases.random_logits(1, 3, 300, scale=2.0)
    draft = target[:, :2] + cases.random_logits(1, 2, 300, seed=1, scale=0.5)
    overdrafted = (draft.double().softmax(-1) - target[:, :2].double().softmax(-1)).argmax(-1)  # p < q: may be rejected
    inputs = [x.expand(rounds, *x.shape[1:]) for x in (overdrafted, target, draft)]
    rows = torch.arange(rounds)
    streams = [Stream.ACCEPT.at(0), Stream.ACCEPT.at(1), int(Stream.RESIDUAL)]
    uniforms = torch.stack([uniform(8, 2, rows, stream) for stream in streams], -1)
    parts = [
        accept_block(*(x[i : i + part] for x in inputs), rule, uniforms=uniforms[i : i + part])
        for i in range(0, rounds, part)
    ]
    return inputs, torch.cat([x.num_accepted for x in parts]), torch.cat([x.next_token for x in parts])


@cases.on_backends("accept_block", native=True)
@pytest.mark.parametrize("rule", SAMPLING_RULES)
def test_same_seed_gives_the_oracles_tokens(rule: str) -> None:
    """10,000 rounds: at least 99.9% of lengths and next tokens are the oracle's."""
    inputs, lengths, following = ten_thousand_verdicts(rule)
    got = ops.accept_block(*inputs, rule=rule, seed=8, offset=2)
    assert (got.num_accepted == lengths).double().mean() >= 0.999
    assert (got.next_token == following).double().mean() >= 0.999
    assert following.unique().numel() > 50
    assert lengths.unique().numel() == 3
