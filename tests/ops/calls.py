"""Small calls of every op, with numbers and with tensors as settings: what the tests of all ops at once run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from tests.ops import cases
from tests.ops.cases import Backend, backends_of, random_logits
from ugsd_fast import ops

VOCABULARY = 4100
"""More than one block, and a number that no other dimension here has."""


@dataclass(frozen=True)
class Call:
    """One call of an op on fresh inputs."""

    op: str
    name: str
    build: Callable[[], dict[str, Any]]
    writes: tuple[str, ...] = ()
    """Arguments that the op changes in place."""
    logits_out: bool = False
    """Whether a result has one element a logit, which no other op may allocate."""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def run(self, inputs: dict[str, Any] | None = None) -> Any:
        return getattr(ops, self.op)(**(self.build() if inputs is None else inputs))


def _accept(rule: str, **settings: Any) -> dict[str, Any]:
    return {
        "draft_tokens": torch.tensor([[1, 2], [3, -1]]),
        "target_logits": random_logits(2, 3, VOCABULARY),
        "draft_logits": random_logits(2, 2, VOCABULARY, seed=1),
        "rule": rule,
        **settings,
    }


def _kv() -> list[Tensor]:
    return [random_logits(2, 3, 7, 4, seed=seed) for seed in range(4)]


CALLS = [
    Call("token_stats", "numbers", lambda: {"logits": random_logits(3, VOCABULARY), "temperature": 0.5}),
    Call("token_stats", "padded", lambda: {"logits": random_logits(3, VOCABULARY), "vocab_size": 4000}),
    Call(
        "token_stats",
        "tensors",
        lambda: {"logits": random_logits(2, 3, VOCABULARY), "temperature": torch.tensor([0.5, 1.0, 1.7])},
    ),
    Call(
        "logprob_rank",
        "numbers",
        lambda: {"logits": random_logits(3, VOCABULARY), "tokens": torch.tensor([1, -1, 9000])},
    ),
    Call(
        "logprob_rank",
        "tensors",
        lambda: {
            "logits": random_logits(3, VOCABULARY),
            "tokens": torch.tensor([1, 2, 3]),
            "temperature": torch.tensor(0.5),
            "logsumexp": torch.full((3,), 9.0),
        },
    ),
    Call(
        "filter_logits",
        "numbers",
        lambda: {"logits": random_logits(3, VOCABULARY), "top_k": 50, "top_p": 0.9, "min_p": 0.1, "temperature": 0.5},
        logits_out=True,
    ),
    Call("filter_logits", "nothing-to-cut", lambda: {"logits": random_logits(3, VOCABULARY)}, logits_out=True),
    Call(
        "filter_logits",
        "tensors",
        lambda: {
            "logits": random_logits(2, VOCABULARY, dtype=torch.bfloat16),
            "temperature": torch.tensor([0.0, 0.5]),
            "top_k": torch.tensor([3, 0]),
            "top_p": torch.tensor([1.0, 0.5]),
            "min_p": torch.tensor(0.125),
        },
        logits_out=True,
    ),
    Call("sample", "numbers", lambda: {"logits": random_logits(3, VOCABULARY), "seed": 1}),
    Call("sample", "filters", lambda: {"logits": random_logits(3, VOCABULARY), "seed": 1, "top_k": 5, "top_p": 0.9}),
    Call(
        "sample",
        "tensors",
        lambda: {
            "logits": random_logits(2, VOCABULARY),
            "temperature": torch.tensor([0.0, 0.5]),
            "seed": torch.tensor([1, 2]),
            "offset": torch.tensor(3),
        },
    ),
    Call("gate_block", "numbers", lambda: {"entropy": random_logits(4, 5).abs(), "threshold": 0.5}),
    Call(
        "gate_block",
        "tensors",
        lambda: {
            "entropy": random_logits(4, 5).abs(),
            "lengths": torch.tensor([0, 1, 5, 3]),
            "threshold": torch.tensor([0.5, 1.0, 1.5, 2.0]),
            "reduce": "mean",
        },
    ),
    *(
        Call("accept_block", rule, lambda rule=rule: _accept(rule))
        for rule in ("greedy", "rank", "exact", "block", "typical", "relaxed")
    ),
    Call(
        "accept_block",
        "tensors",
        lambda: _accept(
            "block",
            draft_lengths=torch.tensor([1, 2]),
            draft_logsumexp=torch.full((2, 2), 12.0),
            seed=torch.tensor([4, 5]),
            offset=torch.tensor(6),
            bonus=False,
        ),
    ),
    Call("accept_block", "certain", lambda: {**_accept("exact"), "draft_logits": None}),
    Call(
        "accept_block", "limits", lambda: _accept("relaxed", top_n=torch.tensor([1, 5]), relax_delta=torch.tensor(0.5))
    ),
    Call("kv_compact", "mask", lambda: {"kv": _kv(), "keep": torch.arange(14).view(2, 7) % 3 > 0}, writes=("kv",)),
    Call(
        "kv_compact", "lengths", lambda: {"kv": _kv(), "keep": torch.tensor([3, 7]), "align": "right"}, writes=("kv",)
    ),
    Call("lm_head_stats", "numbers", lambda: {"hidden": random_logits(2, 16), "weight": random_logits(VOCABULARY, 16)}),
    Call(
        "lm_head_stats",
        "tensors",
        lambda: {
            "hidden": random_logits(2, 16, dtype=torch.bfloat16),
            "weight": random_logits(VOCABULARY, 16, dtype=torch.bfloat16),
            "bias": random_logits(VOCABULARY, dtype=torch.bfloat16),
            "temperature": torch.tensor([0.5, 2.0]),
        },
    ),
]


def on_every_call(where: Callable[[Call, Backend], bool] = lambda call, backend: True) -> pytest.MarkDecorator:
    """Run a test once for each call on each implementation of its op, or on those that ``where`` chooses."""
    pairs = [(call, backend) for call in CALLS for backend in backends_of(call.op) if where(call, backend)]
    return pytest.mark.parametrize(("call", "backend"), pairs, ids=str, indirect=["backend"])


def default_backend(op: str) -> Backend:
    """The fastest implementation here, which runs when nobody asks for one."""
    return backends_of(op)[0]


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def same(left: Any, right: Any) -> bool:
    """Whether two trees of results agree in every bit."""
    return all(cases.same_bits(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))
