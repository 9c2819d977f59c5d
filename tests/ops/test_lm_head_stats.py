"""`lm_head_stats` on every backend against the float64 product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops, reference

pytestmark = cases.on_backends("lm_head_stats")

TOLERANCE = {
    # Products accumulate in float32: a logit of a few units is known to some 1e-6, and a sum of D = 2048 of them
    # to a few times that. Inputs are exact in every dtype.
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 1e-5),
    torch.float16: (1e-5, 1e-5),
}


def head(
    rows: tuple[int, ...], vocabulary: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose logits have standard deviation 3."""
    hidden = cases.random_logits(*rows, width, dtype=dtype, seed=seed, scale=1.0)
    weight = cases.random_logits(vocabulary, width, dtype=dtype, seed=seed + 1, scale=3.0 / width**0.5)
    return hidden, weight


def assert_stats(got: reference.TokenStats, expected: reference.TokenStats, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCE[dtype]
    clear = expected.margin > 1e-4
    assert torch.equal(got.argmax[clear], expected.argmax[clear])
    for name in ("logsumexp", "entropy", "max_logit", "margin"):
        cases.assert_close(getattr(got, name), getattr(expected, name), rtol, atol, name)


@cases.by_dtype()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])  # every tile, and more rows than fit in one
@pytest.mark.parametrize(
    ("vocabulary", "width"),
    [
        (1, 8),  # no second logit
        (63, 1),  # one product a logit
        (1000, 63),  # widths off the vector
        (4097, 64),  # a second block of one column
        (5, 2048),  # fewer weight rows than a tile
        (9000, 33),  # three blocks
        (7, 5000),  # rows of several pages
    ],
    ids=str,
)
def test_matches_float64(vocabulary: int, width: int, rows: int, dtype: torch.dtype) -> None:
    hidden, weight = head((rows,), vocabulary, width, dtype)
    assert_stats(ops.lm_head_stats(hidden, weight), reference.lm_head_stats(hidden, weight), dtype)


@cases.by_dtype()
def test_matches_float64_at_a_real_size(dtype: torch.dtype) -> None:
    hidden, weight = head((5,), 32000, 256, dtype)
    assert_stats(ops.lm_head_stats(hidden, weight), reference.lm_head_stats(hidden, weight), dtype)


@cases.by_dtype()
def test_bias_and_temperature(dtype: torch.dtype) -> None:
    hidden, weight = head((2, 3), 4097, 48, dtype)
    bias = cases.random_logits(4097, dtype=dtype, seed=9)
    for temperature in (0.5, torch.tensor([0.0, 0.5, 2.0])):
        got = ops.lm_head_stats(hidden, weight, bias, temperature=temperature)
        assert got.entropy.shape == (2, 3)
        assert_stats(got, reference.lm_head_stats(hidden, weight, bias, temperature), dtype)


def test_bias_masks_columns() -> None:
    hidden, weight = head((3,), 1000, 16, torch.float32)
    bias = torch.zeros(1000)
    bias[::2], bias[1::4] = -torch.inf, torch.nan
    got = ops.lm_head_stats(hidden, weight, bias)
    assert_stats(got, reference.lm_head_stats(hidden, weight, bias), torch.float32)
    nothing = ops.lm_head_stats(hidden, weight, torch.full((1000,), -torch.inf))
    assert nothing.argmax.tolist() == [-1] * 3
    assert nothing.entropy.tolist() == [0.0] * 3
    assert nothing.logsumexp.tolist() == [-torch.inf] * 3


def test_product_is_not_rounded_to_the_dtype() -> None:
    # In bfloat16 both logits would round to 256: the float32 products tell them apart.
    hidden = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[256.0, 0.25], [256.0, 0.5]], dtype=torch.bfloat16)
    got = ops.lm_head_stats(hidden, weight)
    assert got.argmax.tolist() == [1]
    assert got.margin.tolist() == [0.25]


def test_ties_take_the_lowest_index() -> None:
    weight = torch.zeros(5000, 8)
    weight[[17, 4095, 4999]] = 1.0
    got = ops.lm_head_stats(torch.ones(2, 8), weight)
    assert got.argmax.tolist() == [17, 17]
    assert got.margin.tolist() == [0.0, 0.0]


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most while ``call`` runs."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        pytest.skip("this system does not let a process reset its peak of resident memory")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def test_no_logits_in_memory(backend: cases.Backend) -> None:
    if not backend.native:
        pytest.skip("the oracle makes its logits")
    rows, vocabulary = 96, 400_000
    hidden, weight = head((rows,), vocabulary, 8, torch.bfloat16)
    logits = 4 * rows * vocabulary
    ops.lm_head_stats(hidden[:1], weight)  # what the first call of all loads is not counted
    assert peak_growth(lambda: torch.matmul(hidden.float(), weight.float().T)) > logits // 2
    # A thread holds 4096 logits a row.
    scratch = torch.get_num_threads() * 4 * rows * 4096
    assert peak_growth(lambda: ops.lm_head_stats(hidden, weight)) < scratch + logits // 20


def test_no_rows() -> None:
    for field in ops.lm_head_stats(torch.empty(0, 8), torch.ones(5, 8)):
        assert field.shape == (0,)


@cases.by_dtype()
@pytest.mark.parametrize("width", [1, 31, 64])
def test_strided_rows_read_nothing_around_them(width: int, dtype: torch.dtype) -> None:
    hidden, weight = head((2, 3), 100, width, dtype)
    expected = ops.lm_head_stats(hidden, weight)
    poisoned = [cases.embedded(hidden), cases.embedded(weight)]
    got = ops.lm_head_stats(*poisoned)
    bias = torch.zeros(200, dtype=dtype)
    bias[1::2] = torch.inf
    with_bias = ops.lm_head_stats(hidden.transpose(0, 1).contiguous().transpose(0, 1), weight, bias[::2])
    for name in expected._fields:
        assert cases.same_bits(getattr(got, name), getattr(expected, name)), name
        assert cases.same_bits(getattr(with_bias, name), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_thread_count_changes_no_bit(dtype: torch.dtype, backend: cases.Backend) -> None:
    if not backend.native:
        pytest.skip("the oracle's matrix product is torch's, whose sums may depend on threads")
    hidden, weight = head((3,), 20000, 64, dtype)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            results.append(ops.lm_head_stats(hidden, weight))
    assert all(cases.same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_rows_do_not_depend_on_their_neighbours(backend: cases.Backend) -> None:
    if not backend.native:
        pytest.skip("the oracle's matrix product is torch's, whose sums may depend on the number of rows")
    hidden, weight = head((7,), 500, 100, torch.bfloat16)
    together = ops.lm_head_stats(hidden, weight)
    for row in range(7):
        alone = ops.lm_head_stats(hidden[row], weight)
        assert together.logsumexp[row] == alone.logsumexp


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(2, 4).double()}, "hidden has dtype torch.float64, expected float32"),
        ({"weight": torch.zeros(3, 5)}, r"hidden has shape \(2, 4\), expected \(2, 5\)"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), expected 2 dimensions"),
        ({"weight": torch.zeros(3, 4).half()}, "weight has dtype torch.float16, expected torch.float32"),
        ({"weight": torch.zeros(0, 4)}, r"weight has shape \(0, 4\), expected at least 1 row"),
        ({"weight": torch.zeros(4, 3).T}, "weight has stride 3 in its last dimension, expected 1"),
        ({"weight": torch.zeros(3, 4, device="meta")}, "weight is on meta, expected cpu"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.zeros(3).half()}, "bias has dtype torch.float16, expected torch.float32"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number of at least 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float], message: str) -> None:
    valid = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=f"^lm_head_stats: {message}"):
        ops.lm_head_stats(**{**valid, **arguments})
