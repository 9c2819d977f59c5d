"""``token_stats``: logsumexp, entropy, maximum, argmax and margin of every row, in one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import check_logits, check_out, number_or_rows
from ugsd_fast.reference import TokenStats


def token_stats(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    out: TokenStats | tuple[Tensor, ...] | None = None,
) -> TokenStats:
    """Compute the softmax statistics of every row without writing a softmax.

    Parameters
    ----------
    logits
        ``[..., V]``, float32, bfloat16 or float16. The last dimension is contiguous, rows may be strided.
        -inf and NaN mask a column.
    temperature
        Number, or tensor that broadcasts to the rows. 0, the greedy limit, gives the statistics at 1.
    vocab_size
        Columns from here on are padding and ignored.
    out
        Where to write: a `TokenStats`, or its five tensors in order, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    TokenStats
        ``logsumexp, entropy, max_logit, argmax, margin``, each of the rows' shape: float32, entropy in nats,
        argmax int64. All are of the tempered logits. A row with no token left has logsumexp -inf, entropy 0,
        argmax -1, margin 0.

    Raises
    ------
    ValueError
        If dtype, shape, stride, device, temperature or vocab_size do not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> stats = ops.token_stats(torch.tensor([[0.0, 0.0, -torch.inf], [5.0, 1.0, 0.0]]))
    >>> stats.argmax.tolist(), stats.margin.tolist()
    ([0, 0], [0.0, 4.0])
    >>> round(stats.entropy[0].item(), 4)
    0.6931
    """
    check_logits("token_stats", "logits", logits)
    if vocab_size is not None:
        if not isinstance(vocab_size, (int, torch.SymInt)) or not 0 < vocab_size <= logits.shape[-1]:
            raise ValueError(
                f"token_stats: vocab_size is {vocab_size}, expected 1 to {logits.shape[-1]} "
                "(an integer, at most the columns of logits)"
            )
        logits = logits[..., :vocab_size]
    number, rows = number_or_rows("token_stats", "temperature", temperature, logits, low=0.0)
    if out is not None:
        out = check_out("token_stats", out, expected_stats(logits.shape[:-1]), logits)
    return TokenStats._make(run("token_stats", _op, logits, number, rows, out=out))


def expected_stats(shape: tuple[int, ...]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return the names, dtypes and shapes of `TokenStats` for rows of this shape."""
    return [(name, dtype, shape) for name, dtype in _DTYPES]


_DTYPES = [(name, torch.int64 if name == "argmax" else torch.float32) for name in TokenStats._fields]


def empty_stats(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the five results of `TokenStats` for rows of this shape."""
    logsumexp = torch.empty(shape, dtype=torch.float32, device=like.device)
    argmax = torch.empty(shape, dtype=torch.int64, device=like.device)
    return logsumexp, torch.empty_like(logsumexp), torch.empty_like(logsumexp), argmax, torch.empty_like(logsumexp)


def round_stats(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the float64 statistics of the oracle in the op's dtypes."""
    return (
        stats.logsumexp.float(),
        stats.entropy.float(),
        stats.max_logit.float(),
        stats.argmax,
        stats.margin.float(),
    )


def _fake(logits: Tensor, temperature: float, temperatures: Tensor | None) -> tuple[Tensor, ...]:
    return empty_stats(logits, logits.shape[:-1])


def _reference(logits: Tensor, temperature: float, temperatures: Tensor | None) -> tuple[Tensor, ...]:
    return round_stats(reference.token_stats(logits, temperature if temperatures is None else temperatures))


def _cpp(
    logits: Tensor, temperature: float, temperatures: Tensor | None, *, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    return extension.token_stats(logits, temperature, temperatures, torch.get_num_threads(), out)


_op = register(
    "token_stats",
    "(Tensor logits, float temperature, Tensor? temperatures) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
