"""The `logprob_rank` oracle against counting and MATH.md's log-softmax."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops import cases
from tests.reference.definitions import clean, rank, statistics
from ugsd_fast.reference import logprob_rank


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("vocabulary", [1, 2, 40])
def test_every_token_of_every_kind_of_row(vocabulary: int, temperature: float) -> None:
    logits = cases.rows_of_every_kind(vocabulary, torch.float32)
    tokens = torch.arange(-2, vocabulary + 2)
    logprob, ranks = logprob_rank(
        logits[:, None].expand(-1, len(tokens), -1), tokens.expand(len(logits), -1), temperature
    )
    for i, row in enumerate(logits.numpy()):
        logsumexp = statistics(row, temperature).logsumexp
        for j, token in enumerate(tokens.tolist()):
            assert ranks[i, j] == rank(row, token)
            inside = 0 <= token < vocabulary and clean(row)[token] > -math.inf
            expected = float(row[token]) / temperature - logsumexp if inside else -math.inf
            assert logprob[i, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-10)


def test_given_logsumexp_is_subtracted() -> None:
    logprob, _ = logprob_rank(torch.tensor([[1.0, 3.0]]), torch.tensor([1]), 2.0, torch.tensor([10.0]))
    assert logprob.tolist() == [-8.5]
