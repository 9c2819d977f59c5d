"""What the kernels over rows of logits share: addressing, partial statistics and their merge, draws, launches.

A row is read in tiles. A tile keeps five numbers, its *record*: the largest logit, Σe and Σy·e of the other columns
(y = log2 e the octaves under the largest, MATH.md), the second largest and the first column of the largest; logits in
their own type. Records
merge in column order in float64, a few dozen numbers a row; nothing a column wide is ever float64. The largest column
stays out of the sums, where its 1 would drown the digits of a nearly certain row.

Rows few, a row's tiles are spread over programs, and the last one to arrive merges: an atomic counter a row, which that
program sets back to 0 for the next launch. Rows many, one program reads a whole row.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
FIELDS = tl.constexpr(8)
NO_COLUMN = tl.constexpr(2**31 - 1)
DRAFT = tl.constexpr(0)
ACCEPT = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
CHUNK = tl.constexpr(64)

TILES = (4096, 2048, 1024, 512, 256)
"""Columns of a tile: one program's read. The widest that gives the multiprocessors a program each is taken."""


@triton.jit
def setting(p_rows, number, i_row, stride):
    """Read a setting: its own number a row where there is a tensor, else the one number."""
    return tl.to_tensor(number) if p_rows is None else tl.load(p_rows + i_row * stride)


@triton.jit
def row_offset(i_row, inner, stride_outer, stride_inner, VEC: tl.constexpr):
    """Return the elements before row ``i_row``; strides count vectors of VEC elements, which tells their alignment."""
    return ((i_row // inner).to(tl.int64) * stride_outer + (i_row % inner).to(tl.int64) * stride_inner) * VEC


@triton.jit
def clean(z):
    """Return logits as every op reads them: float32, NaN masked, +inf the largest number."""
    return tl.minimum(tl.maximum(z.to(tl.float32), -INFINITY), LARGEST)


@triton.jit
def load_tile(p_row, begin, columns, TILE: tl.constexpr):
    """Return columns ``begin`` to ``begin + TILE`` of a row as float32 ``[TILE]``, -inf past the last."""
    o_v = begin + tl.arange(0, TILE)
    if begin + TILE <= columns:  # no mask: the vectors of a whole tile stay wide whatever the number of columns
        b_z = tl.load(p_row + o_v)
    else:
        b_z = tl.load(p_row + o_v, mask=o_v < columns, other=-INFINITY)
    return clean(b_z)


@triton.jit
def inverse_temperature(temperature):
    """Return 1/T in float64, where T = 0, the greedy limit, reads as 1."""
    t = tl.where(temperature > 0, temperature, 1.0).to(tl.float64)
    return tl.minimum(1.0 / t, LARGEST)


@triton.jit
def octaves_of(scale):
    """Return the float32 octaves a logit, e^(z/T) = 2^(octaves z), within what exponentials can tell apart."""
    return (tl.minimum(tl.maximum(scale, 1e-18), 1e18) * 1.4426950408889634).to(tl.float32)


@triton.jit
def exponents(b_z, reference, octaves):
    """Return y = octaves (z - reference), finite: 2^y is 0 where it is lowest. A reference of -inf reads as 0."""
    reference = tl.where(reference == -INFINITY, 0.0, reference)
    return tl.maximum((b_z - reference) * octaves, -200.0)


@triton.jit
def tile_record(b_z, octaves, TILE: tl.constexpr):
    """Return a tile's (top, others, moment, second, the top's place in the tile)."""
    top, i_top = tl.max(b_z, 0, return_indices=True)
    m_other = tl.arange(0, TILE) != i_top
    b_y = exponents(b_z, top, octaves)
    b_e = tl.where(m_other, tl.exp2(b_y), 0.0)
    second = tl.max(tl.where(m_other, b_z, -INFINITY), 0)
    return top, tl.sum(b_e, 0), tl.sum(b_y * b_e, 0), second, i_top


@triton.jit
def packed(z, p_logits):
    """Return cleaned logits as their own type holds them; `clean` gives them back."""
    return tl.where(z == LARGEST, INFINITY, z).to(p_logits.dtype.element_ty)


@triton.jit
def record_fields(p_record, p_logits):
    """Return where a record, 32 bytes, has its largest logits and its small numbers: of the logits' type and int16."""
    return (
        (p_record + 2).to(tl.pointer_type(p_logits.dtype.element_ty), bitcast=True),
        (p_record + 4).to(tl.pointer_type(tl.int16), bitcast=True),
    )


@triton.jit
def store_record(p_records, p_logits, i_row, i_tile, tiles, top, others, moment, second, i_top):
    """Write a tile's record, 14 or 18 bytes, to ``records[row, tile, FIELDS]``; ``i_top`` is a column of the tile."""
    p_record = p_records + (i_row.to(tl.int64) * tiles + i_tile) * FIELDS
    p_top, p_column = record_fields(p_record, p_logits)
    tl.store(p_record, others)
    tl.store(p_record + 1, moment)
    tl.store(p_top, packed(top, p_logits))
    tl.store(p_top + 1, packed(second, p_logits))
    tl.store(p_column, i_top.to(tl.int16))


@triton.jit
def load_records(p_records, p_logits, i_row, tiles, TILE: tl.constexpr, RECORDS: tl.constexpr):
    """Return all records of a row, each field ``[RECORDS]``, -inf logits past the last tile."""
    o_t = tl.arange(0, RECORDS)
    m_t = o_t < tiles
    p_record = p_records + (i_row.to(tl.int64) * tiles + o_t) * FIELDS
    p_top, p_column = record_fields(p_record, p_logits)
    others = tl.load(p_record, mask=m_t, other=0.0, cache_modifier=".cg")  # not from a stale L1
    moment = tl.load(p_record + 1, mask=m_t, other=0.0, cache_modifier=".cg")
    top = clean(tl.load(p_top, mask=m_t, other=-INFINITY, cache_modifier=".cg"))
    second = clean(tl.load(p_top + 1, mask=m_t, other=-INFINITY, cache_modifier=".cg"))
    i_top = tl.load(p_column, mask=m_t, other=0, cache_modifier=".cg").to(tl.int32)
    return top, others, moment, second, o_t * TILE + i_top


@triton.jit
def weights_of(b_top, top, octaves):
    """Return (y, 2^y) in float64: the octaves of the records' tops under the row's, and what their masses count."""
    reference = tl.where(top == -INFINITY, 0.0, top).to(tl.float64)
    b_y = tl.maximum((b_top.to(tl.float64) - reference) * octaves.to(tl.float64), -2000.0)
    return b_y, tl.exp2(b_y)


@triton.jit
def merge_records(b_top, b_others, b_moment, b_second, b_argmax, octaves):
    """Merge records ``[RECORDS]`` into the row's (top, others, moment, second, argmax), the sums in float64."""
    top = tl.max(b_top, 0)
    argmax = tl.min(tl.where(b_top == top, b_argmax, NO_COLUMN), 0)
    m_own = (b_top == top) & (b_argmax == argmax)
    b_y, b_w = weights_of(b_top, top, octaves)
    b_others = b_others.to(tl.float64)
    others = tl.sum(b_w * tl.where(m_own, b_others, b_others + 1.0), 0)
    moment = tl.sum(b_w * (b_moment.to(tl.float64) + b_y * (b_others + 1.0)), 0)
    second = tl.maximum(tl.max(tl.where(m_own, -INFINITY, b_top), 0), tl.max(b_second, 0))
    return top, others, moment, second, argmax


@triton.jit
def masses_of(b_top, b_others, top, octaves):
    """Return what each record's tile weighs, float64 ``[RECORDS]``, in units of the row's largest column."""
    b_w = weights_of(b_top, top, octaves)[1]
    return tl.where(b_top == -INFINITY, 0.0, b_w * (b_others.to(tl.float64) + 1.0))


@triton.jit
def log1p(x):
    """Return log(1 + x) of a float64, digits of a small x kept (Kahan)."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def row_stats(top, others, moment, second, argmax, scale):
    """Return (logsumexp, entropy, max_logit, argmax, margin) of a merged record: L = m + log a, H = log a - b/a."""
    empty = top == -INFINITY
    log_mass = log1p(others)
    maximum = top.to(tl.float64) * scale
    entropy = log_mass - 0.6931471805599453 * moment / (1.0 + others)
    margin = (tl.where(empty, 0.0, top).to(tl.float64) - tl.where(empty, 0.0, second).to(tl.float64)) * scale
    return (
        (maximum + log_mass).to(tl.float32),
        tl.where(empty, 0.0, entropy).to(tl.float32),
        maximum.to(tl.float32),
        tl.where(empty, -1, argmax).to(tl.int64),
        margin.to(tl.float32),
    )


@triton.jit
def store_stats(p_logsumexp, p_entropy, p_max_logit, p_argmax, p_margin, i_row, stats):
    """Write the five statistics of a row."""
    tl.store(p_logsumexp + i_row, stats[0])
    tl.store(p_entropy + i_row, stats[1])
    tl.store(p_max_logit + i_row, stats[2])
    tl.store(p_argmax + i_row, stats[3])
    tl.store(p_margin + i_row, stats[4])


@triton.jit
def arrives_last(p_counter, i_row, splits):
    """Return whether all programs of the row have come here; the last finds their stores and clears the counter."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    last = tl.atomic_add(p_counter + i_row, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(p_counter + i_row, 0)
    return last


@triton.jit
def uniform(seed, offset, row, stream):
    """Return the float64 in [0, 1) of (seed, offset, row, stream): csrc/include/ugsd/philox.h, to the bit.

    ``stream`` is DRAFT, RESIDUAL, or ``ACCEPT | position << 8``. Scalars, or tensors of one shape.
    """
    offset = offset.to(tl.uint64)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, low, (offset >> 32).to(tl.uint32), row.to(tl.uint32), stream)
    return ((word0 >> 5).to(tl.uint64) * 67108864 + (word1 >> 6).to(tl.uint64)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def draw_index(b_mass, target, N: tl.constexpr):
    """Return (index, before) of the first of N masses (float64, in order) with whose end the running sum exceeds
    ``target``; the last with mass where rounding pushed the target past the end, -1 where none has any."""
    o_n = tl.arange(0, N)
    b_running = tl.cumsum(b_mass, 0)
    m_mass = b_mass > 0
    first = tl.min(tl.where(m_mass & (b_running > target), o_n, N), 0)
    last = tl.max(tl.where(m_mass, o_n, -1), 0)
    index = tl.where(first < N, first, last)
    return index, tl.sum(tl.where(o_n == index - 1, b_running, 0.0), 0)


@triton.jit
def draw_column(b_e, target, TILE: tl.constexpr):
    """Return the column where the running sum of a tile's masses ``[TILE]`` (float32) exceeds ``target`` (float64).

    Chunks of 64 columns first, then the chunk: the one long sum's column, with no sum longer than a few dozen.
    """
    b_e = tl.reshape(b_e, (TILE // CHUNK, CHUNK))
    chunk, before = draw_index(tl.sum(b_e, 1).to(tl.float64), target, TILE // CHUNK)
    m_chunk = tl.arange(0, TILE // CHUNK)[:, None] == chunk
    column, _ = draw_index(tl.sum(tl.where(m_chunk, b_e, 0.0), 0).to(tl.float64), target - before, CHUNK)
    return chunk * CHUNK + column


class Rows(NamedTuple):
    """Rows of logits as kernels address them: two leading dimensions of any strides.

    Attributes
    ----------
    tensor
        The logits, or a copy where no two strides describe their rows.
    count, columns
        Rows, and columns of each.
    inner, stride_outer, stride_inner
        Row r is element ``vec * ((r // inner) * stride_outer + (r % inner) * stride_inner)``.
    vec
        Elements of 16 bytes where all strides are multiples of that, else 1.
    """

    tensor: Tensor
    count: int  # type: ignore[assignment]
    columns: int
    inner: int
    stride_outer: int
    stride_inner: int
    vec: int

    @property
    def address(self) -> tuple[int, int, int]:
        """Arguments of `row_offset` after the row's number."""
        return self.inner, self.stride_outer, self.stride_inner


def describe(logits: Tensor) -> Rows:
    """Return how to address the rows of ``logits[..., V]``."""
    shape, strides = logits.shape, logits.stride()
    inner, stride_inner = (shape[-2], strides[-2]) if len(shape) > 1 else (1, 0)
    outer, stride_outer = 1, 0
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2])):
        if size == 1:
            continue
        if outer == 1:
            stride_outer = stride
        if stride != stride_outer * outer:
            return describe(logits.contiguous())
        outer *= size
    if inner == 1:
        inner, stride_inner, outer, stride_outer = outer, stride_outer, 1, 0
    if inner == 1:
        stride_inner = 0
    vec = 16 // logits.element_size()
    if stride_outer % vec or stride_inner % vec:
        vec = 1
    return Rows(logits, inner * outer, shape[-1], max(inner, 1), stride_outer // vec, stride_inner // vec, vec)


def flat(rows: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a setting's tensor and the elements from one row's number to the next's, for `setting`."""
    if rows is None:
        return None, 0
    if not any(rows.stride()) or rows.numel() == 1:
        return rows, 0
    return rows.contiguous(), 1


class Plan(NamedTuple):
    """How rows are spread over programs: ``grid`` programs, ``splits`` to a row, which it has ``tiles`` of."""

    tile: int
    tiles: int
    splits: int
    records: int
    warps: int
    grid: tuple[int]

    @property
    def options(self) -> dict[str, int | bool]:
        """Options of the launch. Triton versions differ in whether they fuse products and sums unasked."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


@cache
def plan(rows: int, columns: int, multiprocessors: int, size: int, lanes: int, narrow: bool = False) -> Plan:
    """Return the launch of a kernel that reads ``rows`` of ``size``-byte elements once.

    ``lanes`` is the number of threads of a warp, ``narrow`` asks for tiles of 1024.
    """
    # A record written and read, 28 or 36 bytes, is to stay under 2% of its tile, under 4% for a single row.
    finest = (1024 if rows == 1 else 2048) // size
    wide = (tile for tile in TILES if 10 * rows * triton.cdiv(columns, tile) >= 9 * multiprocessors)
    width = 1024 if narrow else max(finest, next(wide, 0))
    tile = max(CHUNK.value, min(width, triton.next_power_of_2(columns)))
    tiles = triton.cdiv(columns, tile)
    splits = max(1, min(tiles, triton.cdiv(8 * multiprocessors, max(rows, 1))))
    threads = min(256, tile * size // 16) if tile <= 512 or narrow else 128 if tile == 1024 else 256
    return Plan(tile, tiles, splits, triton.next_power_of_2(tiles), max(1, threads // lanes), (rows * splits,))


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side: the device's multiprocessors, an H100's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def target() -> GPUTarget:
    """Return what kernels are compiled for; an H100 under the interpreter, which compiles nothing."""
    return GPUTarget("cuda", 90, 32) if triton.knobs.runtime.interpret else driver.active.get_current_target()


def plan_of(rows: Rows, count: int | None = None, *, narrow: bool = False) -> Plan:
    """Return the launch over ``rows``, or ``count`` like them, on their device."""
    tensor = rows.tensor
    count = rows.count if count is None else count
    device, size = multiprocessors(tensor.device), tensor.element_size()
    return plan(count, rows.columns, device, size, target().warp_size, narrow)


def registers(most: int) -> dict[str, int]:
    """Return the option that lets a kernel take ``most`` registers a thread, where ptxas would rather spill a few."""
    return {"maxnreg": most} if target().backend == "cuda" else {}


_scratch: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def scratch(device: torch.device, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    """Return ``counters`` int32 zeros and room for ``floats`` float32, valid for one launch on the current stream.

    They are kept a stream, and every launch leaves its counters at zero. A launch that a CUDA graph captures gets its
    own from the graph's memory, so that its replays share nothing with other streams.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _new_scratch(device, counters, floats)
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _scratch.get((device, stream))
    if kept is None or kept[0].numel() < counters or kept[1].numel() < floats:
        if kept is not None:
            counters, floats = max(counters, kept[0].numel()), max(floats, kept[1].numel())
        kept = _scratch[device, stream] = _new_scratch(device, counters, floats)
    return kept


def _new_scratch(device: torch.device, counters: int, floats: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.empty(floats, dtype=torch.float32, device=device),
    )
