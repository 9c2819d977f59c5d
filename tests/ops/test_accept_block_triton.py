"""`accept_block`'s Triton kernels beside the C++ ones: the same verdicts on many blocks, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.interpreter import LOAD, watch
from tests.ops import cases
from ugsd_fast import ops

pytestmark = cases.on_backends("accept_block", only="triton")

RULES = ("greedy", "rank", "exact", "block", "typical", "relaxed")
NUMBERS = {"rank": 2, "epsilon": 0.2, "delta": 0.5, "top_n": 3, "relax_delta": 0.2}


def blocks(batch: int, block: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a drafter near the verifier, some of them impossible, and the logits of both, some of them masked."""
    rng = cases.generator(seed)
    target = 2 * torch.randn(batch, block + 1, vocabulary, generator=rng)
    draft = target[:, :block] + torch.randn(batch, block, vocabulary, generator=rng) * torch.rand(
        batch, 1, 1, generator=rng
    )
    tokens = torch.multinomial(draft.softmax(-1).flatten(0, 1), 1, generator=rng).view(batch, block)
    for logits in (target, draft):
        logits[torch.rand(logits.shape, generator=rng) < 0.05] = -torch.inf
    wild = torch.randint(-1, vocabulary + 1, tokens.shape, generator=rng)
    return torch.where(torch.rand(tokens.shape, generator=rng) < 0.05, wild, tokens), target, draft


def on_cpp(**arguments: Any) -> ops.Acceptance:
    with ops.use_backend("cpp"):
        return ops.accept_block(**arguments)


@pytest.mark.parametrize(("rule", "batch"), [("exact", 200), ("block", 200), *((rule, 100) for rule in RULES[:2])])
def test_same_verdicts_as_cpp(rule: str, batch: int) -> None:
    """Each sequence has its own uniforms and length: one launch is hundreds of different blocks."""
    tokens, target, draft = blocks(batch, 4, 19, seed=5)
    arguments = {
        "draft_tokens": tokens,
        "target_logits": target,
        "draft_logits": draft,
        "rule": rule,
        "draft_lengths": torch.randint(0, 6, (batch,), generator=cases.generator(6)),
        "draft_logsumexp": draft.double().logsumexp(-1).float(),
        "seed": 7,
        **NUMBERS,
    }
    got, expected = ops.accept_block(**arguments), on_cpp(**arguments)
    assert torch.equal(got.num_accepted, expected.num_accepted)
    assert torch.equal(got.next_token, expected.next_token)
    cases.assert_close(got.accept_prob, expected.accept_prob, 2e-6, 5e-6)
    counts = torch.bincount(got.num_accepted, minlength=5)
    assert (counts[:4] > 0).all(), "every length is among the verdicts"


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_many_tiles_as_cpp(rule: str) -> None:
    """Split over programs, from the rightmost prefix to the leftmost."""
    tokens, target, draft = blocks(6, 3, 9001, seed=8)
    arguments = {"draft_tokens": tokens, "target_logits": target, "draft_logits": draft, "rule": rule, **NUMBERS}
    got, expected = ops.accept_block(**arguments, seed=3), on_cpp(**arguments, seed=3)
    assert torch.equal(got.num_accepted, expected.num_accepted)
    assert torch.equal(got.next_token, expected.next_token)
    cases.assert_close(got.accept_prob, expected.accept_prob, 2e-6, 5e-6)


@pytest.mark.parametrize("rule", RULES)
def test_scratch_may_hold_anything_but_counters_at_zero(rule: str) -> None:
    """A graph replays the launches over what the last replay left; nothing may be read that was not written."""
    from ugsd_fast.kernels import rows

    tokens, target, draft = blocks(3, 3, 2500, seed=9)
    arguments = {"draft_tokens": tokens, "target_logits": target, "draft_logits": draft, "rule": rule, **NUMBERS}
    expected = ops.accept_block(**arguments)
    for poison in (torch.nan, torch.inf, 1e30):
        for counters, floats in rows._scratch.values():
            assert not counters.any()
            floats.fill_(poison)
        out = ops.Acceptance(*(torch.full_like(field, 77) for field in expected))
        got = ops.accept_block(**arguments, out=out)
        assert all(map(cases.same_bits, got, expected))


class RowsRead:
    """Counts the elements that kernels load of each row of a tensor ``[B, K, V]``."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.start, self.row = tensor.data_ptr(), tensor.shape[-1] * tensor.element_size()
        self.loads = np.zeros(tensor.shape[:-1].numel(), dtype=np.int64)
        self.shape = tensor.shape[:-1]

    def launch(self, kernel: str, tensors: Sequence[Tensor]) -> None: ...

    def grid(self, programs: tuple[int, int, int]) -> None: ...

    def access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        rows = (np.unique(addresses).astype(np.int64) - self.start) // self.row
        inside = (rows >= 0) & (rows < len(self.loads))
        if kind == LOAD:
            np.add.at(self.loads, rows[inside], 1)

    @property
    def elements(self) -> Tensor:
        return torch.from_numpy(self.loads).view(self.shape)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_of_the_drafter_only_rows_of_residuals_are_read(rule: str) -> None:
    """With its logsumexp given: one logit of the other rows, that of the drafted token. `block` stops at the first
    success from the right: no row left of it is read."""
    batch, block, vocabulary = 40, 4, 150
    tokens, target, draft = blocks(batch, block, vocabulary, seed=12)
    arguments = {"draft_tokens": tokens, "target_logits": target, "draft_logits": draft, "rule": rule, "seed": 4}
    arguments["draft_logsumexp"] = draft.double().logsumexp(-1).float()
    read = RowsRead(draft)
    with watch(read):
        got = ops.accept_block(**arguments)
    kept = got.num_accepted[:, None]
    position = torch.arange(block)
    whole = position == kept  # its residual gives the next token
    if rule == "block":
        tried = torch.cat([torch.zeros(batch, 1), got.accept_prob[:, :-1]], -1) > 0  # h of the prefix before a row
        whole |= (position > kept) & (kept < block) & tried
        assert (whole.sum(-1) > 1).any(), "some block tries more than one prefix"
        assert ((kept > 1) & (kept < block)).any(), "some block leaves rows on the left"
    assert torch.equal(read.elements >= vocabulary, whole)
    inside = (tokens >= 0) & (tokens < vocabulary)
    assert (read.elements[~whole] <= inside[~whole].long()).all()


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_unread_rows_of_the_drafter_may_hold_anything(rule: str) -> None:
    batch, block, vocabulary = 40, 4, 150
    tokens, target, draft = blocks(batch, block, vocabulary, seed=12)
    arguments = {"draft_tokens": tokens, "target_logits": target, "rule": rule, "seed": 4}
    arguments["draft_logsumexp"] = draft.double().logsumexp(-1).float()
    expected = ops.accept_block(**arguments, draft_logits=draft)
    unread = torch.arange(block) < expected.num_accepted[:, None]  # left of the residual's row
    poisoned = torch.where(unread[..., None], torch.nan, draft)
    own = tokens.clamp(0, vocabulary - 1)[..., None]
    poisoned.scatter_(-1, own, draft.gather(-1, own))
    got = ops.accept_block(**arguments, draft_logits=poisoned)
    assert unread.any()
    assert all(map(cases.same_bits, got, expected))
