"""``sample``: draw a token a row and return its log-probability and the row's statistics, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import check_logits, check_out, word_or_rows
from ugsd_fast.ops.filter_logits import check_filters, merge
from ugsd_fast.ops.token_stats import empty_stats, expected_stats, round_stats
from ugsd_fast.reference import Sample, TokenStats


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    out: Sample | tuple[Tensor, Tensor, tuple[Tensor, ...]] | None = None,
) -> Sample:
    """Draw one token a row from ``softmax(filter_logits(logits))``.

    Parameters
    ----------
    logits
        ``[..., V]``, float32, bfloat16 or float16; rows may be strided.
    temperature, top_k, top_p, min_p
        As in `filter_logits`. Temperature 0 takes the argmax.
    seed, offset
        Any integer, or an integer tensor that broadcasts to the rows. The draw of row r is a function of
        (seed, offset, r), r being the row's number in row-major order. Two calls that share seed and offset share
        their uniforms: give every call an offset of its own, such as a counter of the calls made with this seed. A
        token position alone does not do where a position can be drawn twice (after a rollback).
    out
        Where to write: a `Sample` or ``(tokens, logprob, stats)``, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    Sample
        ``tokens`` int64 (-1 for a row with no token left); ``logprob`` float32, under the distribution drawn
        from, so after the filters (at temperature 0: under the untempered softmax); ``stats``, the
        `TokenStats` of the tempered logits before the filters.

    Raises
    ------
    ValueError
        If a dtype, shape, stride, device or setting does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> drawn = ops.sample(torch.tensor([[0.0, 9.0, 0.0]]), temperature=0, seed=1)
    >>> drawn.tokens.tolist(), drawn.stats.argmax.tolist()
    ([1], [1])
    """
    check_logits("sample", "logits", logits)
    settings = check_filters("sample", logits, temperature, top_k, top_p, min_p)
    seed, seeds = word_or_rows("sample", "seed", seed, logits)
    offset, offsets = word_or_rows("sample", "offset", offset, logits)
    checked = None if out is None else _check_out(out, logits)
    results = run("sample", _op, logits, *settings, seed, seeds, offset, offsets, out=checked)
    return Sample(results[0], results[1], TokenStats._make(results[2:]))


def _check_out(out: tuple[Any, ...], logits: Tensor) -> tuple[Tensor, ...]:
    if len(out) != 3 or not isinstance(out[2], tuple):
        raise ValueError(f"sample: out has {len(out)} elements, expected 3 (tokens, logprob, stats: a tuple)")
    shape = logits.shape[:-1]
    expected = [("tokens", torch.int64, shape), ("logprob", torch.float32, shape), *expected_stats(shape)]
    return check_out("sample", (*out[:2], *out[2]), expected, logits)


def _fake(logits: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[:-1]
    tokens = logits.new_empty(rows, dtype=torch.int64)
    return tokens, logits.new_empty(rows, dtype=torch.float32), *empty_stats(logits, rows)


def _reference(logits: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    tokens, logprob, stats = reference.sample(logits, *merge(*settings))
    return tokens, logprob.float(), *round_stats(stats)


def _cpp(logits: Tensor, *settings: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    return extension.sample(logits, *settings, torch.get_num_threads(), out)


_op = register(
    "sample",
    "(Tensor logits, float temperature, Tensor? temperatures, int top_k, Tensor? top_ks, float top_p, "
    "Tensor? top_ps, float min_p, Tensor? min_ps, SymInt seed, Tensor? seeds, SymInt offset, Tensor? offsets) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
