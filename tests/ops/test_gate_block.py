"""`gate_block` on every backend: one uncertainty a block; it escalates if it exceeds the threshold."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops

pytestmark = cases.on_backends("gate_block")

REDUCTIONS = ("max", "mean", "first")


def uncertainty_of(entropies: list[float], reduce: str) -> float:
    """The definition, on the drafted positions of one block."""
    if not entropies:
        return 0.0
    if reduce == "first":
        return entropies[0]
    if any(map(math.isnan, entropies)):
        return math.nan
    return max(entropies) if reduce == "max" else math.fsum(entropies) / len(entropies)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 3), (3, 200), (5, 0), (0, 5), (0, 0)], ids=str)
def test_matches_the_definition(shape: tuple[int, int], reduce: str) -> None:
    batch, block = shape
    rng = random.Random(0)
    entropy = torch.rand(shape, generator=cases.generator(1)) * 4
    for lengths in (None, torch.tensor([rng.randint(0, block) for _ in range(batch)], dtype=torch.int64)):
        uncertainty, escalate = ops.gate_block(entropy, lengths, threshold=1.7, reduce=reduce)
        assert uncertainty.dtype == torch.float32
        assert escalate.dtype == torch.bool
        assert uncertainty.shape == escalate.shape == (batch,)
        for b in range(batch):
            length = block if lengths is None else int(lengths[b])
            expected = uncertainty_of(entropy[b, :length].tolist(), reduce)
            assert uncertainty[b].item() == pytest.approx(expected, rel=2e-7)
            assert abs(expected - 1.7) > 1e-6, "this test does not decide equality"
            assert escalate[b].item() == (expected > 1.7)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_block_has_uncertainty_zero(reduce: str) -> None:
    entropy = torch.full((2, 3), torch.nan)
    uncertainty, escalate = ops.gate_block(
        entropy, torch.tensor([0, 0]), threshold=torch.tensor([1.0, -1.0]), reduce=reduce
    )
    assert uncertainty.tolist() == [0.0, 0.0]
    assert escalate.tolist() == [False, True]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_escalates(reduce: str, position: int) -> None:
    entropy = torch.tensor([[0.1, 0.3, 0.2]])
    entropy[0, position] = torch.nan
    uncertainty, escalate = ops.gate_block(entropy, threshold=100.0, reduce=reduce)
    seen = reduce != "first" or position == 0
    assert uncertainty.isnan().item() == seen
    assert escalate.item() == seen


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_positions_past_the_length_are_not_looked_at(reduce: str) -> None:
    entropy = torch.tensor([[0.1, 0.2, torch.nan, 9.0], [0.3, torch.nan, 9.0, torch.inf]])
    uncertainty, escalate = ops.gate_block(
        entropy, torch.tensor([2, 1], dtype=torch.int32), threshold=1.0, reduce=reduce
    )
    expected = {"max": [0.2, 0.3], "mean": [0.15, 0.3], "first": [0.1, 0.3]}[reduce]
    assert uncertainty.tolist() == pytest.approx(expected)
    assert escalate.tolist() == [False, False]


def test_infinite_entropy_escalates() -> None:
    uncertainty, escalate = ops.gate_block(torch.tensor([[0.0, torch.inf]]), threshold=1e30)
    assert uncertainty.tolist() == [torch.inf]
    assert escalate.tolist() == [True]


@pytest.mark.parametrize("lengths", [[-1, 2], [0, 99], [-(2**40), 2**40]], ids=str)
def test_lengths_are_held_to_the_block(lengths: list[int]) -> None:
    buffer = torch.full((2, 6), torch.inf)
    buffer[:, 2:4] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    uncertainty, _ = ops.gate_block(buffer[:, 2:4], torch.tensor(lengths), threshold=1.0)
    assert uncertainty.tolist() == pytest.approx([0.0, 0.4])


@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_threshold_as_tensor(shape: tuple[int, ...]) -> None:
    entropy = torch.tensor([[0.5], [1.5], [2.5]])
    threshold = torch.tensor([1.0, 2.0, 2.0]) if shape == (3,) else torch.full(shape, 1.0)
    _, escalate = ops.gate_block(entropy, threshold=threshold)
    assert escalate.tolist() == (entropy[:, 0] > threshold).tolist()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_strided_entropies(reduce: str) -> None:
    entropy = torch.rand(4, 3, generator=cases.generator(1))
    expected = ops.gate_block(entropy, threshold=0.5, reduce=reduce)
    columns = torch.full((4, 6), torch.inf)
    columns[:, ::2] = entropy
    for view in (cases.embedded(entropy), columns[:, ::2], entropy.T.contiguous().T):
        got = ops.gate_block(view, threshold=0.5, reduce=reduce)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entropy": torch.zeros(2, 3).half()}, "entropy has dtype torch.float16, expected float32"),
        ({"entropy": torch.zeros(3)}, r"entropy has shape \(3,\), expected 2 dimensions \[B, K\]"),
        ({"reduce": "median"}, "reduce is 'median', expected one of 'max', 'mean', 'first'"),
        ({"lengths": torch.zeros(2)}, "lengths has dtype torch.float32, expected int64 or int32"),
        ({"lengths": torch.zeros(3).long()}, r"lengths has shape \(3,\), expected \(2,\)"),
        ({"lengths": torch.zeros(2, device="meta").long()}, "lengths is on meta, expected cpu"),
        ({"threshold": float("nan")}, "threshold is nan, expected a finite number"),
        ({"threshold": torch.zeros(3)}, r"threshold has shape \(3,\), expected one that broadcasts to \(2,\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, Tensor | float | str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^gate_block: {message}"):
        ops.gate_block(**{"entropy": torch.zeros(2, 3), "threshold": 1.0, **arguments})


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_block_at_the_threshold_stays(reduce: str) -> None:
    above = torch.nextafter(torch.tensor(1.5), torch.tensor(2.0)).item()
    uncertainty, escalate = ops.gate_block(torch.tensor([[1.5], [above], [0.0]]), threshold=1.5, reduce=reduce)
    assert uncertainty.tolist() == [1.5, above, 0.0]
    assert escalate.tolist() == [False, True, False]
    assert ops.gate_block(torch.zeros(1, 3), threshold=0.0, reduce=reduce)[1].tolist() == [False]
