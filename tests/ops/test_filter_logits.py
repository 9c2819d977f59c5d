"""`filter_logits` on every backend against the definition in `tests.reference.definitions`."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.reference.definitions import Array, clean, filtered
from ugsd_fast import ops

pytestmark = cases.on_backends("filter_logits")

SLACK = 2e-6
"""Share of the mass within which rounding may decide on which side of a filter's bound a column falls."""

FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top-k-1": {"top_k": 1},
    "top-k-50": {"top_k": 50},
    "top-k-over-V": {"top_k": 10**6},
    "top-p-0.9": {"top_p": 0.9},
    "top-p-0.999": {"top_p": 0.999},
    "top-p-0": {"top_p": 0.0},
    "min-p": {"min_p": 0.05},
    "min-p-1": {"min_p": 1.0},
    "top-k-top-p": {"top_k": 50, "top_p": 0.8, "temperature": 1.3},
    "all": {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
    "cold": {"temperature": 0.05, "top_p": 0.99},
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
}


KINDS_AT_REAL_SIZES = 5
"""Normal, language-like, masked, NaN and tied rows: the definition sorts, and takes its time."""


@cache
def bounds(vocabulary: int, dtype: torch.dtype, name: str, kinds: int | None = None) -> tuple[Array, Array]:
    rows = cases.rows_of_every_kind(vocabulary, dtype)[:kinds].float().numpy()
    settings = {"temperature": 1.0, **FILTERS[name]}
    masks = [filtered(row, slack=SLACK, **settings) for row in rows]
    return np.stack([surely for surely, _ in masks]), np.stack([perhaps for _, perhaps in masks])


def assert_filtered(got: Tensor, logits: Tensor, surely: Array, perhaps: Array, temperature: float) -> None:
    """Kept columns hold ``logits / temperature`` and the others -inf, but for columns on a bound."""
    assert got.dtype == torch.float32
    kept = (got > -torch.inf).numpy()
    assert not got.isnan().any()
    assert (kept >= surely).all(), f"cut although inside: {np.argwhere(kept < surely)[:5].tolist()}"
    assert (kept <= perhaps).all(), f"kept although outside: {np.argwhere(kept > perhaps)[:5].tolist()}"
    s = clean(logits.float().numpy()) / (temperature or 1.0)
    np.testing.assert_allclose(got.numpy()[kept], s[kept], rtol=2e-7)


@cases.by_dtype()
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocabulary", [1, 63, 4097], ids=lambda v: f"V{v}")
def test_matches_the_definition(vocabulary: int, name: str, dtype: torch.dtype) -> None:
    logits = cases.rows_of_every_kind(vocabulary, dtype)
    got = ops.filter_logits(logits, **FILTERS[name])
    assert_filtered(got, logits, *bounds(vocabulary, dtype, name), FILTERS[name].get("temperature", 1.0))


@pytest.mark.parametrize("name", ["top-k-50", "top-p-0.999", "all"])
@pytest.mark.parametrize("vocabulary", [32000, 152064], ids=lambda v: f"V{v}")
def test_matches_the_definition_at_real_sizes(vocabulary: int, name: str) -> None:
    logits = cases.rows_of_every_kind(vocabulary, torch.bfloat16)[:KINDS_AT_REAL_SIZES]
    got = ops.filter_logits(logits, **FILTERS[name])
    expected = bounds(vocabulary, torch.bfloat16, name, KINDS_AT_REAL_SIZES)
    assert_filtered(got, logits, *expected, FILTERS[name].get("temperature", 1.0))


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 48, 49, 64, 999, 1000])
def test_top_k_keeps_exactly_k_distinct_logits(k: int) -> None:
    logits = torch.randperm(1000, generator=cases.generator(0)).float()
    kept = ops.filter_logits(logits, top_k=k) > -torch.inf
    assert kept.nonzero().flatten().tolist() == (logits >= 1000 - k).nonzero().flatten().tolist()


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.9}], ids=lambda s: next(iter(s)))
def test_tied_columns_share_their_fate(settings: dict[str, float]) -> None:
    logits = torch.full((200,), -30.0)
    logits[[5, 50, 150]] = 3.0
    kept = ops.filter_logits(logits, **settings) > -torch.inf
    assert kept.nonzero().flatten().tolist() == [5, 50, 150]


def test_top_p_stops_where_the_larger_columns_hold_enough() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.91, [0, 1, 2, 3])):
        found = (ops.filter_logits(logits, top_p=top_p) > -torch.inf).nonzero().flatten().tolist()
        assert found == kept, top_p


def test_top_p_counts_what_top_k_left() -> None:
    # Among the two that top-k keeps, the first holds 0.5 / 0.75 = 0.67: enough for 0.6, which 0.5 alone is not.
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    kept = ops.filter_logits(logits, top_k=2, top_p=0.6) > -torch.inf
    assert kept.tolist() == [False, True, False, False]


def test_temperature_zero_keeps_the_lowest_argmax_alone() -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 0.0], [-torch.inf, torch.nan, -5.0, -torch.inf]])
    got = ops.filter_logits(logits, temperature=0)
    assert got.tolist() == [[-torch.inf, 7.0, -torch.inf, -torch.inf], [-torch.inf, -torch.inf, -5.0, -torch.inf]]


def test_row_with_nothing_finite_stays_so() -> None:
    logits = torch.tensor([[-torch.inf, torch.nan]])
    for settings in FILTERS.values():
        assert ops.filter_logits(logits, **settings).tolist() == [[-torch.inf, -torch.inf]]


def test_settings_per_row_are_those_numbers() -> None:
    logits = cases.random_logits(6, 4097)
    settings = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 1.0]),
        "top_k": torch.tensor([5, 0, 40, 5000, -3, 1]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.5, 0.25, 0.75]),
        "min_p": torch.tensor([0.0, 0.125, 0.0, 0.0625, 0.0, 0.5]),
    }
    got = ops.filter_logits(logits, **settings)
    for row in range(6):
        numbers = {name: max(value[row].item(), 0) for name, value in settings.items()}
        assert torch.equal(got[row], ops.filter_logits(logits[row], **numbers)), numbers


@cases.by_dtype()
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("vocabulary", [1, 63, 4097])
def test_strided_rows_read_nothing_around_them(vocabulary: int, layout: str, dtype: torch.dtype) -> None:
    logits = cases.random_logits(3, 4, vocabulary, dtype=dtype)
    settings = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}
    expected = ops.filter_logits(logits, **settings)
    got = ops.filter_logits(cases.LAYOUTS[layout](logits), **settings)
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def test_no_rows() -> None:
    assert ops.filter_logits(torch.empty(0, 5), top_k=2).shape == (0, 5)


@pytest.mark.parametrize("shape", [(1, cases.LARGEST), (100, 4097)], ids=str)
@pytest.mark.parametrize("name", ["none", "all", "top-p-0.999"])
def test_thread_count_changes_no_bit(shape: tuple[int, int], name: str) -> None:
    logits = cases.random_logits(*shape)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.filter_logits(logits, **FILTERS[name]))
    assert all(cases.same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, "logits has dtype torch.int32, expected float32"),
        ({"logits": torch.zeros(2, 6)[:, ::2]}, "logits has stride 2 in its last dimension, expected 1"),
        ({"temperature": -1}, "temperature is -1, expected a finite number of at least 0"),
        ({"top_k": -1}, "top_k is -1, expected a finite number of at least 0"),
        ({"top_p": -0.1}, "top_p is -0.1, expected a finite number of at least 0"),
        ({"top_p": float("nan")}, "top_p is nan, expected a finite number"),
        ({"min_p": -0.1}, "min_p is -0.1, expected a finite number of at least 0"),
        ({"min_p": None}, "min_p is None, expected a finite number"),
        ({"top_k": torch.ones(3)}, r"top_k has shape \(3,\), expected one that broadcasts to \(2,\)"),
        ({"top_p": torch.ones(2, device="meta")}, "top_p is on meta, expected cpu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^filter_logits: {message}"):
        ops.filter_logits(**{"logits": torch.zeros(2, 3), **arguments})
