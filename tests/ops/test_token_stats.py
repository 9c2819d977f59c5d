"""`token_stats` on every backend against the float64 oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops, reference

pytestmark = cases.on_backends("token_stats")


@cache
def oracle(vocabulary: int, dtype: torch.dtype, temperature: float) -> reference.TokenStats:
    return reference.token_stats(cases.rows_of_every_kind(vocabulary, dtype), temperature)


@cases.by_dtype()
@cases.by_size()
def test_matches_float64(vocabulary: int, dtype: torch.dtype) -> None:
    got = ops.token_stats(cases.rows_of_every_kind(vocabulary, dtype))
    cases.assert_stats(got, oracle(vocabulary, dtype, 1.0), dtype)


@pytest.mark.parametrize("temperature", [1e-8, 0.1, 0.7, 1.7, 1e6])
@cases.by_size(cases.SMALL_SIZES)
def test_temperature(vocabulary: int, temperature: float) -> None:
    got = ops.token_stats(cases.rows_of_every_kind(vocabulary, torch.float32), temperature=temperature)
    cases.assert_stats(got, oracle(vocabulary, torch.float32, temperature), torch.float32)


def test_temperature_zero_gives_the_statistics_at_one() -> None:
    logits = cases.rows_of_every_kind(1000, torch.float32)
    got = ops.token_stats(logits, temperature=0)
    for name, value in ops.token_stats(logits)._asdict().items():
        assert cases.same_bits(getattr(got, name), value), name


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)], ids=str)
def test_temperature_per_row(shape: tuple[int, ...]) -> None:
    logits = cases.random_logits(2, 3, 1000)
    temperature = 0.25 + torch.rand(shape, generator=cases.generator(1))
    got = ops.token_stats(logits, temperature=temperature)
    for a in range(2):
        for b in range(3):
            one = ops.token_stats(logits[a, b], temperature=temperature.expand(2, 3)[a, b].item())
            for name in one._fields:
                assert cases.same_bits(getattr(got, name)[a, b], getattr(one, name)), name


def test_temperature_zero_in_some_rows() -> None:
    logits = cases.random_logits(3, 1000)
    got = ops.token_stats(logits, temperature=torch.tensor([0.0, 0.5, 2.0]))
    cases.assert_stats(got, reference.token_stats(logits, torch.tensor([1.0, 0.5, 2.0])), torch.float32)


@cases.by_dtype()
def test_row_with_nothing_finite(dtype: torch.dtype) -> None:
    logits = torch.full((3, 4097), -torch.inf, dtype=dtype)
    logits[1] = torch.nan
    logits[2, ::2] = torch.nan
    got = ops.token_stats(logits)
    assert got.logsumexp.tolist() == [-torch.inf] * 3
    assert got.entropy.tolist() == [0.0] * 3
    assert got.argmax.tolist() == [-1] * 3
    assert got.margin.tolist() == [0.0] * 3


def test_infinity_among_ordinary_rows_stays_in_its_row() -> None:
    logits = cases.random_logits(3, 5000)
    alone = ops.token_stats(logits[2])
    logits[0], logits[1, 17] = -torch.inf, torch.inf
    got = ops.token_stats(logits)
    assert got.argmax.tolist() == [-1, 17, int(alone.argmax)]
    assert not any(field.isnan().any() for field in got)
    assert got.entropy[2] == alone.entropy


@cases.by_dtype()
def test_nan_is_a_masked_token(dtype: torch.dtype) -> None:
    logits = cases.random_logits(2, 4097, dtype=dtype)
    holes = torch.rand(logits.shape, generator=cases.generator(1)) < 0.4
    holes[0, 0] = holes[1, -1] = True
    with_nan = ops.token_stats(logits.masked_fill(holes, torch.nan))
    for name, value in ops.token_stats(logits.masked_fill(holes, -torch.inf))._asdict().items():
        assert cases.same_bits(getattr(with_nan, name), value), name


@pytest.mark.parametrize("first", [0, 1, 15, 16, 17, 999, 4095, 4096, 8191])
def test_ties_take_the_lowest_index(first: int) -> None:
    logits = cases.random_logits(8193)
    logits[first] = logits[first + 1] = logits[-1] = 20.0
    got = ops.token_stats(logits)
    assert got.argmax == first
    assert got.margin == 0


def test_signed_zeros_tie() -> None:
    assert ops.token_stats(torch.tensor([-1.0, -0.0, 0.0])).argmax == 1
    assert ops.token_stats(torch.tensor([-1.0, 0.0, -0.0])).argmax == 1


@pytest.mark.parametrize("vocab_size", [1, 15, 63, 999])
def test_padded_vocabulary_is_ignored(vocab_size: int) -> None:
    logits = cases.random_logits(3, 1000)
    expected = ops.token_stats(logits[:, :vocab_size].contiguous())
    logits[:, vocab_size:] = torch.tensor([torch.inf, torch.nan, 1e30])[:, None]
    for name, value in ops.token_stats(logits, vocab_size=vocab_size)._asdict().items():
        assert cases.same_bits(value, getattr(expected, name)), name


def test_vocabulary_of_one() -> None:
    got = ops.token_stats(torch.tensor([[3.5], [-torch.inf], [torch.nan]]))
    assert got.logsumexp.tolist() == [3.5, -torch.inf, -torch.inf]
    assert got.entropy.tolist() == [0, 0, 0]
    assert got.argmax.tolist() == [0, -1, -1]
    assert got.margin.tolist() == [torch.inf, 0, 0]


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (0, 0, 7)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    for field in ops.token_stats(torch.empty(shape)):
        assert field.shape == shape[:-1]


@pytest.mark.parametrize("shape", [(63,), (2, 63), (2, 3, 63), (2, 3, 4, 63), (1, 2, 1, 3, 63)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    logits = cases.random_logits(*shape)
    flat = ops.token_stats(logits.reshape(-1, 63))
    for name, value in ops.token_stats(logits)._asdict().items():
        assert value.shape == shape[:-1]
        assert torch.equal(value.flatten(), getattr(flat, name)), name


@cases.by_dtype()
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("vocabulary", [1, 63, 4097])
def test_strided_rows_read_nothing_around_them(vocabulary: int, layout: str, dtype: torch.dtype) -> None:
    logits = cases.random_logits(3, 4, vocabulary, dtype=dtype)
    expected = ops.token_stats(logits)
    got = ops.token_stats(cases.LAYOUTS[layout](logits))
    for name in got._fields:
        assert cases.same_bits(getattr(got, name), getattr(expected, name)), name


def test_rows_of_four_dimensions_that_do_not_collapse() -> None:
    logits = cases.random_logits(2, 3, 4, 63)
    got = ops.token_stats(logits.permute(2, 0, 1, 3))
    assert torch.equal(got.argmax, ops.token_stats(logits).argmax.permute(2, 0, 1))


def test_expanded_rows() -> None:
    logits = cases.random_logits(1, 1000)
    got = ops.token_stats(logits.expand(5, 1000))
    assert torch.equal(got.entropy, ops.token_stats(logits).entropy.expand(5))


@pytest.mark.parametrize("start", range(1, 17))
def test_rows_start_off_every_alignment(start: int) -> None:
    buffer = torch.full((start + 100,), torch.inf, dtype=torch.bfloat16)
    buffer[start : start + 63] = cases.random_logits(63, dtype=torch.bfloat16)
    got = ops.token_stats(buffer[start : start + 63])
    assert got.entropy == ops.token_stats(cases.random_logits(63, dtype=torch.bfloat16)).entropy


@pytest.mark.parametrize("gap", [1e-3, 1.0, 10.0, 30.0, 60.0, 80.0, 100.0, 1e3])
def test_entropy_of_nearly_certain_rows(gap: float) -> None:
    logits = torch.zeros(1, 4097)
    logits[0, 1234] = gap
    cases.assert_stats(ops.token_stats(logits), reference.token_stats(logits), torch.float32)


@pytest.mark.parametrize(("low", "high"), [(-1e4, 1e4), (1e4 - 1, 1e4), (-1e4, -1e4 + 2), (-3e38, 3e38), (0.0, 1e-38)])
def test_huge_and_tiny_logits(low: float, high: float) -> None:
    logits = torch.linspace(0, 1, 4097, dtype=torch.float64).mul(high - low).add(low).float()
    cases.assert_stats(ops.token_stats(logits), reference.token_stats(logits), torch.float32)


def test_subnormal_float16_and_bfloat16_are_read() -> None:
    for dtype, exponent in ((torch.float16, -24), (torch.bfloat16, -133)):
        logits = torch.tensor([0.0, 2.0**exponent, 0.0]).to(dtype)
        assert logits[1] > 0
        assert ops.token_stats(logits).argmax == 1, dtype


@pytest.mark.parametrize("shape", [(1, cases.LARGEST), (5, cases.LARGEST), (300, 4097), (3, 63)], ids=str)
def test_thread_count_changes_no_bit(shape: tuple[int, int]) -> None:
    logits = cases.random_logits(*shape, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.token_stats(logits, temperature=0.7))
    for name in ops.TokenStats._fields:
        assert all(cases.same_bits(getattr(r, name), getattr(results[0], name)) for r in results), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, "logits has dtype torch.float64, expected float32"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "logits has dtype torch.int64, expected float32"),
        ({"logits": torch.tensor(1.0)}, r"logits has shape \(\), expected at least 1 dimension"),
        ({"logits": torch.zeros(2, 0)}, r"logits has shape \(2, 0\), expected a last dimension of at least 1"),
        ({"logits": torch.zeros(3, 2).T}, "logits has stride 2 in its last dimension, expected 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected a finite number"),
        ({"temperature": float("inf")}, "temperature is inf, expected a finite number"),
        ({"temperature": "warm"}, "temperature is 'warm', expected a finite number"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\), expected one that broadcasts to \(2,\)"),
        ({"temperature": torch.ones(2, device="meta")}, "temperature is on meta, expected cpu"),
        ({"vocab_size": 0}, "vocab_size is 0, expected 1 to 3"),
        ({"vocab_size": 4}, "vocab_size is 4, expected 1 to 3"),
        ({"vocab_size": -1}, "vocab_size is -1, expected 1 to 3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^token_stats: {message}"):
        ops.token_stats(**{"logits": torch.zeros(2, 3), **arguments})
