"""``lm_head_stats``: `token_stats` straight from hidden states; the logits are never written."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import check_device, check_logits, check_out, check_shape, number_or_rows
from ugsd_fast.ops.token_stats import empty_stats, expected_stats, round_stats
from ugsd_fast.reference import TokenStats


def lm_head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    out: TokenStats | tuple[Tensor, ...] | None = None,
) -> TokenStats:
    """Compute the statistics of ``hidden @ weight.T + bias`` without materialising it.

    Parameters
    ----------
    hidden
        ``[..., D]``, float32, bfloat16 or float16; rows may be strided.
    weight
        ``[V, D]``, of the same dtype; rows may be strided.
    bias
        ``[V]``, of the same dtype.
    temperature
        Number, or tensor that broadcasts to the rows; 0 reads as 1.
    out
        Where to write: a `TokenStats`, or its five tensors in order, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    TokenStats
        As `token_stats` of the product with float32 accumulation, not rounded to the inputs' dtype.

    Raises
    ------
    ValueError
        If a dtype, shape, stride or device does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> stats = ops.lm_head_stats(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> stats.argmax.tolist(), stats.max_logit.tolist()
    ([1], [3.0])
    """
    check_logits("lm_head_stats", "hidden", hidden)
    check_logits("lm_head_stats", "weight", weight, dim=2)
    vocabulary, width = weight.shape
    why = "one column a column of weight"
    check_shape("lm_head_stats", "hidden", hidden, (*hidden.shape[:-1], width), why)
    check_device("lm_head_stats", "weight", weight, "hidden", hidden)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not hidden.dtype:
            raise ValueError(f"lm_head_stats: {name} has dtype {tensor.dtype}, expected {hidden.dtype} as hidden has")
    if vocabulary == 0:
        raise ValueError(f"lm_head_stats: weight has shape {tuple(weight.shape)}, expected at least 1 row")
    if bias is not None:
        check_shape("lm_head_stats", "bias", bias, (vocabulary,), "one number a row of weight")
        check_device("lm_head_stats", "bias", bias, "hidden", hidden)
    number, rows = number_or_rows("lm_head_stats", "temperature", temperature, hidden, low=0.0)
    if out is not None:
        out = check_out("lm_head_stats", out, expected_stats(hidden.shape[:-1]), hidden)
    return TokenStats._make(run("lm_head_stats", _op, hidden, weight, bias, number, rows, out=out))


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    return empty_stats(hidden, hidden.shape[:-1])


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, temperatures: Tensor | None
) -> tuple[Tensor, ...]:
    temperature_or_rows = temperature if temperatures is None else temperatures
    return round_stats(reference.lm_head_stats(hidden, weight, bias, temperature_or_rows))


def _cpp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    return extension.lm_head_stats(hidden, weight, bias, temperature, temperatures, torch.get_num_threads(), out)


_op = register(
    "lm_head_stats",
    "(Tensor hidden, Tensor weight, Tensor? bias, float temperature, Tensor? temperatures) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
