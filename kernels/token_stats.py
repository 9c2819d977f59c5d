"""token_stats: logsumexp, entropy, maximum, argmax and margin of every row (MATH.md: L = m + log a, H = log a - b/a).

One launch. Bytes moved: each logit once, and 14 written and 14 read a tile, 18 of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import (
    FIELDS,
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
    row_stats,
    scratch,
    setting,
    store_record,
    store_stats,
    tile_record,
)
from ugsd_fast.ops.token_stats import empty_stats


@triton.jit(do_not_specialize=["rows_stride"])
def token_stats_kernel(
    p_logits,
    inner,
    stride_outer,
    stride_inner,
    columns,
    temperature,
    p_temperatures,
    rows_stride,
    p_logsumexp,
    p_entropy,
    p_max_logit,
    p_argmax,
    p_margin,
    p_counter,
    p_records,
    tiles,
    splits,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
):
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    scale = inverse_temperature(setting(p_temperatures, temperature, i_row, rows_stride))
    octaves = octaves_of(scale)
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        top, others, moment, second, i_top = tile_record(b_z, octaves, TILE)
        store_record(p_records, p_logits, i_row, i_tile, tiles, top, others, moment, second, i_top)
    if arrives_last(p_counter, i_row, splits):
        tops, others, moments, seconds, argmaxes = load_records(p_records, p_logits, i_row, tiles, TILE, RECORDS)
        top, other, moment, second, argmax = merge_records(tops, others, moments, seconds, argmaxes, octaves)
        stats = row_stats(top, other, moment, second, argmax, scale)
        store_stats(p_logsumexp, p_entropy, p_max_logit, p_argmax, p_margin, i_row, stats)


def token_stats(
    logits: Tensor, temperature: float, temperatures: Tensor | None, *, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """Run the kernel: `ugsd_fast.ops.token_stats` with its arguments checked and split."""
    results = empty_stats(logits, logits.shape[:-1]) if out is None else out
    rows = describe(logits)
    if rows.count == 0:
        return results
    launch = plan_of(rows)
    counters, records = scratch(logits.device, rows.count, rows.count * FIELDS.value * launch.tiles)
    token_stats_kernel[launch.grid](
        rows.tensor,
        *rows.address,
        rows.columns,
        temperature,
        *flat(temperatures),
        *results,
        counters,
        records,
        launch.tiles,
        launch.splits,
        VEC=rows.vec,
        TILE=launch.tile,
        RECORDS=launch.records,
        **launch.options,
    )
    return results
