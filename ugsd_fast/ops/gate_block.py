"""``gate_block``: the uncertainty of a drafted block and whether the verifier is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import (
    check_device,
    check_integers,
    check_option,
    check_out,
    check_shape,
    number_or_rows,
)

REDUCTIONS = ("max", "mean", "first")


def gate_block(
    entropy: Tensor,
    lengths: Tensor | None = None,
    *,
    threshold: float | Tensor,
    reduce: str = "max",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the entropies of a drafted block to one uncertainty and compare it with the threshold.

    Accepting a block because its uncertainty is low changes the output distribution: UGSD's local acceptance
    is lossy by design (2603.11397).

    Parameters
    ----------
    entropy
        ``[B, K]`` float32, the entropy of each drafted token's distribution in nats.
    lengths
        ``[B]`` int64 or int32, how many positions of each block were drafted; all K if None.
    threshold
        Nats: a number, or a tensor that broadcasts to ``[B]``.
    reduce
        ``"max"`` (the paper's), ``"mean"`` or ``"first"``.
    out
        Where to write: ``(uncertainty, escalate)``, contiguous and on the inputs' device. It must not
        overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    uncertainty
        ``[B]`` float32; 0 for an empty block.
    escalate
        ``[B]`` bool, true where the uncertainty is greater than the threshold. NaN escalates.

    Raises
    ------
    ValueError
        If a dtype, shape, device or ``reduce`` does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> uncertainty, escalate = ops.gate_block(torch.tensor([[0.1, 2.0], [0.1, 0.2]]), threshold=1.5)
    >>> uncertainty.tolist(), escalate.tolist()
    ([2.0, 0.20000000298023224], [True, False])
    """
    if entropy.dtype is not torch.float32:
        raise ValueError(f"gate_block: entropy has dtype {entropy.dtype}, expected float32")
    if entropy.dim() != 2:
        raise ValueError(f"gate_block: entropy has shape {tuple(entropy.shape)}, expected 2 dimensions [B, K]")
    check_option("gate_block", "reduce", reduce, REDUCTIONS)
    batch = entropy.shape[:1]
    if lengths is not None:
        check_integers("gate_block", "lengths", lengths)
        check_shape("gate_block", "lengths", lengths, batch, "one length a block")
        check_device("gate_block", "lengths", lengths, "entropy", entropy)
    number, rows = number_or_rows("gate_block", "threshold", threshold, entropy)
    checked = None
    if out is not None:
        expected = [("uncertainty", torch.float32, batch), ("escalate", torch.bool, batch)]
        checked = check_out("gate_block", out, expected, entropy)
    return run("gate_block", _op, entropy, lengths, number, rows, reduce, out=checked)


def _fake(
    entropy: Tensor, lengths: Tensor | None, threshold: float, thresholds: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    batch = entropy.shape[:1]
    return entropy.new_empty(batch), entropy.new_empty(batch, dtype=torch.bool)


def _reference(
    entropy: Tensor, lengths: Tensor | None, threshold: float, thresholds: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    limit = threshold if thresholds is None else thresholds
    uncertainty, escalate = reference.gate_block(entropy, lengths, limit, reduce)
    return uncertainty.float(), escalate


def _cpp(
    entropy: Tensor,
    lengths: Tensor | None,
    threshold: float,
    thresholds: Tensor | None,
    reduce: str,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    return extension.gate_block(
        entropy, lengths, threshold, thresholds, REDUCTIONS.index(reduce), torch.get_num_threads(), out
    )


_op = register(
    "gate_block",
    "(Tensor entropy, Tensor? lengths, float threshold, Tensor? thresholds, str reduce) -> (Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
