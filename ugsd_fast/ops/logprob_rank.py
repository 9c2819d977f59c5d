"""``logprob_rank``: log-probability and rank of one given token a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import (
    check_device,
    check_integers,
    check_logits,
    check_out,
    check_shape,
    number_or_rows,
)


def logprob_rank(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logsumexp: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Score one token a row under ``softmax(logits / temperature)``.

    Parameters
    ----------
    logits
        ``[..., V]``, float32, bfloat16 or float16; rows may be strided.
    tokens
        ``[...]``, int64 or int32. Ids outside ``[0, V)`` are legal and score as impossible.
    temperature
        Number, or tensor that broadcasts to the rows; 0 reads as 1.
    logsumexp
        ``[...]`` float32, the rows' `token_stats` logsumexp at the same temperature, if it is at hand: the pass
        then only counts.
    out
        Where to write: ``(logprob, rank)``, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    logprob
        ``[...]`` float32; -inf for a masked or impossible token.
    rank
        ``[...]`` int64, ``1 +`` the number of larger logits: 1 is the best; ``V + 1`` for an impossible token.

    Raises
    ------
    ValueError
        If a dtype, shape, stride or device does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> logprob, rank = ops.logprob_rank(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
    >>> rank.tolist(), round(logprob.item(), 4)
    ([2], -1.4076)
    """
    check_logits("logprob_rank", "logits", logits)
    shape = logits.shape[:-1]
    check_integers("logprob_rank", "tokens", tokens)
    check_shape("logprob_rank", "tokens", tokens, shape, "one token a row")
    check_device("logprob_rank", "tokens", tokens, "logits", logits)
    number, rows = number_or_rows("logprob_rank", "temperature", temperature, logits, low=0.0)
    if logsumexp is not None:
        check_shape("logprob_rank", "logsumexp", logsumexp, shape, "one number a row")
        check_device("logprob_rank", "logsumexp", logsumexp, "logits", logits)
    checked = None
    if out is not None:
        expected = [("logprob", torch.float32, shape), ("rank", torch.int64, shape)]
        checked = check_out("logprob_rank", out, expected, logits)
    return run("logprob_rank", _op, logits, tokens, number, rows, logsumexp, out=checked)


def _fake(
    logits: Tensor, tokens: Tensor, temperature: float, temperatures: Tensor | None, logsumexp: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)


def _reference(
    logits: Tensor, tokens: Tensor, temperature: float, temperatures: Tensor | None, logsumexp: Tensor | None
) -> tuple[Tensor, Tensor]:
    temperature_or_rows = temperature if temperatures is None else temperatures
    logprob, rank = reference.logprob_rank(logits, tokens, temperature_or_rows, logsumexp)
    return logprob.float(), rank


def _cpp(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    logsumexp: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    return extension.logprob_rank(logits, tokens, temperature, temperatures, logsumexp, torch.get_num_threads(), out)


_op = register(
    "logprob_rank",
    "(Tensor logits, Tensor tokens, float temperature, Tensor? temperatures, Tensor? logsumexp) -> (Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
