"""logprob_rank: log p(x) and 1 + #{v : z_v > z_x} of one token a row.

One launch; with the logsumexp given it only counts. Bytes moved: each logit once, the token's own once more a program,
and 8 written and 8 read a tile, 10 of float32 (2 and 2 with the logsumexp given).
"""

from __future__ import annotations

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
    exponents,
    flat,
    inverse_temperature,
    load_tile,
    log1p,
    octaves_of,
    packed,
    plan_of,
    record_fields,
    row_offset,
    scratch,
    setting,
    weights_of,
)


@triton.jit(do_not_specialize=["temperature_stride", "logsumexp_stride"])
def logprob_rank_kernel(
    p_logits,
    inner,
    stride_outer,
    stride_inner,
    columns,
    p_tokens,
    temperature,
    p_temperatures,
    temperature_stride,
    p_logsumexps,
    logsumexp_stride,
    p_logprob,
    p_rank,
    p_counter,
    p_records,
    tiles,
    splits,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
):
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    p_row = p_logits + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
    token = tl.load(p_tokens + i_row).to(tl.int64)
    inside = (token >= 0) & (token < columns)
    z = clean(tl.load(p_row + token, mask=inside, other=-INFINITY))
    scale = inverse_temperature(setting(p_temperatures, temperature, i_row, temperature_stride))
    octaves = octaves_of(scale)
    if inside:
        for i_tile in range(i_split, tiles, splits):
            b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
            p_record = p_records + (i_row.to(tl.int64) * tiles + i_tile) * FIELDS
            p_top, p_count = record_fields(p_record, p_logits)
            tl.store(p_count, tl.sum((b_z > z).to(tl.int32), 0).to(tl.int16))
            if p_logsumexps is None:
                top, i_top = tl.max(b_z, 0, return_indices=True)
                b_e = tl.exp2(exponents(b_z, top, octaves))
                tl.store(p_top, packed(top, p_logits))
                tl.store(p_record, tl.sum(tl.where(tl.arange(0, TILE) != i_top, b_e, 0.0), 0))
    if arrives_last(p_counter, i_row, splits):
        logprob = z.to(tl.float64) * scale
        rank = columns + 1
        if inside:
            o_t = tl.arange(0, RECORDS)
            m_t = o_t < tiles
            p_record = p_records + (i_row.to(tl.int64) * tiles + o_t) * FIELDS
            p_top, p_count = record_fields(p_record, p_logits)
            rank = 1 + tl.sum(tl.load(p_count, mask=m_t, other=0, cache_modifier=".cg").to(tl.int32), 0)
            if p_logsumexps is None:
                # The maximum stays out of the sums, so that log p of a nearly certain token keeps its digits.
                tops = clean(tl.load(p_top, mask=m_t, other=-INFINITY, cache_modifier=".cg"))
                b_others = tl.load(p_record, mask=m_t, other=0.0, cache_modifier=".cg").to(tl.float64)
                top, i_top = tl.max(tops, 0, return_indices=True)
                b_beside = tl.where(o_t == i_top, b_others, b_others + 1.0)
                others = tl.sum(weights_of(tops, top, octaves)[1] * b_beside, 0)
                top = tl.where(top == -INFINITY, 0.0, top).to(tl.float64)
                logprob = (z.to(tl.float64) - top) * scale - log1p(others)
            else:
                logprob -= tl.load(p_logsumexps + i_row * logsumexp_stride)
        tl.store(p_logprob + i_row, tl.where(z > -INFINITY, logprob, -INFINITY).to(tl.float32))
        tl.store(p_rank + i_row, rank.to(tl.int64))


def logprob_rank(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    logsumexp: Tensor | None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel: `ugsd_fast.ops.logprob_rank` with its arguments checked and split."""
    if out is None:
        shape = logits.shape[:-1]
        out = logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)
    rows = describe(logits)
    if rows.count == 0:
        return out
    launch = plan_of(rows)
    counters, records = scratch(logits.device, rows.count, rows.count * FIELDS.value * launch.tiles)
    logprob_rank_kernel[launch.grid](
        rows.tensor,
        *rows.address,
        rows.columns,
        tokens.contiguous(),
        temperature,
        *flat(temperatures),
        *flat(logsumexp),
        *out,
        counters,
        records,
        launch.tiles,
        launch.splits,
        VEC=rows.vec,
        TILE=launch.tile,
        RECORDS=launch.records,
        **launch.options,
    )
    return out
