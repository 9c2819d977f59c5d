"""``filter_logits``: temperature, top-k, top-p and min-p; the logits of the distribution that `sample` draws from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import check_logits, check_out, count_or_rows, number_or_rows


def filter_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``logits / temperature`` with -inf where a filter cuts.

    The filters act in the order temperature, top-k, top-p, min-p, each on what the one before left. They are
    thresholds on the logit, so tied columns share their fate, and the largest always stays.

    Parameters
    ----------
    logits
        ``[..., V]``, float32, bfloat16 or float16; rows may be strided.
    temperature
        Number, or tensor that broadcasts to the rows. At 0 the lowest argmax alone stays.
    top_k
        Keep the ``top_k`` largest; 0 keeps all.
    top_p
        Keep the smallest set of the most probable tokens with at least this mass; 1 keeps all.
    min_p
        Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
    out
        Where to write: a tensor of the result's shape and dtype, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    Tensor
        ``[..., V]`` float32 whatever the input's dtype: rounding ``logits / temperature`` to 16 bits would change
        the distribution, and acceptance must be given exactly the one that was sampled.

    Raises
    ------
    ValueError
        If a dtype, shape, stride, device or filter setting does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> ops.filter_logits(torch.tensor([[1.0, 3.0, 2.0]]), top_k=2)
    tensor([[-inf, 3., 2.]])
    """
    check_logits("filter_logits", "logits", logits)
    settings = check_filters("filter_logits", logits, temperature, top_k, top_p, min_p)
    if out is None:
        return run("filter_logits", _op, logits, *settings)
    checked = check_out("filter_logits", (out,), [("logits", torch.float32, logits.shape)], logits)
    return run("filter_logits", _op, logits, *settings, out=checked)[0]


def check_filters(
    op: str,
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
) -> tuple[float, Tensor | None, int, Tensor | None, float, Tensor | None, float, Tensor | None]:
    """Check and split the four settings: a number and a tensor a row (or None) each."""
    return (
        *number_or_rows(op, "temperature", temperature, logits, low=0.0),
        *count_or_rows(op, "top_k", top_k, logits),
        *number_or_rows(op, "top_p", top_p, logits, low=0.0),
        *number_or_rows(op, "min_p", min_p, logits, low=0.0),
    )


def merge(*settings: Any) -> tuple[Any, ...]:
    """Undo the split: take the tensor of each pair where there is one, else the number."""
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return tuple(number if rows is None else rows for number, rows in pairs)


def _fake(logits: Tensor, *settings: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


def _reference(logits: Tensor, *settings: Any) -> Tensor:
    return reference.filter_logits(logits, *merge(*settings)).float()


def _cpp(logits: Tensor, *settings: Any, out: tuple[Tensor] | None = None) -> Any:
    results = (_fake(logits),) if out is None else out
    extension.filter_logits(logits, *settings, torch.get_num_threads(), results)
    return results[0] if out is None else out


_op = register(
    "filter_logits",
    "(Tensor logits, float temperature, Tensor? temperatures, int top_k, Tensor? top_ks, float top_p, "
    "Tensor? top_ps, float min_p, Tensor? min_ps) -> Tensor",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
