"""sample: one token a row from softmax(filter(z / T)), with its statistics (MATH.md: the hierarchical inverse CDF).

One launch. Bytes moved: each logit once, the tile that holds the draw once more, and 14 written and 14 read a tile, 18
of float32. With filters, instead of that tile, a logit written and read a group of 32 or 64 columns, and the groups that
may hold a survivor once more (`ugsd_fast.kernels.filters`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.filters import (
    draw_filtered,
    filter_threshold,
    filters_of,
    store_group_maxima,
    with_strides,
)
from ugsd_fast.kernels.rows import (
    DRAFT,
    INFINITY,
    arrives_last,
    clean,
    describe,
    draw_column,
    draw_index,
    exponents,
    inverse_temperature,
    load_records,
    load_tile,
    log1p,
    masses_of,
    merge_records,
    octaves_of,
    plan_of,
    row_offset,
    row_stats,
    setting,
    store_record,
    store_stats,
    tile_record,
    uniform,
    weights_of,
)
from ugsd_fast.ops.token_stats import empty_stats


@triton.jit
def draft_uniform(seed, p_seeds, seed_stride, offset, p_offsets, offset_stride, i_row):
    """Return the uniform of a row's draw."""
    seed = setting(p_seeds, seed, i_row, seed_stride)
    offset = setting(p_offsets, offset, i_row, offset_stride)
    return uniform(seed, offset, i_row, DRAFT)


@triton.jit
def draw_token(p_row, columns, tops, b_others, top, octaves, u, TILE: tl.constexpr, RECORDS: tl.constexpr):
    """Return the column of the draw ``u`` from a row whose records are known: its tile first, then inside."""
    b_mass = masses_of(tops, b_others, top, octaves)
    target = u * tl.sum(b_mass, 0)
    i_tile, before = draw_index(b_mass, target, RECORDS)
    near = tl.max(tl.where(tl.arange(0, RECORDS) == i_tile, tops, -INFINITY), 0)
    left = (target - before) / weights_of(near, top, octaves)[1]  # in units of the tile's own largest column
    b_z = load_tile(p_row, i_tile * TILE, columns, TILE)
    return i_tile * TILE + draw_column(tl.exp2(exponents(b_z, near, octaves)), left, TILE)


@triton.jit(
    do_not_specialize=[
        "temperature_stride",
        "top_k",
        "top_k_stride",
        "top_p_stride",
        "min_p_stride",
        "seed",
        "seed_stride",
        "offset",
        "offset_stride",
    ]
)
def sample_kernel(
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
    seed: tl.int64,
    p_seeds,
    seed_stride,
    offset: tl.int64,
    p_offsets,
    offset_stride,
    p_tokens,
    p_logprob,
    p_logsumexp,
    p_entropy,
    p_max_logit,
    p_argmax,
    p_margin,
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
    FILTERED: tl.constexpr = TOP_K or TOP_P or MIN_P
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    temperature = setting(p_temperatures, temperature, i_row, temperature_stride)
    scale = inverse_temperature(temperature)
    octaves = octaves_of(scale)
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    p_work = p_works + i_row.to(tl.int64) * WORKSPACE
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        top, others, moment, second, i_top = tile_record(b_z, octaves, TILE)
        store_record(p_records, p_logits, i_row, i_tile, tiles, top, others, moment, second, i_top)
        if FILTERED:
            store_group_maxima(p_work, p_row, b_z, i_tile, TILE, GROUP)
    if arrives_last(p_counter, i_row, splits):
        tops, b_others, moments, seconds, argmaxes = load_records(p_records, p_logits, i_row, tiles, TILE, RECORDS)
        top, others, moment, second, argmax = merge_records(tops, b_others, moments, seconds, argmaxes, octaves)
        stats = row_stats(top, others, moment, second, argmax, scale)
        store_stats(p_logsumexp, p_entropy, p_max_logit, p_argmax, p_margin, i_row, stats)
        token = stats[3]
        logprob = tl.where(token < 0, -INFINITY, -log1p(others))
        if (temperature > 0) & (token >= 0):
            filtered = False
            if FILTERED:
                top_k = setting(p_top_ks, top_k, i_row, top_k_stride)
                top_p = setting(p_top_ps, top_p, i_row, top_p_stride)
                min_p = setting(p_min_ps, min_p, i_row, min_p_stride)
                filtered = ((top_k > 0) & (top_k < columns)) | (top_p < 1) | (min_p > 0)
            if filtered:
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
                u = draft_uniform(seed, p_seeds, seed_stride, offset, p_offsets, offset_stride, i_row)
                column, total = draw_filtered(
                    p_row, p_work, columns, threshold, listed, found, top, octaves, u, TILE, GROUP, RECORDS
                )
                log_total = tl.log(total)
            else:
                u = draft_uniform(seed, p_seeds, seed_stride, offset, p_offsets, offset_stride, i_row)
                column = draw_token(p_row, columns, tops, b_others, top, octaves, u, TILE, RECORDS)
                log_total = log1p(others)
            token = column.to(tl.int64)
            logprob = (clean(tl.load(p_row + token)).to(tl.float64) - top.to(tl.float64)) * scale - log_total
        tl.store(p_tokens + i_row, token)
        tl.store(p_logprob + i_row, logprob.to(tl.float32))


def sample(logits: Tensor, *settings: Any, out: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """Run the kernel: `ugsd_fast.ops.sample` with its arguments checked and split."""
    if out is None:
        shape = logits.shape[:-1]
        tokens, logprob = logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)
        out = tokens, logprob, *empty_stats(logits, shape)
    rows = describe(logits)
    if rows.count == 0:
        return out
    filters = filters_of(rows.columns, settings[:8])
    launch = plan_of(rows, narrow=any(filters))
    sample_kernel[launch.grid](
        rows.tensor,
        *rows.address,
        rows.columns,
        *with_strides(settings),
        *out,
        *filters.scratch(rows, launch),
        launch.tiles,
        launch.splits,
        VEC=rows.vec,
        **filters.options(launch),
    )
    return out
