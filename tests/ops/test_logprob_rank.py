"""`logprob_rank` on every backend against the float64 oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops, reference

pytestmark = cases.on_backends("logprob_rank")


@cache
def scored_rows(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Each kind of row with three tokens: the best, one at random, and one that is none."""
    logits = cases.rows_of_every_kind(vocabulary, dtype)
    best = reference.token_stats(logits).argmax.clamp(min=0)
    other = torch.randint(vocabulary, best.shape, generator=cases.generator(5))
    nothing = torch.where(torch.arange(len(best)) % 2 == 0, -1, vocabulary)
    tokens = torch.stack([best, other, nothing], -1)
    rows = logits[:, None].expand(-1, 3, -1)
    return rows, tokens, reference.logprob_rank(rows, tokens)


def assert_scores(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    rtol, atol = cases.TOLERANCE[dtype]
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int64
    assert torch.equal(got[1], expected[1]), (got[1], expected[1])
    cases.assert_close(got[0], expected[0], rtol, atol, "logprob")


@cases.by_dtype()
@cases.by_size()
def test_matches_float64(vocabulary: int, dtype: torch.dtype) -> None:
    logits, tokens, expected = scored_rows(vocabulary, dtype)
    assert_scores(ops.logprob_rank(logits, tokens), expected, dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.5])
def test_temperature_moves_the_logprob_alone(temperature: float) -> None:
    logits, tokens, plain = scored_rows(4097, torch.float32)
    got = ops.logprob_rank(logits, tokens, temperature=temperature)
    assert torch.equal(got[1], plain[1])
    assert_scores(got, reference.logprob_rank(logits, tokens, temperature), torch.float32)


def test_temperature_per_row() -> None:
    logits, tokens = cases.random_logits(2, 3, 1000), torch.arange(6).view(2, 3)
    temperature = torch.tensor([0.0, 0.5, 2.0])
    got = ops.logprob_rank(logits, tokens, temperature=temperature)
    assert_scores(got, reference.logprob_rank(logits, tokens, temperature), torch.float32)


@cases.by_dtype()
def test_given_logsumexp_is_used(dtype: torch.dtype) -> None:
    logits = cases.random_logits(3, 2, 4097, dtype=dtype)
    tokens = torch.randint(4097, (3, 2), generator=cases.generator(1))
    given = torch.randn(3, 2, generator=cases.generator(2)) * 10  # not the rows' own: it must not be recomputed
    got = ops.logprob_rank(logits, tokens, logsumexp=given, temperature=0.5)
    assert_scores(got, reference.logprob_rank(logits, tokens, 0.5, given), dtype)
    strided = given.T.contiguous().T
    assert torch.equal(ops.logprob_rank(logits, tokens, logsumexp=strided, temperature=0.5)[0], got[0])


def test_logsumexp_of_another_dtype_is_read_as_numbers() -> None:
    logits, tokens = cases.random_logits(3, 1000), torch.tensor([1, 2, 3])
    given = torch.tensor([8.0, 9.0, 10.0])
    expected = ops.logprob_rank(logits, tokens, logsumexp=given)[0]
    assert torch.equal(ops.logprob_rank(logits, tokens, logsumexp=given.double())[0], expected)


@pytest.mark.parametrize("token", [-1, -(2**40), 1000, 2**40])
def test_token_outside_the_vocabulary(token: int) -> None:
    logits = cases.embedded(cases.random_logits(2, 1000))
    logprob, rank = ops.logprob_rank(logits, torch.tensor([token, 3]))
    assert logprob[0] == -torch.inf
    assert rank[0] == 1001
    assert logprob[1] > -torch.inf


@cases.by_dtype()
def test_masked_token(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, torch.nan]], dtype=dtype).expand(4, 4)
    logprob, rank = ops.logprob_rank(logits, torch.arange(4))
    assert logprob[[1, 3]].tolist() == [-torch.inf, -torch.inf]
    assert rank.tolist() == [2, 3, 1, 3]


def test_row_with_nothing_finite() -> None:
    logits = torch.tensor([[-torch.inf, torch.nan]])
    logprob, rank = ops.logprob_rank(logits, torch.tensor([0]))
    assert logprob.tolist() == [-torch.inf]
    assert rank.tolist() == [1]


def test_tied_tokens_share_the_best_rank() -> None:
    logits = torch.tensor([5.0, 7.0, 5.0, 7.0, 5.0, 1.0]).expand(6, 6)
    assert ops.logprob_rank(logits, torch.arange(6))[1].tolist() == [3, 1, 3, 1, 3, 6]


def test_rank_counts_past_float32_and_16_bits() -> None:
    logits = torch.arange(cases.LARGEST, dtype=torch.float32)[None]
    assert ops.logprob_rank(logits, torch.tensor([0]))[1].tolist() == [cases.LARGEST]


def test_vocabulary_of_one() -> None:
    logprob, rank = ops.logprob_rank(torch.tensor([[4.0], [-torch.inf]]), torch.tensor([0, 0]))
    assert logprob.tolist() == [0.0, -torch.inf]
    assert rank.tolist() == [1, 1]


def test_no_rows() -> None:
    logprob, rank = ops.logprob_rank(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert logprob.shape == rank.shape == (0,)


@cases.by_dtype()
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("vocabulary", [1, 63, 4097])
def test_strided_rows_read_nothing_around_them(vocabulary: int, layout: str, dtype: torch.dtype) -> None:
    logits = cases.random_logits(3, 4, vocabulary, dtype=dtype)
    tokens = torch.randint(vocabulary, (3, 4), generator=cases.generator(1))
    expected = ops.logprob_rank(logits, tokens)
    got = ops.logprob_rank(cases.LAYOUTS[layout](logits), tokens.T.contiguous().T)
    assert all(map(cases.same_bits, got, expected))


def test_tokens_int32() -> None:
    logits, tokens = cases.random_logits(4, 1000), torch.tensor([0, 5, -1, 1000])
    expected = ops.logprob_rank(logits, tokens)
    assert all(map(torch.equal, ops.logprob_rank(logits, tokens.int()), expected))


@pytest.mark.parametrize("shape", [(1, cases.LARGEST), (300, 4097)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["own-logsumexp", "given-logsumexp"])
def test_thread_count_changes_no_bit(shape: tuple[int, int], given: bool) -> None:
    logits = cases.random_logits(*shape)
    tokens = torch.randint(shape[1], shape[:1], generator=cases.generator(1))
    logsumexp = torch.full(shape[:1], 14.0) if given else None
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.logprob_rank(logits, tokens, logsumexp=logsumexp))
    assert all(cases.same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, "logits has dtype torch.float64, expected float32"),
        ({"tokens": torch.zeros(2)}, "tokens has dtype torch.float32, expected int64 or int32"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens has shape \(3,\), expected \(2,\)"),
        ({"tokens": torch.zeros(2, device="meta").long()}, "tokens is on meta, expected cpu"),
        ({"logsumexp": torch.zeros(3)}, r"logsumexp has shape \(3,\), expected \(2,\)"),
        ({"logsumexp": torch.zeros(2, device="meta")}, "logsumexp is on meta, expected cpu"),
        ({"temperature": -0.5}, "temperature is -0.5, expected a finite number of at least 0"),
        ({"temperature": torch.ones(2, 2)}, r"temperature has shape \(2, 2\), expected one that broadcasts to \(2,\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float], message: str) -> None:
    valid = {"logits": torch.zeros(2, 3), "tokens": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^logprob_rank: {message}"):
        ops.logprob_rank(**{**valid, **arguments})
