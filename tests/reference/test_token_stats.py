"""The `token_stats` oracle against MATH.md's formulas in 60 digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.ops import cases
from tests.reference.definitions import statistics
from ugsd_fast.reference import token_stats


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0, 0.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 200])
def test_matches_sixty_digits(vocabulary: int, temperature: float) -> None:
    logits = cases.rows_of_every_kind(vocabulary, torch.float32)
    got = token_stats(logits, temperature)
    for i, row in enumerate(logits.numpy()):
        expected = statistics(row, temperature)
        assert got.argmax[i] == expected.argmax
        assert got.logsumexp[i].item() == pytest.approx(expected.logsumexp, rel=1e-14, abs=1e-14)
        assert got.entropy[i].item() == pytest.approx(expected.entropy, rel=1e-10, abs=1e-300)
        assert got.max_logit[i].item() == pytest.approx(expected.max_logit, rel=1e-15)
        assert got.margin[i].item() == pytest.approx(expected.margin, rel=1e-14)


def test_entropy_of_equal_logits_is_log_v() -> None:
    for vocabulary in (2, 1000, 152_064):
        got = token_stats(torch.full((1, vocabulary), -7.25))
        assert got.entropy.item() == pytest.approx(math.log(vocabulary), rel=1e-13)
        assert got.logsumexp.item() == pytest.approx(math.log(vocabulary) - 7.25, rel=1e-13)


def test_identities_at_a_real_size() -> None:
    """L = log Σ e^s and H = L - Σ p s, by numpy's sums."""
    logits = cases.random_logits(3, 152_064)
    got = token_stats(logits, 0.8)
    s = logits.double().numpy() / 0.8
    logsumexp = np.log(np.exp(s).sum(-1))
    np.testing.assert_allclose(got.logsumexp, logsumexp, rtol=1e-12)
    np.testing.assert_allclose(got.entropy, logsumexp - (np.exp(s - logsumexp[:, None]) * s).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("gap", [20.0, 50.0, 100.0, 500.0, 700.0])
def test_entropy_of_a_nearly_certain_row_keeps_its_digits(gap: float) -> None:
    got = token_stats(torch.tensor([gap, 0.0, 0.0], dtype=torch.float64)).entropy.item()
    assert got == pytest.approx(statistics(np.array([gap, 0.0, 0.0])).entropy, rel=1e-12)


def test_temperatures_per_row() -> None:
    logits = cases.random_logits(2, 3, 20)
    temperature = torch.tensor([[0.5], [0.0]])
    got = token_stats(logits, temperature)
    assert torch.equal(got.entropy[0], token_stats(logits[0], 0.5).entropy)
    assert torch.equal(got.entropy[1], token_stats(logits[1], 1.0).entropy)
