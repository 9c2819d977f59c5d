"""filter_logits: z / T with -inf where top-k, top-p or min-p cut, in float32.

With nothing to cut, one launch that reads and writes each column once. Else two: the first reads the row for its
threshold as `sample` does, the second reads it again, writes, and fetches from the second-level cache what fits there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.filters import filter_threshold, filters_of, store_group_maxima, with_strides
from ugsd_fast.kernels.rows import (
    FIELDS,
    INFINITY,
    arrives_last,
    describe,
    flat,
    inverse_temperature,
    load_records,
    load_tile,
    merge_records,
    octaves_of,
    plan_of,
    row_offset,
    setting,
    store_record,
    tile_record,
)


@triton.jit(
    do_not_specialize=["temperature_stride", "top_k", "top_k_stride", "top_p_stride", "min_p_stride"],
)
def threshold_kernel(
    p_logits,
    inner,
    stride_outer,
    stride_inner,
    columns,
    temperature,
    p_temperatures,
    temperature_stride,
    top_k: tl.int64,
    p_top_ks,
    top_k_stride,
    top_p,
    p_top_ps,
    top_p_stride,
    min_p,
    p_min_ps,
    min_p_stride,
    p_counter,
    p_records,
    p_works,
    tiles,
    splits,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    GROUP: tl.constexpr,
    WORKSPACE: tl.constexpr,
):
    """Leave each row's threshold and, where its temperature is 0, argmax in fields 5 and 6 of its first record."""
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    temperature = setting(p_temperatures, temperature, i_row, temperature_stride)
    scale = inverse_temperature(temperature)
    octaves = octaves_of(scale)
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    p_work = p_works + i_row.to(tl.int64) * WORKSPACE
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        top, others, moment, second, argmax = tile_record(b_z, i_tile * TILE, octaves, TILE)
        store_record(p_records, i_row, i_tile, tiles, top, others, moment, second, argmax)
        if TOP_K or TOP_P or MIN_P:
            store_group_maxima(p_work, b_z, i_tile, TILE, GROUP)
    if arrives_last(p_counter, i_row, splits):
        tops, b_others, moments, seconds, argmaxes = load_records(p_records, i_row, tiles, RECORDS)
        top, others, moment, second, argmax = merge_records(tops, b_others, moments, seconds, argmaxes, octaves)
        threshold = tl.full((), -INFINITY, tl.float32)
        only = tl.full((), -1, tl.int32)
        if top > -INFINITY:
            if temperature > 0:
                threshold = filter_threshold(
                    p_row,
                    p_work,
                    columns,
                    tiles,
                    top,
                    others,
                    scale,
                    octaves,
                    setting(p_top_ks, top_k, i_row, top_k_stride),
                    setting(p_top_ps, top_p, i_row, top_p_stride),
                    setting(p_min_ps, min_p, i_row, min_p_stride),
                    TOP_K,
                    TOP_P,
                    MIN_P,
                    TILE,
                    GROUP,
                    RECORDS,
                )
            else:
                only = argmax
        p_row_record = p_records + i_row.to(tl.int64) * tiles * FIELDS
        tl.store(p_row_record + 5, threshold)
        tl.store(p_row_record + 6, only.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["temperature_stride"])
def filter_logits_kernel(
    p_logits,
    inner,
    stride_outer,
    stride_inner,
    columns,
    temperature,
    p_temperatures,
    temperature_stride,
    p_records,
    p_out,
    tiles,
    splits,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
):
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    temperature = setting(p_temperatures, temperature, i_row, temperature_stride)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    p_out += i_row.to(tl.int64) * columns
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        o_v = i_tile * TILE + tl.arange(0, TILE)
        b_out = tl.div_rn(b_z, tl.broadcast_to(divisor, (TILE,)))
        if p_records is not None:
            p_row_record = p_records + i_row.to(tl.int64) * tiles * FIELDS
            only = tl.load(p_row_record + 6).to(tl.int32, bitcast=True)
            m_kept = (b_z >= tl.load(p_row_record + 5)) & ((only < 0) | (o_v == only))
            b_out = tl.where(m_kept, b_out, -INFINITY)
        tl.store(p_out + o_v, b_out, mask=o_v < columns)


def filter_logits(logits: Tensor, *settings: Any, out: tuple[Tensor] | None = None) -> Any:
    """Run the kernels: `ugsd_fast.ops.filter_logits` with its arguments checked and split."""
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out[0]
    rows = describe(logits)
    if rows.count == 0:
        return result if out is None else out
    filters = filters_of(rows.columns, settings)
    cuts = any(filters) or settings[1] is not None or not settings[0] > 0
    launch = plan_of(rows, narrow=any(filters))
    records = None
    if cuts:
        counters, records, workspaces = filters.scratch(rows, launch)
        threshold_kernel[launch.grid](
            rows.tensor,
            *rows.address,
            rows.columns,
            *with_strides(settings),
            counters,
            records,
            workspaces,
            launch.tiles,
            launch.splits,
            VEC=rows.vec,
            **filters.options(launch),
        )
    filter_logits_kernel[launch.grid](
        rows.tensor,
        *rows.address,
        rows.columns,
        settings[0],
        *flat(settings[1]),
        records,
        result,
        launch.tiles,
        launch.splits,
        VEC=rows.vec,
        TILE=launch.tile,
        **launch.options,
    )
    return result if out is None else out
