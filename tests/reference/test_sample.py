"""The sampling oracle: the inverse CDF as one long running sum, and the row's draw made of published parts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.ops import cases
from tests.reference.definitions import HIGH, drawable
from ugsd_fast.reference import Stream, filter_logits, inverse_cdf, sample, uniform


def test_exact_partition_of_the_unit_interval() -> None:
    """Masses of 1/64: every boundary is a float64, and each side of it gives its own column."""
    counts = [0, 5, 0, 1, 30, 0, 0, 28, 0]
    edge = Fraction(0)
    mass = torch.tensor(counts, dtype=torch.float64) / 64
    for column, count in enumerate(counts):
        if count:
            lowest, highest = float(edge), float(edge + Fraction(count, 64)) - 2.0**-53
            u = torch.tensor([lowest, highest], dtype=torch.float64)
            assert inverse_cdf(mass.expand(2, -1), u).tolist() == [column, column]
        edge += Fraction(count, 64)


@pytest.mark.parametrize("vocabulary", [1, 63, 4095, 4096, 4097, 12_289])
@pytest.mark.parametrize("empty", ["none", "first-block", "last-block", "most"])
def test_blocks_and_columns_are_one_running_sum(vocabulary: int, empty: str) -> None:
    mass = torch.rand(vocabulary, generator=cases.generator(1), dtype=torch.float64)
    if empty == "first-block" and vocabulary > 4096:
        mass[:4096] = 0
    elif empty == "last-block" and vocabulary > 4096:
        mass[vocabulary // 4096 * 4096 :] = 0
    elif empty == "most":
        mass = torch.where(mass < 0.999, 0.0, mass)
        mass[vocabulary // 2] = 0.5
    u = torch.cat([torch.tensor([0.0, HIGH]).double(), torch.rand(200, generator=cases.generator(2)).double()])
    got = inverse_cdf(mass.expand(len(u), -1), u)
    for token, x in zip(got.tolist(), u.tolist(), strict=True):
        assert token in drawable(mass.numpy(), x, 1e-12)
        assert mass[token] > 0


def test_row_without_mass_draws_nothing() -> None:
    assert inverse_cdf(torch.zeros(2, 5000).double(), torch.tensor([0.0, 0.5]).double()).tolist() == [-1, -1]


def test_draws_are_made_of_filter_uniform_and_inverse_cdf() -> None:
    logits = cases.random_logits(2, 5, 300, scale=1.0)
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    drawn = sample(logits, **settings, seed=3, offset=8)
    law = filter_logits(logits, **settings).softmax(-1)
    u = uniform(3, 8, torch.arange(10).view(2, 5), Stream.DRAFT)
    assert torch.equal(drawn.tokens, inverse_cdf(law, u))
    expected = law.gather(-1, drawn.tokens.unsqueeze(-1)).squeeze(-1).log()
    torch.testing.assert_close(drawn.logprob, expected, rtol=1e-12, atol=1e-12)


def test_law_of_many_draws() -> None:
    row = cases.random_logits(300, scale=1.5)
    tokens = torch.cat([sample(row.expand(1000, 300), seed=1, offset=offset).tokens for offset in range(10)])
    p_values = cases.token_law_p_values(tokens, row.double().softmax(-1))
    assert min(p_values.values()) > 1e-3, p_values
