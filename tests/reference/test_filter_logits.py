"""The `filter_logits` oracle against top-k, top-p and min-p written out one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops import cases
from tests.reference.definitions import clean, filtered
from ugsd_fast.reference import filter_logits

SETTINGS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**9},
    {"top_p": 0.0},
    {"top_p": 0.37},
    {"top_p": 0.95},
    {"min_p": 0.03},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.6, "min_p": 0.02, "temperature": 0.7},
    {"temperature": 3.0, "top_p": 0.8},
    {"temperature": 0.0, "top_k": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}{v:g}" for k, v in s.items()))
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 300])
def test_matches_the_definition(vocabulary: int, settings: dict[str, float]) -> None:
    logits = cases.rows_of_every_kind(vocabulary, torch.float32)
    got = filter_logits(logits, **settings)
    temperature = settings.get("temperature", 1.0)
    for i, row in enumerate(logits.numpy()):
        surely, perhaps = filtered(row, **{"temperature": 1.0, **settings}, slack=1e-12)
        kept = (got[i] > -torch.inf).numpy()
        assert (kept >= surely).all()
        assert (kept <= perhaps).all()
        np.testing.assert_allclose(got[i].numpy()[kept], clean(row)[kept] / (temperature or 1.0), rtol=1e-15)


def test_settings_per_row() -> None:
    logits = cases.random_logits(3, 50)
    got = filter_logits(
        logits, 1.0, torch.tensor([0, 3, 5]), torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0.0, 0.1, 0.0])
    )
    numbers = [(0, 0.5, 0.0), (3, 1.0, torch.tensor(0.1).item()), (5, 0.25, 0.0)]
    for row, (top_k, top_p, min_p) in enumerate(numbers):
        assert torch.equal(got[row], filter_logits(logits[row], 1.0, top_k, top_p, min_p))
