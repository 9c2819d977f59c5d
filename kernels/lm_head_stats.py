"""lm_head_stats: token_stats of hidden @ weight^T + bias; a tile of logits lives in registers and is never written.

One launch for up to 64 rows of hidden states a group, and a group reads the weight once: V·D of its bytes. A program
multiplies 128 rows of the weight, on tensor cores where the inputs have 16 bits, and leaves a record a hidden row: 20
bytes written and read again beside 128·D weights. The last program of a group merges.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import (
    FIELDS,
    INFINITY,
    arrives_last,
    clean,
    describe,
    flat,
    inverse_temperature,
    load_records,
    merge_records,
    octaves_of,
    record_fields,
    registers,
    row_offset,
    row_stats,
    scratch,
    setting,
    store_stats,
    weights_of,
)
from ugsd_fast.ops.token_stats import empty_stats

BLOCK_V = 128


@triton.jit
def store_records(p_records, o_m, m_m, i_tile, tiles, b_z, octaves, BLOCK_V: tl.constexpr):
    """Write the record of each row of a tile of logits ``[BLOCK_M, BLOCK_V]``, as `rows.tile_record` defines it."""
    top, i_top = tl.max(b_z, 1, return_indices=True)
    m_other = tl.arange(0, BLOCK_V)[None, :] != i_top[:, None]
    reference = tl.where(top == -INFINITY, 0.0, top)
    b_y = tl.maximum((b_z - reference[:, None]) * octaves[:, None], -200.0)
    b_e = tl.where(m_other, tl.exp2(b_y), 0.0)
    p_record = p_records + (o_m.to(tl.int64) * tiles + i_tile) * FIELDS
    p_top, p_column = record_fields(p_record, p_records)
    tl.store(p_record, tl.sum(b_e, 1), mask=m_m)
    tl.store(p_record + 1, tl.sum(b_y * b_e, 1), mask=m_m)
    tl.store(p_top, top, mask=m_m)
    tl.store(p_top + 1, tl.max(tl.where(m_other, b_z, -INFINITY), 1), mask=m_m)
    tl.store(p_column, i_top.to(tl.int16), mask=m_m)


@triton.jit
def merge_rows_records(p_records, i_row, tiles, octaves, BLOCK_V: tl.constexpr, RECORDS: tl.constexpr):
    """Merge a row's records, RECORDS at a time and in order, as `rows.merge_records` does."""
    top = tl.full((), -INFINITY, tl.float32)
    others = tl.full((), 0.0, tl.float64)
    moment, second, argmax = others, top, tl.full((), 0, tl.int32)
    for first in range(0, tiles, RECORDS):
        p_first = p_records + (i_row.to(tl.int64) * tiles + first) * FIELDS
        tops, b_others, moments, seconds, argmaxes = load_records(
            p_first, p_records, 0 * i_row, tiles - first, BLOCK_V, RECORDS
        )
        argmaxes += first * BLOCK_V
        top1, others1, moment1, second1, argmax1 = merge_records(tops, b_others, moments, seconds, argmaxes, octaves)
        larger = top1 > top
        second = tl.maximum(tl.minimum(top, top1), tl.maximum(second, second1))
        best = tl.maximum(top, top1)
        y, weight = weights_of(top, best, octaves)
        y1, weight1 = weights_of(top1, best, octaves)
        moment = weight * (moment + y * (others + 1.0)) + weight1 * (moment1 + y1 * (others1 + 1.0))
        others = weight * tl.where(larger, others + 1.0, others) + weight1 * tl.where(larger, others1, others1 + 1.0)
        argmax = tl.where(larger, argmax1, argmax)
        top = best
    return top, others, moment, second, argmax


@triton.jit(do_not_specialize=["rows", "bias_stride", "temperature_stride"])
def lm_head_stats_kernel(
    p_hidden,
    inner,
    stride_outer,
    stride_inner,
    rows,
    width,
    p_weight,
    weight_stride,
    vocabulary,
    p_bias,
    bias_stride,
    temperature,
    p_temperatures,
    temperature_stride,
    p_logsumexp,
    p_entropy,
    p_max_logit,
    p_argmax,
    p_margin,
    p_counter,
    p_records,
    tiles,
    groups,
    VEC: tl.constexpr,
    WEIGHT_VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    RECORDS: tl.constexpr,
):
    # Groups of one tile are neighbours: the second finds the weight in the cache.
    i_group, i_tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    o_m = i_group * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    m_m, m_v = o_m < rows, o_v < vocabulary
    p_h = p_hidden + row_offset(tl.where(m_m, o_m, 0), inner, stride_outer, stride_inner, VEC)[:, None]
    p_w = p_weight + (tl.where(m_v, o_v, 0).to(tl.int64) * weight_stride * WEIGHT_VEC)[:, None]
    b_z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for begin in range(0, width, BLOCK_D):
        o_d = begin + tl.arange(0, BLOCK_D)[None, :]
        if EVEN_D:  # rows past the last are the first one again: no mask, wide loads
            b_h = tl.load(p_h + o_d)  # [BLOCK_M, BLOCK_D]
            b_w = tl.load(p_w + o_d)  # [BLOCK_V, BLOCK_D]
        else:
            b_h = tl.load(p_h + o_d, mask=o_d < width, other=0.0)
            b_w = tl.load(p_w + o_d, mask=o_d < width, other=0.0)
        if WIDEN:
            b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
        b_z = tl.dot(b_h, tl.trans(b_w), b_z, input_precision="ieee")
    if p_bias is not None:
        b_z += tl.load(p_bias + o_v * bias_stride, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_z = tl.where(m_v[None, :], clean(b_z), -INFINITY)

    if p_temperatures is None:
        scale = inverse_temperature(tl.full((BLOCK_M,), temperature, tl.float32))
    else:
        scale = inverse_temperature(tl.load(p_temperatures + o_m * temperature_stride, mask=m_m, other=1.0))
    store_records(p_records, o_m, m_m, i_tile, tiles, b_z, octaves_of(scale), BLOCK_V)
    if arrives_last(p_counter, i_group, tiles):
        for i in range(tl.minimum(rows - i_group * BLOCK_M, BLOCK_M)):
            i_row = i_group * BLOCK_M + i
            own = inverse_temperature(setting(p_temperatures, temperature, i_row, temperature_stride))
            top, others, moment, second, argmax = merge_rows_records(p_records, i_row, tiles, octaves_of(own), BLOCK_V, RECORDS)
            stats = row_stats(top, others, moment, second, argmax, own)
            store_stats(p_logsumexp, p_entropy, p_max_logit, p_argmax, p_margin, i_row, stats)


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Return whether products of 16-bit numbers run on tensor cores that Triton knows, with float32 sums."""
    # The interpreter multiplies bfloat16 wrongly: it holds the bits as integers.
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8)


def lm_head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Run the kernel: `ugsd_fast.ops.lm_head_stats` with its arguments checked and split."""
    results = empty_stats(hidden, hidden.shape[:-1]) if out is None else out
    rows, weights = describe(hidden), describe(weight)
    if rows.count == 0:
        return results
    widen = hidden.element_size() == 4 or not has_tensor_cores(hidden.device)
    block_m, block_d = max(16, min(64, triton.next_power_of_2(rows.count))), 32 if widen else 64
    tiles, groups = triton.cdiv(weights.count, BLOCK_V), triton.cdiv(rows.count, block_m)
    counters, records = scratch(hidden.device, groups, rows.count * FIELDS.value * tiles)
    lm_head_stats_kernel[(tiles * groups,)](
        rows.tensor,
        *rows.address,
        rows.count,
        rows.columns,
        weights.tensor,
        weights.stride_inner,
        weights.count,
        bias,
        0 if bias is None else bias.stride(0),
        temperature,
        *flat(temperatures),
        *results,
        counters,
        records,
        tiles,
        groups,
        VEC=rows.vec,
        WEIGHT_VEC=weights.vec,
        BLOCK_M=block_m,
        BLOCK_V=BLOCK_V,
        BLOCK_D=block_d,
        EVEN_D=rows.columns % block_d == 0,
        WIDEN=widen,
        RECORDS=min(256, triton.next_power_of_2(tiles)),
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
        **registers(255),
    )
    return results
