"""``kv_compact``: move the kept slots of every layer's keys and values together, in place, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops import native
from ugsd_fast.ops.backend import extension, is_eager, register, select
from ugsd_fast.ops.checks import check_device, check_integers, check_option

ALIGNMENTS = ("left", "right")


def kv_compact(kv: Sequence[Tensor], keep: Tensor, *, align: str = "left") -> Tensor:
    """Drop cache slots by moving the kept ones together; only slots that change place are read and written.

    Parameters
    ----------
    kv
        Keys and values of all layers, each ``[B, H, T, D]``, any dtypes; H, D and strides may differ, D is
        contiguous. Changed in place.
    keep
        ``[B, T]`` bool, the slots that stay; or ``[B]`` int64 or int32, how many leading slots stay.
    align
        Where the kept slots of a sequence go, in order: ``"left"`` to ``[0, n)`` (after a rejected tail only
        the slots behind the first hole move), ``"right"`` to ``[T - n, T)`` (left-padded batches).

    Returns
    -------
    Tensor
        ``[B]`` int64, kept slots n of each sequence. Slots outside the kept range hold unspecified old values:
        crop or mask them.

    Raises
    ------
    ValueError
        If a shape, stride, dtype or device does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> keys = torch.arange(4.0).view(1, 1, 4, 1)
    >>> ops.kv_compact([keys], torch.tensor([[True, False, True, True]]))
    tensor([3])
    >>> keys[0, 0, :3, 0].tolist()
    [0.0, 2.0, 3.0]
    """
    check_option("kv_compact", "align", align, ALIGNMENTS)
    if not kv:
        raise ValueError("kv_compact: kv is empty, expected at least one tensor [B, H, T, D]")
    batch, _, slots, _ = kv[0].shape if kv[0].dim() == 4 else (0, 0, 0, 0)
    for i, tensor in enumerate(kv):
        if tensor.dim() != 4 or tensor.shape[0] != batch or tensor.shape[2] != slots:
            raise ValueError(
                f"kv_compact: kv[{i}] has shape {tuple(tensor.shape)}, expected [{batch}, H, {slots}, D] "
                "(one batch and one number of slots in all layers)"
            )
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"kv_compact: kv[{i}] has stride {tensor.stride(3)} in D, expected 1")
        check_device("kv_compact", f"kv[{i}]", tensor, "keep", keep)
    if keep.dtype is torch.bool:
        expected: tuple[int, ...] = (batch, slots)
    else:
        check_integers("kv_compact", "keep", keep)
        expected = (batch,)
    if tuple(keep.shape) != expected:
        raise ValueError(
            f"kv_compact: keep has shape {tuple(keep.shape)}, expected {expected} "
            "(a bool mask over the slots, or one integer length a sequence)"
        )
    if is_eager(keep) and all(map(is_eager, kv)):
        return select("kv_compact", keep.device.type)(kv, keep, align)
    return _op(list(kv), keep, align)


def _fake(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    return keep.new_empty(keep.shape[:1], dtype=torch.int64)


def _cpp(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    layouts = []
    for tensor in kv:
        _, heads, slots, width = tensor.shape
        batch_stride, head_stride, slot_stride, _ = tensor.stride()
        size = tensor.element_size()
        layouts.append(
            (tensor.data_ptr(), heads, batch_stride * size, head_stride * size, slot_stride * size, width * size)
        )
    kept = _fake(kv, keep, align)
    mask = keep if keep.dtype is torch.bool else None
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    lengths = native.flat(keep, torch.int64) if mask is None else None
    extension.kv_compact(
        layouts,
        len(kept),
        slots,
        native.address(mask),
        0 if mask is None else mask.stride(0),
        native.address(lengths),
        ALIGNMENTS.index(align),
        torch.get_num_threads(),
        kept.data_ptr(),
    )
    return kept


_op = register(
    "kv_compact",
    "(Tensor(a!)[] kv, Tensor keep, str align) -> Tensor",
    _fake,
    reference=reference.kv_compact,
    cpp=_cpp,
)
