"""`sample` on every backend: the same draws everywhere, from the law that its filters define."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.reference.definitions import clean, drawable, filtered
from ugsd_fast import ops
from ugsd_fast.reference import Stream, uniform

pytestmark = cases.on_backends("sample")

SLACK = 2e-6
"""Share of the mass within which rounding may move a draw to the neighbouring column."""

FILTERS = {
    "plain": {},
    "warm": {"temperature": 1.5},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "all": {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
}
SEED = 20260
SEEDS = (1, 2, 3)


def law(row: Tensor, **settings: float) -> np.ndarray:
    """The law that a draw from one row must follow."""
    settings = {"temperature": 1.0, **settings}
    keep, _ = filtered(row.float().numpy(), **settings)
    s = clean(row.float().numpy()) / (settings["temperature"] or 1.0)
    mass = np.where(keep, np.exp(s - s.max()), 0.0)
    return mass / mass.sum()


@pytest.mark.parametrize("name", FILTERS)
def test_draws_are_the_inverse_cdf_of_the_published_uniforms(name: str, backend: cases.Backend) -> None:
    """10,000 draws, 1000 of the oracle: 99.9% are the float64 CDF's column, the others within rounding of its edge."""
    calls = 20 if backend.native else 2
    row = cases.random_logits(5000, scale=2.0)
    mass = law(row, **FILTERS[name])
    edges, last = np.cumsum(mass), np.flatnonzero(mass)[-1]
    differ = 0
    for offset in range(calls):
        got = ops.sample(row.expand(500, -1), seed=SEED, offset=offset, **FILTERS[name]).tokens.numpy()
        u = uniform(SEED, offset, torch.arange(500), Stream.DRAFT).numpy()
        expected = np.minimum(np.searchsorted(edges, u * edges[-1], side="right"), last)
        for i in np.flatnonzero(got != expected):
            assert got[i] in drawable(mass, u[i], SLACK)
            differ += 1
    assert differ <= calls // 2


@cache
def laws_by_row(vocabulary: int, dtype: torch.dtype, name: str) -> list[tuple[np.ndarray, float]]:
    """Of each kind of row: the masses that may be drawn, and the share of those on a filter's bound."""
    settings = {"temperature": 1.0, **FILTERS[name]}
    laws = []
    for row in cases.rows_of_every_kind(vocabulary, dtype).float().numpy():
        surely, perhaps = filtered(row, slack=SLACK, **settings)
        s = clean(row) / settings["temperature"]
        with np.errstate(invalid="ignore"):  # -inf - -inf, in rows with nothing to draw
            mass = np.where(perhaps, np.exp(s - s.max()), 0.0)
        laws.append((mass, float(mass[perhaps & ~surely].sum() / mass.sum()) if surely.any() else 0.0))
    return laws


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(v, dtype) for v in (1, 63, 4097) for dtype in cases.DTYPES.values()] + [(cases.LARGEST, torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_every_kind_of_row(vocabulary: int, dtype: torch.dtype, name: str) -> None:
    logits = cases.rows_of_every_kind(vocabulary, dtype)
    drawn = ops.sample(logits, seed=7, offset=vocabulary, **FILTERS[name])
    u = uniform(7, vocabulary, torch.arange(len(logits)), Stream.DRAFT)
    for i, (mass, on_the_bound) in enumerate(laws_by_row(vocabulary, dtype, name)):
        token = int(drawn.tokens[i])
        assert token in drawable(mass, float(u[i]), SLACK + 2 * on_the_bound), list(cases.KINDS)[i]
        if token >= 0:
            expected = np.log(mass[token] / mass.sum())
            assert abs(drawn.logprob[i].item() - expected) <= 2e-6 * abs(expected) + 1e-6 + 2 * on_the_bound
        else:
            assert drawn.logprob[i] == -torch.inf


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_statistics_are_those_before_the_filters(name: str, dtype: torch.dtype) -> None:
    logits = cases.rows_of_every_kind(4097, dtype)
    temperature = FILTERS[name].get("temperature", 1.0)
    drawn = ops.sample(logits, seed=0, **FILTERS[name])
    for field, value in ops.token_stats(logits, temperature=temperature)._asdict().items():
        assert cases.same_bits(getattr(drawn.stats, field), value), field


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FILTERS)
def test_tokens_follow_the_law(name: str, seed: int, backend: cases.Backend) -> None:
    """Chi-square over three seeds."""
    vocabulary, draws = backend.law_size
    row = cases.random_logits(vocabulary, scale=3.0, seed=seed)
    drawn = ops.sample(row.expand(draws, vocabulary), seed=seed, offset=11, **FILTERS[name])
    p_values = cases.token_law_p_values(drawn.tokens, torch.from_numpy(law(row, **FILTERS[name])))
    assert min(p_values.values()) > 1e-3, p_values


def test_temperature_zero_takes_the_argmax() -> None:
    logits = cases.rows_of_every_kind(4097, torch.float32)
    drawn = ops.sample(logits, temperature=0, seed=3)
    stats = ops.token_stats(logits)
    assert torch.equal(drawn.tokens, stats.argmax)
    finite = stats.argmax >= 0
    expected = (stats.max_logit - stats.logsumexp).double()[finite]
    cases.assert_close(drawn.logprob[finite], expected, 0, 1e-4 + 1e-7 * 7e4)
    assert (drawn.logprob[~finite] == -torch.inf).all()


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-12])
def test_next_to_no_temperature_takes_the_argmax(temperature: float) -> None:
    logits = cases.random_logits(5, 5000)
    drawn = ops.sample(logits, temperature=temperature, seed=3)
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    assert drawn.logprob.tolist() == drawn.stats.entropy.tolist() == [0.0] * 5


@pytest.mark.parametrize("temperature", [1e12, 1e30, 3e38])
def test_all_temperature_draws_uniformly(temperature: float) -> None:
    drawn = ops.sample(cases.random_logits(2000, 10), temperature=temperature, seed=3)
    cases.assert_close(drawn.stats.entropy, torch.full((2000,), 10.0).log(), 2e-6, 0)
    cases.assert_close(drawn.logprob, torch.full((2000,), 0.1).log(), 2e-6, 0)
    assert cases.chi_square(torch.bincount(drawn.tokens, minlength=10), torch.full((10,), 0.1)) > 1e-3


def test_filtered_columns_are_never_drawn() -> None:
    row = cases.random_logits(1000, scale=1.0)
    tokens = ops.sample(row.expand(3000, 1000), top_k=5, seed=1).tokens
    assert set(tokens.tolist()) == set(row.topk(5).indices.tolist())


def test_masked_and_nan_columns_are_never_drawn() -> None:
    row = torch.zeros(100)
    row[::2], row[1::4] = -torch.inf, torch.nan
    tokens = ops.sample(row.expand(2000, 100), seed=1).tokens
    assert set(tokens.tolist()) == set(range(3, 100, 4))


def test_row_with_nothing_finite_draws_nothing() -> None:
    logits = torch.full((2, 5000), -torch.inf)
    logits[1] = torch.nan
    for settings in FILTERS.values():
        drawn = ops.sample(logits, seed=1, **settings)
        assert drawn.tokens.tolist() == [-1, -1]
        assert drawn.logprob.tolist() == [-torch.inf, -torch.inf]


def test_vocabulary_of_one() -> None:
    drawn = ops.sample(torch.tensor([[2.0], [-torch.inf]]), seed=1)
    assert drawn.tokens.tolist() == [0, -1]
    assert drawn.logprob.tolist() == [0.0, -torch.inf]


def test_no_rows() -> None:
    assert ops.sample(torch.empty(0, 4), seed=1).tokens.shape == (0,)


def test_rows_number_through_the_leading_dimensions() -> None:
    row = cases.random_logits(1000, scale=1.0)
    flat = ops.sample(row.expand(24, 1000), seed=5).tokens
    assert flat.unique().numel() > 12
    assert torch.equal(ops.sample(row.expand(2, 3, 4, 1000), seed=5).tokens, flat.view(2, 3, 4))
    assert ops.sample(row, seed=5).tokens == flat[0]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 2**64 + 5, 2**200 + 5])
def test_any_integer_seed_and_offset(seed: int) -> None:
    row = cases.random_logits(1, 1000, scale=1.0)
    low = (seed + 2**63) % 2**64 - 2**63
    assert torch.equal(ops.sample(row, seed=seed).tokens, ops.sample(row, seed=torch.tensor(low)).tokens)
    by_number, by_tensor = (ops.sample(row, seed=1, offset=o).tokens for o in (seed, torch.tensor(low)))
    assert torch.equal(by_number, by_tensor)


def test_seeds_and_offsets_per_row() -> None:
    row = cases.random_logits(1000, scale=1.0)
    logits = row.expand(40, 1000)
    seeds, offsets = torch.arange(40) * 7, torch.arange(40, dtype=torch.int32)
    got = ops.sample(logits, seed=seeds, offset=offsets).tokens
    for i in range(40):
        assert got[i] == ops.sample(logits, seed=int(seeds[i]), offset=int(offsets[i])).tokens[i]


def test_settings_per_row() -> None:
    logits = cases.random_logits(4, 1000, scale=1.0)
    settings = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]),
        "top_k": torch.tensor([0, 5, 0, 40]),
        "top_p": torch.tensor([0.5, 1.0, 0.75, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.125, 0.0]),
    }
    got = ops.sample(logits, seed=9, **settings)
    for i in range(4):
        numbers = {name: value[i].item() for name, value in settings.items()}
        one = ops.sample(logits, seed=9, **numbers)
        assert got.tokens[i] == one.tokens[i]
        assert got.logprob[i] == one.logprob[i]


def test_draws_differ_by_seed_offset_and_row() -> None:
    row = torch.zeros(1, 4096)
    draws = [ops.sample(row, seed=s, offset=o).tokens.item() for s in range(8) for o in range(8)]
    assert len(set(draws)) > 55


@cases.by_dtype()
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_strided_rows_read_nothing_around_them(name: str, layout: str, dtype: torch.dtype) -> None:
    for vocabulary in (1, 63, 4097):
        logits = cases.random_logits(3, 4, vocabulary, dtype=dtype)
        expected = ops.sample(logits, seed=2, **FILTERS[name])
        got = ops.sample(cases.LAYOUTS[layout](logits), seed=2, **FILTERS[name])
        assert torch.equal(got.tokens, expected.tokens)
        assert cases.same_bits(got.logprob, expected.logprob)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("shape", [(1, cases.LARGEST), (100, 4097)], ids=str)
def test_thread_count_changes_no_bit(shape: tuple[int, int], name: str) -> None:
    logits = cases.random_logits(*shape)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.sample(logits, seed=4, **FILTERS[name]))
    for result in results:
        assert torch.equal(result.tokens, results[0].tokens)
        assert cases.same_bits(result.logprob, results[0].logprob)
        assert all(map(cases.same_bits, result.stats, results[0].stats))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3).double()}, "logits has dtype torch.float64, expected float32"),
        ({"seed": 1.5}, "seed is 1.5, expected an integer or an integer tensor"),
        ({"seed": torch.ones(2)}, "seed has dtype torch.float32, expected int64 or int32"),
        ({"seed": torch.ones(3).long()}, r"seed has shape \(3,\), expected one that broadcasts to \(2,\)"),
        ({"offset": None}, "offset is None, expected an integer"),
        ({"offset": torch.ones(2, device="meta").long()}, "offset is on meta, expected cpu"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number of at least 0"),
        ({"top_k": -2}, "top_k is -2, expected a finite number of at least 0"),
        ({"top_p": -2}, "top_p is -2, expected a finite number of at least 0"),
        ({"min_p": torch.ones(5)}, r"min_p has shape \(5,\), expected one that broadcasts to \(2,\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^sample: {message}"):
        ops.sample(**{"logits": torch.zeros(2, 3), "seed": 0, **arguments})
