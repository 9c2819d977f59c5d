"""``kv_compact``: move the kept slots of every layer's keys and values together, in place, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops import native
from ugsd_fast.ops.backend import extension, is_eager, register, select
from ugsd_fast.ops.checks import check_device, check_integers, check_option

ALIGNMENTS = ("left", "right")

Shape = tuple[int, ...]
Layouts = tuple[list[Shape], list[Shape]]  # shapes and strides

_shape, _device, _requires_grad = map(attrgetter, ("shape", "device", "requires_grad"))


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
        If a shape, stride, dtype or device does not fit, or if tensors or elements of one share memory.

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
    if is_eager(keep) and set(map(type, kv)) == {Tensor} and not any(map(_requires_grad, kv)):
        layouts = layouts_of(kv)
        # Layers that look like the first need no checks of their own.
        shapes, strides = layouts
        for i in range(1 if _alike(*layouts, list(map(_device, kv))) else len(kv)):
            _check(i, kv[i], shapes[i], strides[i], shapes[0], keep)
        _check_keep(keep, shapes[0])
        implementation = select("kv_compact", keep.device.type)
        if implementation is _cpp:
            return launch(kv, layouts, keep, align, _compact)
        _check_distinct(kv, list(map(Tensor.data_ptr, kv)))
        return implementation(kv, keep, align)
    for i, tensor in enumerate(kv):
        _check(i, tensor, tensor.shape, tensor.stride(), kv[0].shape, keep)
    _check_keep(keep, kv[0].shape)
    return _op(list(kv), keep, align)


def layouts_of(kv: Sequence[Tensor]) -> Layouts:
    """Return the shapes and the strides."""
    return list(map(_shape, kv)), list(map(Tensor.stride, kv))


def _alike(*columns: list[Any]) -> bool:
    return all(column.count(column[0]) == len(column) for column in columns)


def _check(i: int, tensor: Tensor, shape: Shape, stride: Shape, first: Shape, keep: Tensor) -> None:
    batch, slots = (first[0], first[2]) if len(first) == 4 else (0, 0)
    if len(shape) != 4 or shape[0] != batch or shape[2] != slots:
        raise ValueError(
            f"kv_compact: kv[{i}] has shape {tuple(shape)}, expected [{batch}, H, {slots}, D] "
            "(one batch and one number of slots in all layers)"
        )
    if shape[3] > 1 and stride[3] != 1:
        raise ValueError(f"kv_compact: kv[{i}] has stride {stride[3]} in D, expected 1")
    if _overlaps(shape, stride):
        raise ValueError(
            f"kv_compact: kv[{i}] has strides {tuple(stride)} for shape {tuple(shape)}, expected each to step over all "
            "that the smaller ones span (elements that share memory cannot move in place)"
        )
    check_device("kv_compact", f"kv[{i}]", tensor, "keep", keep)


def _overlaps(shape: Shape, stride: Shape) -> bool:
    dims = [(step, size) for step, size in zip(stride, shape, strict=True) if size > 1]
    return any(
        step <= sum(other * (size - 1) for k, (other, size) in enumerate(dims) if k != i and other <= step)
        for i, (step, _) in enumerate(dims)
    )


def _check_keep(keep: Tensor, shape: Shape) -> None:
    expected: tuple[int, ...] = (shape[0], shape[2])
    if keep.dtype is not torch.bool:
        check_integers("kv_compact", "keep", keep)
        expected = (shape[0],)
    if tuple(keep.shape) != expected:
        raise ValueError(
            f"kv_compact: keep has shape {tuple(keep.shape)}, expected {expected} "
            "(a bool mask over the slots, or one integer length a sequence)"
        )


def _check_distinct(kv: Sequence[Tensor], addresses: list[int]) -> None:
    if len(set(addresses)) == len(addresses):
        return
    seen: dict[int, int] = {}
    for i, (address, tensor) in enumerate(zip(addresses, kv, strict=True)):
        if tensor.numel() and address in seen:
            raise ValueError(
                f"kv_compact: kv[{i}] starts at the address of kv[{seen[address]}], expected tensors that share no "
                "memory (each would be compacted twice)"
            )
        seen[address] = i


def _fake(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    return keep.new_empty(keep.shape[:1], dtype=torch.int64)


def _cpp(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    return launch(kv, layouts_of(kv), keep, align, _compact)


def _compact(*arguments: Any, kept: Tensor) -> None:
    extension.kv_compact(*arguments, torch.get_num_threads(), kept)


def launch(kv: Sequence[Tensor], layouts: Layouts, keep: Tensor, align: str, compact: Callable[..., None]) -> Tensor:
    """Call ``compact`` of a native backend with addresses, layouts, sizes and the keyword ``kept``; return that."""
    addresses = list(map(Tensor.data_ptr, kv))
    _check_distinct(kv, addresses)
    sizes = list(map(Tensor.element_size, kv))
    described = 1 if _alike(*layouts, sizes) else len(kv)
    slots = layouts[0][0][2]
    kept = _fake(kv, keep, align)
    mask = keep if keep.dtype is torch.bool else None
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    lengths = native.flat(keep, torch.int64) if mask is None else None
    compact(
        addresses,
        [_packed(*layout) for layout in islice(zip(*layouts, sizes, strict=True), described)],
        len(kept),
        slots,
        native.address(mask),
        0 if mask is None else mask.stride(0),
        native.address(lengths),
        ALIGNMENTS.index(align),
        kept=kept,
    )
    return kept


def _packed(shape: Shape, stride: Shape, size: int) -> tuple[int, ...]:
    """Return heads, batch, head and slot strides and row length, the last four in bytes."""
    return shape[1], stride[0] * size, stride[1] * size, stride[2] * size, shape[3] * size


_op = register(
    "kv_compact",
    "(Tensor(a!)[] kv, Tensor keep, str align) -> Tensor",
    _fake,
    reference=reference.kv_compact,
    cpp=_cpp,
)
