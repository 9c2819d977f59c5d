"""The `gate_block` oracle by hand."""

from __future__ import annotations

import pytest
import torch

from ugsd_fast.reference import gate_block

NAN = torch.nan


@pytest.mark.parametrize(
    ("entropy", "length", "expected"),
    [
        ([0.25, 2.0, 0.5], 3, {"max": 2.0, "mean": 2.75 / 3, "first": 0.25}),
        ([0.25, 2.0, 0.5], 1, {"max": 0.25, "mean": 0.25, "first": 0.25}),
        ([0.25, NAN, NAN], 1, {"max": 0.25, "mean": 0.25, "first": 0.25}),
        ([NAN, NAN, NAN], 0, {"max": 0.0, "mean": 0.0, "first": 0.0}),
        ([0.25, 2.0, NAN], 3, {"max": NAN, "mean": NAN, "first": 0.25}),
        ([NAN, 2.0, 0.5], 2, {"max": NAN, "mean": NAN, "first": NAN}),
        ([-0.0, 0.0, 0.0], 3, {"max": 0.0, "mean": 0.0, "first": 0.0}),
    ],
    ids=["whole", "one", "nan-past-length", "empty", "nan-last", "nan-first", "zeros"],
)
@pytest.mark.parametrize("reduce", ["max", "mean", "first"])
def test_uncertainty_and_escalation(entropy: list[float], length: int, expected: dict[str, float], reduce: str) -> None:
    uncertainty, escalate = gate_block(torch.tensor([entropy]), torch.tensor([length]), 1.0, reduce)
    assert uncertainty.item() == pytest.approx(expected[reduce], nan_ok=True)
    assert escalate.item() == (not expected[reduce] < 1.0)


def test_threshold_per_block() -> None:
    _, escalate = gate_block(torch.tensor([[1.0], [1.0]]), None, torch.tensor([0.5, 1.5]))
    assert escalate.tolist() == [True, False]
