"""filter_logits: z / T with -inf where top-k, top-p or min-p cut, in float32.

One launch: each column is read once and written once. Where something is cut, the pass over the row writes -inf and
keeps what `ugsd_fast.kernels.filters` asks for; the row's last program then finds the threshold, and writes the few
columns that stay over it: from its candidates, or where these are too many for a tile, from a second read of their
groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.filters import (
    columns_at,
    filter_threshold,
    filters_of,
    load_candidates,
    load_groups,
    load_places,
    store_group_maxima,
    with_strides,
)
from ugsd_fast.kernels.rows import (
    INFINITY,
    arrives_last,
    describe,
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


@triton.jit
def over(b_z, divisor, TILE: tl.constexpr):
    """Return z / T, rounded as IEEE divides."""
    return tl.div_rn(b_z, tl.broadcast_to(divisor, (TILE,)))


@triton.jit
def write_survivors(
    p_out,
    p_row,
    p_work,
    columns,
    threshold,
    listed,
    found,
    divisor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Write z / T of the columns at or over ``threshold``, among the candidates or the groups listed."""
    GROUPS: tl.constexpr = RECORDS * (TILE // GROUP)
    o_i = tl.arange(0, TILE)
    for first in range(0, listed if found > TILE else 1, TILE // GROUP):
        if found <= TILE:
            b_z = load_candidates(p_row, p_work, found, TILE)
            o_place = load_places(p_work, o_i, b_z >= threshold)
        else:
            b_z = load_groups(p_row, p_work, first, listed, columns, TILE, GROUP, GROUPS)
            o_place = first * GROUP + o_i
        o_v = columns_at(p_work, o_place, b_z >= threshold, TILE, GROUP, GROUPS)
        tl.store(p_out + o_v, over(b_z, divisor, TILE), mask=b_z >= threshold)


@triton.jit(
    do_not_specialize=["temperature_stride", "top_k", "top_k_stride", "top_p_stride", "min_p_stride"],
)
def filter_logits_kernel(
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
    p_out,
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
    GREEDY: tl.constexpr,
    GROUP: tl.constexpr,
    WORKSPACE: tl.constexpr,
):
    FILTERED: tl.constexpr = TOP_K or TOP_P or MIN_P
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    temperature = setting(p_temperatures, temperature, i_row, temperature_stride)
    top_k = setting(p_top_ks, top_k, i_row, top_k_stride)
    top_p = setting(p_top_ps, top_p, i_row, top_p_stride)
    min_p = setting(p_min_ps, min_p, i_row, min_p_stride)
    greedy = temperature <= 0
    cuts = greedy | ((top_k > 0) & (top_k < columns)) | (top_p < 1) | (min_p > 0)
    divisor = tl.where(greedy, 1.0, temperature)
    scale = inverse_temperature(temperature)
    octaves = octaves_of(scale)
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    p_work = p_works + i_row.to(tl.int64) * WORKSPACE
    p_out += i_row.to(tl.int64) * columns
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        o_v = i_tile * TILE + tl.arange(0, TILE)
        b_out = over(b_z, divisor, TILE)
        if FILTERED or GREEDY:
            top, others, moment, second, i_top = tile_record(b_z, octaves, TILE)
            store_record(p_records, p_logits, i_row, i_tile, tiles, top, others, moment, second, i_top)
            b_out = tl.where(cuts, -INFINITY, b_out)
        if FILTERED:
            store_group_maxima(p_work, p_row, b_z, i_tile, TILE, GROUP)
        tl.store(p_out + o_v, b_out, mask=o_v < columns)
    if FILTERED or GREEDY:
        if arrives_last(p_counter, i_row, splits):
            tops, b_others, moments, seconds, argmaxes = load_records(p_records, p_logits, i_row, tiles, TILE, RECORDS)
            top, others, moment, second, argmax = merge_records(tops, b_others, moments, seconds, argmaxes, octaves)
            if cuts & (top > -INFINITY):
                if greedy:
                    tl.store(p_out + argmax, top)
                elif FILTERED:
                    threshold, listed, found = filter_threshold(
                        p_row,
                        p_work,
                        columns,
                        tiles,
                        top,
                        others,
                        scale,
                        octaves,
                        top_k,
                        top_p,
                        min_p,
                        TOP_K,
                        TOP_P,
                        MIN_P,
                        TILE,
                        GROUP,
                        RECORDS,
                    )
                    write_survivors(
                        p_out, p_row, p_work, columns, threshold, listed, found, divisor, TILE, GROUP, RECORDS
                    )


def filter_logits(logits: Tensor, *settings: Any, out: tuple[Tensor] | None = None) -> Any:
    """Run the kernel: `ugsd_fast.ops.filter_logits` with its arguments checked and split."""
    result = torch.empty(logits.shape, dtype=torch.float32, device=logits.device) if out is None else out[0]
    rows = describe(logits)
    if rows.count == 0:
        return result if out is None else out
    filters = filters_of(rows.columns, settings)
    launch = plan_of(rows, narrow=any(filters))
    filter_logits_kernel[launch.grid](
        rows.tensor,
        *rows.address,
        rows.columns,
        *with_strides(settings),
        result,
        *filters.scratch(rows, launch),
        launch.tiles,
        launch.splits,
        VEC=rows.vec,
        GREEDY=settings[1] is not None or not settings[0] > 0,
        **filters.options(launch),
    )
    return result if out is None else out
