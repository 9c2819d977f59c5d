"""Lossless sampling through the whole loop: what `Decoder` emits has the verifier's own law.

The pair is small enough to write that law down: the next token depends on the two before it. Everything but the
models' forward is the real thing: drafting, filtering, acceptance, rollback, pending tokens, bonus, batches, seeds.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import chi_square
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast import reference as oracle

VOCABULARY = 24
TOKENS = 4
DRAWS = 20_000
PROMPT = (0, 0)
INPUTS = {"input_ids": torch.tensor([PROMPT])}
SAMPLING = {"temperature": 0.8, "top_k": 14, "top_p": 0.95, "min_p": 0.01}


class TableSequence:
    """The request of a `TableModel`: what was appended, and not rolled back, decides."""

    def __init__(self, table: Tensor):
        self._table = table
        self._tokens = list(PROMPT)
        self.length = self.forwards = 0

    def pack_key(self, tokens: Tensor) -> None:
        """Each request by itself."""

    def check_room(self, count: int) -> None:
        """There is always room."""

    def forward(self, tokens: Tensor, *, keep: int) -> Tensor:
        self._tokens += tokens[0].tolist()
        self.length = len(self._tokens)
        self.forwards += 1
        ends = range(self.length - keep + 1, self.length + 1)
        return torch.stack([self._table[self._tokens[end - 2], self._tokens[end - 1]] for end in ends])[None]

    def rollback(self, rejected: int) -> None:
        self.length -= rejected
        del self._tokens[self.length :]


class TableModel(AudioLM):
    """Logits [V, V, V] of the next token after each two, instead of a network."""

    def __init__(self, table: Tensor):
        self.table = table
        self.processor = self.family = None

    device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]
    vocab_size = property(lambda self: self.table.shape[-1])  # type: ignore[assignment]
    eos_token_ids = frozenset()  # type: ignore[assignment]

    def open(self, inputs: Any) -> Any:
        return TableSequence(self.table)


def pair() -> tuple[TableModel, TableModel]:
    """A drafter that is right about half of the time, and its verifier."""
    generator = torch.Generator().manual_seed(5)
    target, other = (torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator) for _ in range(2))
    return TableModel(1.5 * target + other), TableModel(2.0 * target)


def law(table: Tensor, sampling: dict[str, Any]) -> Tensor:
    """Probability [V, V, V, V] of the first four tokens, in float64, by the reference's filters."""
    p = torch.softmax(oracle.filter_logits(table.double(), **sampling).double(), -1)
    first, second, third = p[PROMPT], p[PROMPT[1]], p
    return first[:, None, None, None] * second[:, :, None, None] * third[:, :, :, None] * p[None]


def check(tokens: Tensor, expected: Tensor) -> None:
    """Each token's law, and that of each two that follow each other."""
    positions = range(TOKENS)
    for kept in [*itertools.combinations(positions, 1), (0, 1), (1, 2), (2, 3)]:
        marginal = expected.sum([position for position in positions if position not in kept]).flatten()
        cells = torch.zeros(len(tokens), dtype=torch.long)
        for position in kept:
            cells = cells * VOCABULARY + tokens[:, position]
        assert chi_square(torch.bincount(cells, minlength=len(marginal)), marginal) > 1e-3, kept


def decoder(rule: Any, **settings: Any) -> Decoder:
    draft, verifier = pair()
    config = UGSDConfig(always_escalate=True, rule=rule, eos_token_id=-1, **settings)
    return Decoder(draft, LocalVerifier(verifier), config)


@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_batches_have_the_verifiers_law(rule: Any, bonus: bool) -> None:
    sampling = SAMPLING if bonus else {"temperature": 1.0}
    one = decoder(rule, block_size=3, bonus=bonus, seed=11, **sampling)
    draws = DRAWS if bonus else DRAWS // 8
    requests = [INPUTS] * draws
    results = one.generate(inputs=requests, verifier_inputs=requests, max_new_tokens=TOKENS, max_batch_size=128)
    check(torch.tensor([result.tokens for result in results]), law(pair()[1].table, sampling))
    rate = sum(result.metrics.acceptance_rate for result in results) / draws
    assert 0.3 < rate < 0.9, "both acceptance and residual are drawn from"


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_single_requests_have_the_verifiers_law(rule: Any) -> None:
    tokens = [
        decoder(rule, block_size=2, seed=seed, **SAMPLING)
        .generate(inputs=INPUTS, verifier_inputs=INPUTS, max_new_tokens=TOKENS)
        .tokens
        for seed in range(1_000)
    ]
    check(torch.tensor(tokens), law(pair()[1].table, SAMPLING))


def test_the_law_tells_a_lossy_rule_apart() -> None:
    lossy = decoder("typical", block_size=3, seed=11, **SAMPLING)
    requests = [INPUTS] * 2_000
    results = lossy.generate(inputs=requests, verifier_inputs=requests, max_new_tokens=TOKENS, max_batch_size=128)
    with pytest.raises(AssertionError):
        check(torch.tensor([result.tokens for result in results]), law(pair()[1].table, SAMPLING))
