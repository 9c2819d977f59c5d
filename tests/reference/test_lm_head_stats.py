"""The `lm_head_stats` oracle: `token_stats` of a product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops import cases
from tests.reference.definitions import statistics
from ugsd_fast.reference import lm_head_stats


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@cases.by_dtype()
def test_matches_the_written_out_product(dtype: torch.dtype, with_bias: bool) -> None:
    hidden = cases.random_logits(2, 7, dtype=dtype, scale=1.0)
    weight = cases.random_logits(30, 7, dtype=dtype, seed=1, scale=1.0)
    bias = cases.random_logits(30, dtype=dtype, seed=2) if with_bias else None
    got = lm_head_stats(hidden, weight, bias, 0.7)
    for i, row in enumerate(hidden.double().numpy()):
        logits = np.array([float((row * column).sum()) for column in weight.double().numpy()])
        if bias is not None:
            logits += bias.double().numpy()
        expected = statistics(logits, 0.7)
        assert got.argmax[i] == expected.argmax
        assert got.logsumexp[i].item() == pytest.approx(expected.logsumexp, rel=1e-12)
        assert got.entropy[i].item() == pytest.approx(expected.entropy, rel=1e-10)
        assert got.margin[i].item() == pytest.approx(expected.margin, rel=1e-9)
