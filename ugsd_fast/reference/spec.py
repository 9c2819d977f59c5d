"""One object an op: its oracle, inputs as decoding meets them, and the bytes that it must move.

Tests, benchmarks and traffic reports all build their inputs and count their floors here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ugsd_fast import reference
from ugsd_fast.reference.philox import Stream, uniform
from ugsd_fast.reference.sample import inverse_cdf

LOGITS = ("normal", "peaked")


@dataclass(frozen=True)
class Case:
    """The size of one problem.

    Attributes
    ----------
    rows
        Rows of logits, or sequences of `accept_block`, `gate_block` and `kv_compact`.
    vocabulary, block
        Columns V and draft tokens K.
    dtype
        Element type of logits, weights and caches.
    logits
        ``"normal"``: independent, standard deviation 3 (entropy about 7 nats). ``"peaked"``: as a language model's,
        Zipf-like ranks with a few strong candidates (entropy about 1).
    width, heads, slots, layers
        Hidden size or head size, and the shape of the cache.
    seed
        Of the inputs.
    """

    rows: int = 5
    vocabulary: int = 152064
    block: int = 5
    dtype: torch.dtype = torch.float32
    logits: str = "normal"
    width: int = 128
    heads: int = 2
    slots: int = 64
    layers: int = 2
    seed: int = 0

    def generator(self) -> Generator:
        """Return a generator seeded for this case."""
        return torch.Generator().manual_seed(self.seed)


Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpSpec:
    """What is known of an op without running it.

    Attributes
    ----------
    name
        Name of the op in ``ugsd_fast.ops``; ``inputs`` are its keyword arguments.
    oracle
        ``oracle(**inputs)``: float64 results.
    inputs
        Builds the arguments of a `Case`.
    floor
        ``floor(**inputs)``: bytes that any implementation must read and write.
    """

    name: str
    oracle: Callable[..., Any]
    inputs: Callable[[Case], Inputs]
    floor: Callable[..., int]


def make_logits(case: Case, *shape: int, generator: Generator | None = None) -> Tensor:
    """Return logits ``[*shape, V]`` of the case's kind and dtype."""
    generator = generator or case.generator()
    logits = torch.randn(*shape, case.vocabulary, generator=generator)
    if case.logits == "normal":
        return (3 * logits).to(case.dtype)
    order = torch.rand(*shape, case.vocabulary, generator=generator).argsort(-1)
    zipf = -1.2 * torch.log1p(torch.arange(case.vocabulary, dtype=torch.float32))
    candidates = torch.zeros(case.vocabulary)
    candidates[: min(3, case.vocabulary)] = torch.tensor([9.0, 7.5, 6.0])[: case.vocabulary]
    return (0.5 * logits + (zipf + candidates)[order]).to(case.dtype)


def _size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _logits_inputs(case: Case) -> Inputs:
    return {"logits": make_logits(case, case.rows)}


def _rank_inputs(case: Case) -> Inputs:
    generator = case.generator()
    logits = make_logits(case, case.rows, generator=generator)
    return {"logits": logits, "tokens": torch.randint(case.vocabulary, (case.rows,), generator=generator)}


def _filter_inputs(case: Case) -> Inputs:
    return {"logits": make_logits(case, case.rows), "temperature": 0.8, "top_k": 50, "top_p": 0.9}


def _sample_inputs(case: Case) -> Inputs:
    return {"logits": make_logits(case, case.rows), "seed": case.seed, "offset": 7}


def _gate_inputs(case: Case) -> Inputs:
    generator = case.generator()
    return {
        "entropy": 2 * torch.rand(case.rows, case.block, generator=generator),
        "lengths": torch.randint(case.block + 1, (case.rows,), generator=generator),
        "threshold": 1.5,
    }


def _accept_inputs(case: Case) -> Inputs:
    """Build a drafter near the verifier, and tokens drawn from it."""
    generator = case.generator()
    target = make_logits(case, case.rows, case.block + 1, generator=generator)
    noise = torch.randn(case.rows, case.block, case.vocabulary, generator=generator)
    draft = (target[:, : case.block].float() + 0.5 * noise).to(case.dtype)
    rows = torch.arange(case.rows * case.block).view(case.rows, case.block)
    tokens = inverse_cdf(draft.double().softmax(-1), uniform(case.seed, 0, rows, Stream.DRAFT))
    return {"draft_tokens": tokens, "target_logits": target, "draft_logits": draft, "rule": "exact", "seed": case.seed}


def _accept_floor(
    draft_tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None = None,
    rule: str = "greedy",
    draft_logsumexp: Tensor | None = None,
    **_: object,
) -> int:
    """Count K + 1 verifier rows and, for the sampling rules, the drafter's rows (the residual's alone if carried)."""
    floor = _size(target_logits)
    if rule in ("exact", "block") and draft_logits is not None:
        rows = _size(draft_logits)
        floor += rows // max(1, draft_logits.shape[1]) if draft_logsumexp is not None else rows
    return floor + _size(draft_tokens)


def _accept_oracle(draft_tokens: Tensor, target_logits: Tensor, **settings: Any) -> reference.Acceptance:
    rule = settings.get("rule", "greedy")
    limits = {
        "rank": (settings.pop("rank", 20), 0.0),
        "typical": (settings.pop("epsilon", 0.09), settings.pop("delta", 0.3)),
        "relaxed": (settings.pop("top_n", 10), settings.pop("relax_delta", 0.6)),
    }
    return reference.accept_block(draft_tokens, target_logits, limits=limits.get(rule, (0.0, 0.0)), **settings)


def _kv_inputs(case: Case) -> Inputs:
    generator = case.generator()
    shape = (case.rows, case.heads, case.slots, case.width)
    kv = [torch.randn(shape, generator=generator).to(case.dtype) for _ in range(2 * case.layers)]
    keep = torch.ones(case.rows, case.slots, dtype=torch.bool)
    tail = min(8, case.slots)
    keep[:, case.slots - tail :] = torch.rand(case.rows, tail, generator=generator) < 0.6
    return {"kv": kv, "keep": keep}


def _kv_floor(kv: Sequence[Tensor], keep: Tensor, align: str = "left") -> int:
    """Count the slots that change place, read once and written once."""
    slots = torch.arange(kv[0].shape[2])
    mask = keep if keep.dim() == 2 else slots < keep.unsqueeze(-1)
    place = mask.cumsum(-1) - 1
    if align == "right":
        place = place + mask.shape[-1] - mask.sum(-1, keepdim=True)
    moved = int((mask & (place != slots)).sum())
    return 2 * sum(moved * t.shape[1] * t.shape[3] * t.element_size() for t in kv)


def _head_inputs(case: Case) -> Inputs:
    generator = case.generator()
    hidden = torch.randn(case.rows, case.width, generator=generator).to(case.dtype)
    weight = (torch.randn(case.vocabulary, case.width, generator=generator) * (3 / case.width**0.5)).to(case.dtype)
    return {"hidden": hidden, "weight": weight}


def _read_once(logits: Tensor, **_: object) -> int:
    return _size(logits)


SPECS = {
    spec.name: spec
    for spec in (
        OpSpec("token_stats", reference.token_stats, _logits_inputs, _read_once),
        OpSpec("logprob_rank", reference.logprob_rank, _rank_inputs, _read_once),
        OpSpec(
            "filter_logits",
            reference.filter_logits,
            _filter_inputs,
            lambda logits, **_: _size(logits) + 4 * logits.numel(),
        ),
        OpSpec("sample", reference.sample, _sample_inputs, _read_once),
        OpSpec("gate_block", reference.gate_block, _gate_inputs, lambda entropy, **_: _size(entropy)),
        OpSpec("accept_block", _accept_oracle, _accept_inputs, _accept_floor),
        OpSpec("kv_compact", reference.kv_compact, _kv_inputs, _kv_floor),
        OpSpec(
            "lm_head_stats",
            reference.lm_head_stats,
            _head_inputs,
            lambda hidden, weight, bias=None, **_: _size(hidden, weight, bias),
        ),
    )
}
"""The spec of each op, by name."""
