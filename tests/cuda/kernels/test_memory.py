"""What memory the kernels touch: what they were given, of drafted rows no more than they need, and all results."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.cuda import emulated
from tests.ops import cases, guard_pages
from tests.ops.calls import same
from tests.ops.guard_pages import PAGE, guarded
from tests.ops.test_out import poisoned
from ugsd_fast import ops

SIZES = {
    1: "no vector at all",
    7: "a tail alone",
    1023: "one column short of a piece",
    1031: "the second piece is a tail, and every row but the first off a boundary of 16 bytes",
    4096: "whole pieces only",
}
BLOCK, ROW_PAGES = 4, 3
NONE, ALL = 0, 3  # of mprotect: no access, reading and writing


@pytest.fixture(params=[True, False], ids=["at the end of a page", "at the start of a page"])
def at_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Where tensors lie. Workspaces are exactly as large as asked for, between forbidden pages, and full of NaN."""
    side: bool = request.param
    counters: list[Tensor] = []

    def make(device: torch.device, count: int, size: int) -> tuple[Tensor, Tensor]:
        counters.append(guarded(torch.zeros(count, dtype=torch.int32), side))
        size = -(-size // 16) * 16  # a GPU's allocations start at such an address
        return counters[-1], guarded(torch.full((size,), 255, dtype=torch.uint8), side)

    def reserve(count: int, size: int) -> tuple[int, int]:
        made = make(torch.device("cpu"), count, size)
        return made[0].data_ptr(), made[1].data_ptr()

    monkeypatch.setattr(emulated.kernels, "_launch", lambda tensor: (reserve, 0))
    yield side
    assert counters
    assert not any(map(torch.any, counters)), "every call leaves its counters at zero"
    guard_pages._forbidden.clear()


@pytest.mark.parametrize("vocabulary", SIZES)
@cases.by_dtype()
def test_no_byte_outside_a_tensor_and_every_result_written(at_end: bool, dtype: torch.dtype, vocabulary: int) -> None:
    """A read or write of one byte outside inputs, results or workspace ends the process."""
    with ops.use_backend("cuda"):
        for op, inputs in guard_pages.calls(at_end, dtype, vocabulary):
            if op == "lm_head_stats":
                continue
            call: Any = getattr(ops, op)
            expected = call(**inputs)
            if op != "kv_compact":
                out = tree_map(lambda result: guarded(result, at_end), poisoned(expected))
                assert same(call(**inputs, out=out), expected), (op, inputs)


def protect(tensor: Tensor, flags: int) -> None:
    size = tensor.numel() * tensor.element_size()
    assert tensor.data_ptr() % PAGE == size % PAGE == 0
    if guard_pages._libc.mprotect(tensor.data_ptr(), size, flags):
        raise OSError(ctypes.get_errno(), "mprotect")


@pytest.mark.parametrize("accepted", range(BLOCK + 1))
@pytest.mark.parametrize("rule", ["exact", "block"])
@cases.by_dtype()
def test_of_drafted_rows_the_residuals_alone_is_read(dtype: torch.dtype, rule: str, accepted: int) -> None:
    """With ``draft_logsumexp`` given; of the others the drafted token's page stays readable, all else is forbidden."""
    in_page = PAGE // dtype.itemsize
    vocabulary = ROW_PAGES * in_page
    target = cases.random_logits(1, BLOCK + 1, vocabulary, dtype=dtype, seed=1)
    draft = guarded(cases.random_logits(1, BLOCK, vocabulary, dtype=dtype, seed=2), at_end=False)
    tokens = torch.arange(BLOCK)[None] * 7 + 3
    draft.scatter_(2, tokens[..., None], 6.0)  # likelier than to the verifier: a large uniform rejects
    target.scatter_(2, tokens[..., None], 5.0)
    uniforms = torch.full((1, BLOCK + 1), 0.9999, dtype=torch.float64)
    uniforms[0, : accepted if rule == "exact" else 0] = 0
    if accepted and rule == "block":
        uniforms[0, accepted - 1] = 0
    logsumexp = draft.double().logsumexp(-1).float()

    def call() -> Any:
        settings = (None, 0.0, None, 0.0, None, logsumexp, True, 0, None, 0, None, uniforms)
        return emulated.kernels.accept_block(target, tokens, draft, rule, *settings)

    expected = call()
    assert int(expected[0]) == accepted
    hidden = [draft[0, i, in_page:] for i in range(BLOCK) if i != accepted]
    for row in hidden:
        protect(row, NONE)
    got = call()
    for row in hidden:
        protect(row, ALL)
    assert same(got, expected)


@pytest.mark.parametrize("token", [-1, -(2**40), 2**40, 4096])
@pytest.mark.parametrize("rule", ["greedy", "rank", "exact", "block", "typical", "relaxed"])
def test_ids_outside_the_vocabulary_are_rejected(rule: str, token: int) -> None:
    target, draft = cases.random_logits(1, 3, 4096), cases.random_logits(1, 2, 4096, seed=1)
    with ops.use_backend("cuda"):
        verdict = ops.accept_block(
            torch.tensor([[token, 0]]), target, draft if rule in ("exact", "block") else None, rule=rule
        )
        logprob, rank = ops.logprob_rank(target[:, 0], torch.tensor([token]))
    assert int(verdict.num_accepted) == 0
    assert float(verdict.accept_prob[0, 0]) == 0
    assert 0 <= int(verdict.next_token) < 4096
    assert (float(logprob), int(rank)) == (-torch.inf, 4097)
