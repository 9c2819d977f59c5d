"""``kv_compact``: the kept cache slots of every sequence move together, in place, in one launch over all layers.

A table in device memory holds the address of each tensor, and its head count and strides where they differ, so that
neither their number nor their shapes are compiled in. A program takes one sequence through some heads of some tensors.
It walks tiles of slots against the direction in which slots move, and a tile is read whole before it is written:
nothing is written over unread, and slots that keep their place are neither read nor written.

A sequence's mask is read once, by the first program that comes to it; the others wait for its word where the moves
begin, and read the mask from there on. Programs take their numbers as they start, so that none waits for one that has
yet to start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import arrives_last, multiprocessors, scratch

BLOCK_MASK = 4096
MOST_HEADS = 4
TILE = {True: 4096, False: 1024}
"""Elements, of up to 8 bytes, that a tile of heads, slots and a part of their rows holds: of aligned rows, and others."""

FIELDS = 6
"""Of a table row: address, heads, then batch, head and slot strides and the row's length in elements of a unit."""


@triton.jit
def scan_mask(p_keep, slots, stride, LEFT: tl.constexpr, BLOCK_MASK: tl.constexpr):
    """Return how many slots are kept, and the first dropped one from the side they move to, or where that side ends."""
    kept = 0
    hole = slots if LEFT else -1
    for t in range(0, slots, BLOCK_MASK):
        o_t = t + tl.arange(0, BLOCK_MASK)
        m_t = o_t < slots
        keep = tl.load(p_keep + o_t.to(tl.int64) * stride, m_t, 0) != 0
        kept += tl.sum(keep.to(tl.int32))
        if LEFT:
            hole = tl.minimum(hole, tl.min(tl.where(m_t & ~keep, o_t, slots)))
        else:
            hole = tl.maximum(hole, tl.max(tl.where(m_t & ~keep, o_t, -1)))
    return kept, hole


@triton.jit
def await_word(p_word):
    """Return the number that another program writes here, which is not 0."""
    word = tl.atomic_add(p_word, 0)
    while word == 0:
        word = tl.atomic_add(p_word, 0)
    return word


@triton.jit(
    do_not_specialize=[
        "rows",
        "heads",
        "batch_stride",
        "head_stride",
        "slot_stride",
        "width",
        "batch",
        "slots",
        "keep_row_stride",
        "workers",
    ],
    do_not_specialize_on_alignment=["p_keep", "p_kept"],
)
def _kv_compact_kernel(
    p_table,
    p_keep,
    p_kept,
    p_words,
    rows,
    heads,
    batch_stride: tl.int64,
    head_stride: tl.int64,
    slot_stride: tl.int64,
    width: tl.int64,
    batch,
    slots,
    keep_row_stride,
    keep_slot_stride,
    workers,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIFORM: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # An element has 8 bytes at most: two of an aligned row make one vector.
    VECTOR: tl.constexpr = UNIT * 8 // DTYPE.primitive_bitwidth
    i_program = tl.program_id(0)
    if MASK:
        i_program = tl.atomic_add(p_words + batch, 1)  # in the order in which programs start
    i_b = (i_program // workers).to(tl.int64)
    i_worker = i_program % workers
    p_keep += i_b * keep_row_stride

    # The first dropped slot from the side that the kept ones move to: what lies before it keeps its place.
    length = 0
    if MASK:
        if i_worker == 0:
            kept, hole = scan_mask(p_keep, slots, keep_slot_stride, LEFT, BLOCK_MASK)
            tl.atomic_xchg(p_words + i_b, hole + 2)
            tl.store(p_kept + i_b, kept.to(tl.int64))
        else:
            hole = await_word(p_words + i_b) - 2
        if arrives_last(p_words + batch + 1, 0, batch * workers):  # every word has been read
            for i in range(batch + 1):
                tl.store(p_words + i, 0)
    else:
        length = tl.minimum(tl.maximum(tl.load(p_keep).to(tl.int64), 0), slots).to(tl.int32)
        hole = length if LEFT else tl.where(length < slots, slots - 1, -1)
        if i_worker == 0:
            tl.store(p_kept + i_b, length.to(tl.int64))  # type: ignore[attr-defined]

    # Left: slots from the hole on move down, first slots first. Right: slots up to it move up, last ones first.
    first = hole // BLOCK_T * BLOCK_T if LEFT else 0
    last = slots if LEFT else hole + 1
    if LEFT and not MASK:
        last = first
    groups = tl.cdiv(heads, BLOCK_H)
    for i in range(i_worker, rows * groups, workers):
        p_row = p_table + (i // groups) * FIELDS
        if not UNIFORM:
            heads = tl.load(p_row + 1).to(tl.int32)
            batch_stride, head_stride = tl.load(p_row + 2), tl.load(p_row + 3)
            slot_stride, width = tl.load(p_row + 4), tl.load(p_row + 5)
        o_h = i % groups * BLOCK_H + tl.arange(0, BLOCK_H)
        m_h = o_h < heads
        if i % groups * BLOCK_H < heads:
            stride = slot_stride * VECTOR
            columns = width * VECTOR
            p_batch = tl.load(p_row).to(tl.pointer_type(DTYPE)) + i_b * batch_stride * VECTOR
            p_head = tl.multiple_of(p_batch, UNIT) + (o_h.to(tl.int64) * head_stride * VECTOR)[:, None, None]
            done = hole if LEFT else slots - 1 - hole  # kept slots on the near side of the tile
            for step in range(tl.cdiv(last - first, BLOCK_T)):
                o_t = (first + step * BLOCK_T if LEFT else last - (step + 1) * BLOCK_T) + tl.arange(0, BLOCK_T)
                moves = (o_t >= (hole if LEFT else 0)) & (o_t < last)
                if MASK:
                    moves &= tl.load(p_keep + o_t.to(tl.int64) * keep_slot_stride, moves, 0) != 0
                else:
                    moves &= o_t < length
                count = moves.to(tl.int32)
                here = tl.sum(count)
                before = tl.cumsum(count, 0) - count
                target = done + before if LEFT else slots - done - here + before
                done += here
                p_source = p_head + (o_t.to(tl.int64) * stride)[None, :, None]
                p_target = p_head + (target.to(tl.int64) * stride)[None, :, None]
                m_slot = m_h[:, None, None] & moves[None, :, None]
                if here > 0:
                    for r in range(0, columns, BLOCK_R):
                        o_r = (r + tl.arange(0, BLOCK_R))[None, None, :]
                        m = m_slot & (o_r < columns)
                        b = tl.load(p_source + o_r, m, 0)  # [BLOCK_H, BLOCK_T, BLOCK_R]
                        tl.debug_barrier()  # every warp has read the tile
                        tl.store(p_target + o_r, b, m)


@dataclass(frozen=True)
class Table:
    """Where the tensors of a call lie, in device memory.

    Attributes
    ----------
    rows
        ``[N, FIELDS]`` int64: the tensors that hold something.
    count, heads
        How many these are, and the most heads that one has.
    layout
        Batch, head and slot strides and row length of all of them, in units; None where they differ, or their heads.
    unit
        Bytes, 1 to 16, that divide every address, stride and row.
    row_bytes
        The longest row's.
    stream, ready
        The stream that filled it, and the event after that; None on CPUs.
    """

    rows: Tensor
    count: int
    heads: int
    layout: tuple[int, ...] | None
    unit: int
    row_bytes: int
    stream: int
    ready: torch.cuda.Event | None


Description = tuple[int, ...]
Key = tuple[torch.device, tuple[Description, ...]]

_tables: OrderedDict[Key, Table] = OrderedDict()
_captured: dict[Key, Table] = {}
_KEPT_TABLES = 64
_DTYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64, 16: tl.int64}


def _describe(tensor: Tensor) -> Description:
    """Return address, heads, and batch, head and slot strides and row length in bytes."""
    size = tensor.element_size()
    strides = [step * size if count > 1 else 0 for step, count in zip(tensor.stride(), tensor.shape)]
    heads, row = tensor.shape[1], tensor.shape[3] * size
    if strides[1] == row:  # heads that lie side by side in each slot are one long row
        heads, row, strides[1] = 1, row * heads, 0
    return tensor.data_ptr(), heads, *strides[:3], row


def _table(kv: Sequence[Tensor], device: torch.device) -> Table:
    """Return the table of these tensors, filled once while they stay where they are, without a wait."""
    described = tuple(map(_describe, kv))
    key = device, described
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _captured.get(key) or _tables.get(key)
    if found is None:
        if capturing:
            raise RuntimeError(
                "kv_compact: a CUDA graph captures tensors that are new to it: call it on them once before the capture"
            )
        found = _tables[key] = _fill(described, device)
        if len(_tables) > _KEPT_TABLES:
            _tables.popitem(last=False)
        return found
    if key in _tables:
        _tables.move_to_end(key)
    if capturing:
        _captured[key] = found  # the graph reads it at each replay
    elif found.ready is not None:
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != found.stream:
            stream.wait_event(found.ready)
            found.rows.record_stream(stream)
    return found


def _fill(described: tuple[Description, ...], device: torch.device) -> Table:
    full = [row for row in described if row[1] and row[-1]]
    bits = 16
    for address, _, *steps in full:
        for step in (address, *steps):
            bits |= step
    unit = bits & -bits
    filled = [[*row[:2], *(step // unit for step in row[2:])] for row in full]
    rows = torch.tensor(filled, dtype=torch.int64)
    layouts = {tuple(row[1:]) for row in filled}
    layout = layouts.pop()[1:] if len(layouts) == 1 else None
    stream, ready = 0, None
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        stream, ready = current.cuda_stream, torch.cuda.Event()
        ready.record(current)
    heads = max((row[1] for row in full), default=0)
    row_bytes = max((row[-1] for row in full), default=unit)
    return Table(rows, len(full), heads, layout, unit, row_bytes, stream, ready)


def kv_compact(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    """Run ``ugsd_fast::kv_compact``."""
    batch, _, slots, _ = kv[0].shape
    kept = keep.new_empty(batch, dtype=torch.int64)
    if batch == 0:
        return kept
    mask = keep.dtype is torch.bool
    with torch.cuda.device_of(keep):
        table = _table(kv, keep.device)
        dtype = _DTYPES[table.unit]
        block_r = min(triton.next_power_of_2(triton.cdiv(table.row_bytes * 8, dtype.primitive_bitwidth)), 128)
        block_h = min(MOST_HEADS, triton.next_power_of_2(max(table.heads, 1)))
        items = table.count * triton.cdiv(table.heads, block_h)
        workers = max(1, min(items, triton.cdiv(4 * multiprocessors(keep.device), batch)))
        words = scratch(keep.device, batch + 2, 0)[0] if mask else None
        _kv_compact_kernel[(batch * workers,)](
            table.rows,
            keep.view(torch.uint8) if mask else keep,
            kept,
            words,
            table.count,
            table.heads,
            *(table.layout or (0, 0, 0, 0)),
            batch,
            slots,
            keep.stride(0),
            keep.stride(1) if mask else 0,
            workers,
            UNIT=table.unit,
            DTYPE=dtype,
            UNIFORM=table.layout is not None,
            MASK=mask,
            LEFT=align == "left",
            FIELDS=FIELDS,
            BLOCK_MASK=BLOCK_MASK,
            BLOCK_H=block_h,
            BLOCK_T=TILE[table.unit == 16] // block_r // block_h,
            BLOCK_R=block_r,
            num_warps=8,
        )
    return kept
