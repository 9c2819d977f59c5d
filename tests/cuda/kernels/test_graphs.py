"""Calls as a CUDA graph captures them: launches are kept and run later, on what the tensors hold by then."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda import emulated
from tests.ops.calls import same, tensors
from tests.ops.cases import random_logits
from tests.ops.test_out import poisoned
from ugsd_fast import ops

ROOT = Path(__file__).parents[3]
V = 1100
ALLOWED_IN_A_CAPTURE = {"cudaGetDevice", "cudaSetDevice", "cudaGetErrorString", "cudaLaunchKernelEx"}


def words(*values: int) -> Tensor:
    return torch.tensor(values)


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def rows(seed: int) -> dict[str, Any]:
    return {"logits": random_logits(2, V, seed=seed), "temperature": numbers(0.5 + seed, 1.0)}


def filters(seed: int) -> dict[str, Any]:
    return {"top_k": words(9, 50 + seed), "top_p": numbers(0.9, 0.5), "min_p": numbers(0.01, 0.1 * seed)}


def draws(seed: int) -> dict[str, Any]:
    return {"seed": words(seed, 7), "offset": words(3, seed)}


def block(rule: str, seed: int) -> dict[str, Any]:
    limits = {
        "rank": {"rank": numbers(200 + seed, 9, dtype=torch.float64)},
        "typical": {
            "epsilon": numbers(1e-4 * (seed + 1), 0.1, dtype=torch.float64),
            "delta": numbers(0.3, 0.5, dtype=torch.float64),
        },
        "relaxed": {
            "top_n": numbers(400, 100 * seed, dtype=torch.float64),
            "relax_delta": numbers(0.9, 0.7, dtype=torch.float64),
        },
        "exact": draws(seed),
        "block": draws(seed),
    }
    target = random_logits(2, 4, V, seed=seed)
    tokens = target[:, :3].argmax(-1)
    draft = {"draft_logits": random_logits(2, 3, V, seed=seed + 9)} if rule in ("exact", "block") else {}
    return {
        "draft_tokens": tokens,
        "target_logits": target,
        "rule": rule,
        "draft_lengths": words(3 - seed, 2),
        **draft,
        **limits.get(rule, {}),
    }


CALLS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "token_stats": ("token_stats", rows),
    "logprob_rank": ("logprob_rank", lambda seed: {**rows(seed), "tokens": words(seed, 5)}),
    "filter_logits": ("filter_logits", lambda seed: {**rows(seed), **filters(seed)}),
    "sample": ("sample", lambda seed: {**rows(seed), **draws(seed)}),
    "sample, filters": ("sample", lambda seed: {**rows(seed), **draws(seed), **filters(seed)}),
    "gate_block": (
        "gate_block",
        lambda seed: {
            "entropy": random_logits(2, 5, seed=seed).abs(),
            "lengths": words(5, 4 - seed),
            "threshold": numbers(1.5, 0.5 + seed),
        },
    ),
    **{
        rule: ("accept_block", lambda seed, rule=rule: block(rule, seed))  # type: ignore[misc]
        for rule in ("greedy", "rank", "exact", "block", "typical", "relaxed")
    },
}
"""Ops on tensors alone, of the dtype and shape that kernels read: nothing is converted before a launch."""


@pytest.mark.parametrize("name", CALLS)
def test_replays_see_what_the_tensors_hold(name: str) -> None:
    op, build = CALLS[name]
    call: Any = getattr(ops, op)
    inputs = build(0)
    with ops.use_backend("cuda"):
        out = poisoned(call(**inputs))
        before = [result.clone() for result in tensors(out)]
        replay = emulated.capture(lambda: call(**inputs, out=out))
        assert same(list(tensors(out)), before), "a capture runs nothing"
        for seed in (0, 1, 1):
            expected = call(**build(seed))
            for given, new in zip(tensors(inputs), tensors(build(seed)), strict=True):
                given.copy_(new)
            for result, poison in zip(tensors(out), before, strict=True):
                result.copy_(poison)
            replay()
            assert same(out, expected)


def test_replays_move_what_the_mask_keeps_by_then() -> None:
    kv, keep = [random_logits(2, 3, 7, 4, seed=seed) for seed in range(4)], torch.arange(14).view(2, 7) % 3 > 0
    with ops.use_backend("cuda"):
        ops.kv_compact([tensor.clone() for tensor in kv], keep)
        replay = emulated.capture(lambda: ops.kv_compact(kv, keep))
        for step in (2, 5):
            keep.copy_(torch.arange(14).view(2, 7) % step > 0)
            expected = [tensor.clone() for tensor in kv]
            ops.kv_compact(expected, keep)
            replay()
            assert same(kv, expected)


def test_the_host_calls_nothing_that_a_capture_forbids() -> None:
    """No allocation, copy or synchronisation by the CUDA runtime anywhere in the sources."""
    files = [*(ROOT / "csrc/cuda").iterdir(), *(ROOT / "csrc/include/ugsd/cuda").iterdir()]
    called = {name for path in files for name in re.findall(r"\b(cuda[A-Z]\w*)\(", path.read_text())}
    assert called == ALLOWED_IN_A_CAPTURE


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a stream, kept and grown; those of a capture are new ones, and what kernels in flight use is never freed."""
    kernels, made = emulated.kernels, []

    def make(device: torch.device, counters: int, size: int) -> tuple[Tensor, Tensor]:
        made.append((torch.zeros(counters, dtype=torch.int32), torch.empty(size, dtype=torch.uint8)))
        return made[-1]

    monkeypatch.setattr(kernels, "_make", make)
    monkeypatch.setattr(kernels, "_workspaces", {})
    monkeypatch.setattr(kernels, "_outgrown", [])
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first = kernels._reserve(device, 1, 10, 100)
    assert kernels._reserve(device, 1, 5, 50) == first
    assert kernels._reserve(device, 2, 5, 50) != first
    assert len(made) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels._reserve(device, 1, 5, 50) not in (first, kernels._reserve(device, 1, 5, 50))
    assert len(made) == 4
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels._reserve(device, 1, 5, 50) == first
    grown = kernels._reserve(device, 1, 1 << 20, 50)
    assert grown != first
    assert kernels._outgrown == [made[0]]
    assert kernels._reserve(device, 1, 5, 50) == grown
