"""``accept_block``: the kept prefix of a drafted block and the token after it, under six rules (MATH.md).

greedy, rank, typical and relaxed take one launch: every row of the verifier's is read once, the last program of a row
decides its position, and the last row of a sequence its block. exact and block start the same way with what a softmax
needs (a maximum and a mass of each tile) and end there if the whole block is kept. If not, a second launch adds up the
residual max(0, w p - q) of one row and draws from it: the row of the first rejection (exact), or of the longest prefix
that can still pass (block), all others being ruled out by their weights. A third launch, of block alone, takes the
shorter prefixes where that one failed, from the right to the first success.

Bytes moved: the K + 1 rows of the verifier's, the drafter's K where their logsumexp is not given, two rows a residual,
a tile of each for a draw, and 8 to 16 written and read a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import (
    ACCEPT,
    INFINITY,
    RESIDUAL,
    arrives_last,
    clean,
    describe,
    draw_column,
    draw_index,
    exponents,
    flat,
    load_tile,
    log1p,
    plan_of,
    registers,
    row_offset,
    scratch,
    setting,
    tile_record,
    uniform,
)

OCTAVES = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

FIELDS = 5
"""Of a sequence's float64 state, each ``[K + 1]``: maximum and mass of p, of q, and the weight w of a prefix, -1 where
it is ruled out."""


@triton.jit
def drafted_length(p_lengths, i_b, stride, block):
    """Return how many tokens of a block were drafted."""
    length = block
    if p_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b * stride).to(tl.int64), 0), block).to(tl.int32)
    return length


@triton.jit
def exponentials(b_z, reference):
    """Return e^(z - reference), 0 for masked columns and finite whatever the reference."""
    return tl.exp2(tl.minimum(exponents(b_z, reference, OCTAVES), 120.0))


@triton.jit
def probabilities(b_z, b_top, b_mass):
    """Return the float64 e^(z - top) / mass of gathered logits, 0 for masked ones and in a row with nothing finite."""
    m = (b_z > -INFINITY) & (b_top > -INFINITY)
    shift = tl.where(m, b_z.to(tl.float64) - tl.where(m, b_top, 0.0), 0.0)
    return tl.where(m, tl.exp(shift) / b_mass, 0.0)


@triton.jit
def store_masses(p_row, columns, p_record, i_split, splits, tiles, TILE: tl.constexpr):
    """Write each tile's largest logit and the mass under it to ``record[2, tiles]``, a program's share of a row."""
    for i_tile in range(i_split, tiles, splits):
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
        top = tl.max(b_z, 0)
        tl.store(p_record + i_tile, top)
        tl.store(p_record + tiles + i_tile, tl.sum(exponentials(b_z, top), 0))


@triton.jit
def load_masses(p_record, tiles, RECORDS: tl.constexpr):
    """Return the row's largest logit, those of its tiles, and their float64 masses under the row's ``[RECORDS]``."""
    o_t = tl.arange(0, RECORDS)
    b_top = tl.load(p_record + o_t, mask=o_t < tiles, other=-INFINITY, cache_modifier=".cg")
    b_mass = tl.load(p_record + tiles + o_t, mask=o_t < tiles, other=0.0, cache_modifier=".cg").to(tl.float64)
    top = tl.max(b_top, 0)
    m = b_top > -INFINITY
    shift = tl.where(m, b_top.to(tl.float64) - tl.where(m, top, 0.0).to(tl.float64), 0.0)
    return top, b_top, tl.where(m, b_mass * tl.exp(shift), 0.0)


@triton.jit
def draw_softmax(p_row, columns, p_record, tiles, u, TILE: tl.constexpr, RECORDS: tl.constexpr):
    """Return the token of a row that the uniform falls on, -1 where nothing is finite."""
    top, b_top, b_mass = load_masses(p_record, tiles, RECORDS)
    target = u * tl.sum(b_mass, 0)
    i_tile, before = draw_index(b_mass, target, RECORDS)
    token = i_tile
    if i_tile >= 0:
        near = tl.max(tl.where(tl.arange(0, RECORDS) == i_tile, b_top, -INFINITY), 0)
        left = (target - before) * tl.exp(top.to(tl.float64) - near.to(tl.float64))
        b_z = load_tile(p_row, i_tile * TILE, columns, TILE)
        token = i_tile * TILE + draw_column(exponentials(b_z, near), left, TILE)
    return token.to(tl.int64)


@triton.jit(do_not_specialize=["block", "token_row_stride", "token_stride", "length_stride"])
def prefix_kernel(
    p_target,
    inner,
    stride_outer,
    stride_inner,
    columns,
    block,
    p_tokens,
    token_row_stride,
    token_stride,
    p_lengths,
    length_stride,
    limit: tl.float64,
    p_limits,
    limit_stride,
    slack: tl.float64,
    p_slacks,
    slack_stride,
    p_accepted,
    p_next,
    p_prob,
    p_counters,
    p_verdicts,
    p_records,
    rows,
    tiles,
    splits,
    RULE: tl.constexpr,
    BONUS: tl.constexpr,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COUNTS: tl.constexpr = RULE == "rank" or RULE == "relaxed"
    WEIGHS: tl.constexpr = RULE == "typical" or RULE == "relaxed"
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    i_b, i_k = i_row // (block + 1), i_row % (block + 1)
    length = drafted_length(p_lengths, i_b, length_stride, block)
    here = i_split == 0  # who passes the word of this row on
    if i_k <= length:
        p_row = p_target + row_offset(i_row, inner, stride_outer, stride_inner, VEC)
        p_token = p_tokens + i_b.to(tl.int64) * token_row_stride + i_k.to(tl.int64) * token_stride
        token = tl.load(p_token, mask=i_k < length, other=-1).to(tl.int64)
        inside = (token >= 0) & (token < columns)
        own = clean(tl.load(p_row + tl.where(inside, token, 0), mask=inside, other=-INFINITY))
        p_record = p_records + i_row.to(tl.int64) * tiles * 5
        for i_tile in range(i_split, tiles, splits):
            b_z = load_tile(p_row, i_tile * TILE, columns, TILE)  # [TILE]
            top, others, moment, _, i_top = tile_record(b_z, OCTAVES, TILE)
            tl.store(p_record + i_tile, top)
            tl.store(p_record + tiles + i_tile, (i_tile * TILE + i_top).to(tl.float32, bitcast=True))
            if WEIGHS:
                tl.store(p_record + 2 * tiles + i_tile, others)
            if RULE == "typical":
                tl.store(p_record + 3 * tiles + i_tile, moment)
            if COUNTS:
                tl.store(p_record + 4 * tiles + i_tile, tl.sum((b_z > own).to(tl.int32), 0).to(tl.float32))
        here = arrives_last(p_counters, i_row, splits)
        if here:
            o_t = tl.arange(0, RECORDS)
            m_t = o_t < tiles
            b_top = tl.load(p_record + o_t, mask=m_t, other=-INFINITY, cache_modifier=".cg")
            b_argmax = tl.load(p_record + tiles + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
            b_argmax = b_argmax.to(tl.int32, bitcast=True)
            top = tl.max(b_top, 0)
            argmax = tl.where(top == -INFINITY, -1, tl.min(tl.where(b_top == top, b_argmax, 2147483647), 0))
            passes = inside & (own > -INFINITY)
            if RULE == "greedy":
                passes &= token == argmax
            if COUNTS:
                b_count = tl.load(p_record + 4 * tiles + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
                passes &= 1 + tl.sum(b_count.to(tl.float64), 0) <= setting(p_limits, limit, i_b, limit_stride)
            if WEIGHS:
                b_others = tl.load(p_record + 2 * tiles + o_t, mask=m_t, other=0.0, cache_modifier=".cg").to(tl.float64)
                b_octaves = tl.where(b_top == -INFINITY, -2000.0, (b_top - top).to(tl.float64) * OCTAVES)
                b_octaves = tl.maximum(b_octaves, -2000.0)
                b_weight = tl.exp2(b_octaves)
                m_own = (b_top == top) & (b_argmax == argmax)
                others = tl.sum(b_weight * tl.where(m_own, b_others, b_others + 1.0), 0)
                p = tl.exp(tl.minimum(own.to(tl.float64) - top.to(tl.float64), 0.0)) / (1.0 + others)
                slack = setting(p_slacks, slack, i_b, slack_stride)
                if RULE == "typical":
                    b_moment = tl.load(p_record + 3 * tiles + o_t, mask=m_t, other=0.0, cache_modifier=".cg")
                    moment = tl.sum(b_weight * (b_moment.to(tl.float64) + b_octaves * (b_others + 1.0)), 0)
                    entropy = log1p(others) - LN2 * moment / (1.0 + others)
                    limit = setting(p_limits, limit, i_b, limit_stride)
                    passes &= p > tl.minimum(limit, slack * tl.exp(-entropy))
                else:
                    passes &= p >= 1.0 / (1.0 + others) - slack
            tl.store(p_verdicts + i_row, argmax * 2 + passes.to(tl.int32))
    if here:
        if arrives_last(p_counters + rows, i_b, block + 1):
            o_k = tl.arange(0, BLOCK_K)
            m_k = o_k <= length
            b_verdict = tl.load(p_verdicts + i_b * (block + 1) + o_k, mask=m_k, other=0, cache_modifier=".cg")
            accepted = tl.min(tl.where((o_k < length) & (b_verdict % 2 != 0), BLOCK_K, o_k), 0)
            following = tl.sum(tl.where(o_k == accepted, b_verdict >> 1, 0), 0)
            if not BONUS:
                following = tl.where(accepted == length, -1, following)
            tl.store(p_accepted + i_b, accepted.to(tl.int64))
            tl.store(p_next + i_b, following.to(tl.int64))
            tl.store(p_prob + i_b * block + o_k, (o_k < accepted).to(tl.float32), mask=o_k < block)


@triton.jit(
    do_not_specialize=["block", "token_row_stride", "token_stride", "length_stride", "sum_row_stride", "sum_stride"]
)
def weights_kernel(
    p_target,
    inner,
    stride_outer,
    stride_inner,
    p_draft,
    draft_inner,
    draft_stride_outer,
    draft_stride_inner,
    p_logsumexp,
    sum_row_stride,
    sum_stride,
    columns,
    block,
    p_tokens,
    token_row_stride,
    token_stride,
    p_lengths,
    length_stride,
    seed: tl.int64,
    p_seeds,
    seed_stride,
    offset: tl.int64,
    p_offsets,
    offset_stride,
    p_accepted,
    p_next,
    p_prob,
    p_counters,
    p_state,
    p_pending,
    p_records,
    rows,
    tiles,
    splits,
    RULE: tl.constexpr,
    BONUS: tl.constexpr,
    VEC: tl.constexpr,
    DRAFT_VEC: tl.constexpr,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    READS_DRAFT: tl.constexpr = p_draft is not None and p_logsumexp is None
    i_row, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    of_each = block + 1  # rows of a sequence: the verifier's, then the drafter's
    if READS_DRAFT:
        of_each += block
    i_b, i_k = i_row // of_each, i_row % of_each
    length = drafted_length(p_lengths, i_b, length_stride, block)
    p_state += i_b.to(tl.int64) * 5 * (block + 1)
    here = i_split == 0  # who passes the word of this row on
    p_record = p_records + i_row.to(tl.int64) * tiles * 2
    of_draft = i_k > block
    i_k = tl.where(of_draft, i_k - block - 1, i_k)
    if i_k < length + tl.where(of_draft, 0, 1):
        if of_draft:
            if READS_DRAFT:
                i_q = i_b * block + i_k
                p_row = p_draft + row_offset(i_q, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_VEC)
                store_masses(p_row, columns, p_record, i_split, splits, tiles, TILE)
        else:
            p_row = p_target + row_offset(i_b * (block + 1) + i_k, inner, stride_outer, stride_inner, VEC)
            store_masses(p_row, columns, p_record, i_split, splits, tiles, TILE)
        here = arrives_last(p_counters, i_row, splits)
        if here:
            top, _, b_mass = load_masses(p_record, tiles, RECORDS)
            p_own = p_state + i_k + tl.where(of_draft, 2, 0) * (block + 1)
            tl.store(p_own, top.to(tl.float64))
            tl.store(p_own + block + 1, tl.sum(b_mass, 0))
    if here:
        if arrives_last(p_counters + rows, i_b, of_each):
            # ratio[k] = p(x)/q(x) of each drafted token, 0 for an impossible one
            o_k = tl.arange(0, BLOCK_K)
            m_k = o_k < length
            p_token = p_tokens + i_b.to(tl.int64) * token_row_stride + o_k.to(tl.int64) * token_stride
            b_token = tl.load(p_token, mask=m_k, other=-1).to(tl.int64)
            inside = (b_token >= 0) & (b_token < columns)
            b_token = tl.where(inside, b_token, 0)
            b_top = tl.load(p_state + o_k, mask=m_k, other=0.0, cache_modifier=".cg")
            b_mass = tl.load(p_state + block + 1 + o_k, mask=m_k, other=1.0, cache_modifier=".cg")
            o_row = row_offset(i_b * (block + 1) + o_k, inner, stride_outer, stride_inner, VEC)
            b_z = clean(tl.load(p_target + o_row + b_token, mask=inside, other=-INFINITY))
            b_p = probabilities(b_z, b_top, b_mass)
            b_q = tl.where(inside, 1.0, 0.0).to(tl.float64)
            if p_draft is not None:
                if READS_DRAFT:
                    b_top = tl.load(p_state + 2 * (block + 1) + o_k, mask=m_k, other=0.0, cache_modifier=".cg")
                    b_mass = tl.load(p_state + 3 * (block + 1) + o_k, mask=m_k, other=1.0, cache_modifier=".cg")
                else:
                    p_sum = p_logsumexp + i_b.to(tl.int64) * sum_row_stride + o_k.to(tl.int64) * sum_stride
                    b_top = tl.load(p_sum, mask=m_k, other=0.0).to(tl.float64)
                    b_mass = tl.full([BLOCK_K], 1.0, tl.float64)
                    tl.store(p_state + 2 * (block + 1) + o_k, b_top, mask=m_k)
                    tl.store(p_state + 3 * (block + 1) + o_k, b_mass, mask=m_k)
                o_row = row_offset(i_b * block + o_k, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_VEC)
                b_z = clean(tl.load(p_draft + o_row + b_token, mask=inside, other=-INFINITY))
                b_q = probabilities(b_z, b_top, b_mass)
            possible = (b_p > 0) & (b_q > 0)
            b_ratio = tl.where(possible, b_p / tl.where(possible, b_q, 1.0), 0.0)

            seed = setting(p_seeds, seed, i_b, seed_stride)
            offset = setting(p_offsets, offset, i_b, offset_stride)
            if RULE == "exact":
                b_accept = tl.minimum(b_ratio, 1.0)
                rejected = ~(uniform(seed, offset, i_b, (o_k << 8) | ACCEPT) < b_accept)
                accepted = tl.min(tl.where(rejected | ~m_k, o_k, BLOCK_K), 0)
                b_prob = tl.where(o_k <= accepted, b_accept, 0.0)
                tl.store(p_prob + i_b * block + o_k, b_prob.to(tl.float32), mask=o_k < block)
                b_weight = tl.full([BLOCK_K], 1.0, tl.float64)
            else:
                weight = tl.full([], 1.0, tl.float64)
                b_weight = tl.where(o_k == 0, 1.0, 0.0).to(tl.float64)  # of the prefix of o_k tokens
                for k in range(length):
                    weight = tl.minimum(weight * tl.sum(tl.where(o_k == k, b_ratio, 0.0), 0), 1.0)
                    b_weight = tl.where(o_k == k + 1, weight, b_weight)
                # h <= w: a prefix whose uniform is w or more needs no residual
                b_u = uniform(seed, offset, i_b, (tl.maximum(o_k - 1, 0) << 8) | ACCEPT)
                can_pass = (o_k >= 1) & (o_k <= length) & (b_u < b_weight)
                accepted = tl.max(tl.where(can_pass, o_k, 0), 0)
                b_prob = tl.where(o_k == length, b_weight, 1.0)
                b_prob = tl.where((o_k <= accepted) & (accepted == length), b_prob, 0.0)
                tl.store(p_prob + i_b * block + o_k - 1, b_prob.to(tl.float32), mask=(o_k >= 1) & (o_k <= block))
                b_weight = tl.where(can_pass | (o_k == 0), b_weight, -1.0)
            tl.store(p_state + 4 * (block + 1) + o_k, b_weight, mask=o_k <= block)
            tl.store(p_pending + 2 * i_b, tl.where(accepted == length, -1, accepted))
            tl.store(p_pending + 2 * i_b + 1, -1)
            if accepted == length:
                following = tl.full([], -1, tl.int64)
                if BONUS:
                    p_row = p_target + row_offset(i_b * (block + 1) + length, inner, stride_outer, stride_inner, VEC)
                    p_record = p_records + (i_b * of_each + length).to(tl.int64) * tiles * 2
                    u = uniform(seed, offset, i_b, RESIDUAL)
                    following = draw_softmax(p_row, columns, p_record, tiles, u, TILE, RECORDS)
                tl.store(p_accepted + i_b, accepted.to(tl.int64))
                tl.store(p_next + i_b, following)


@triton.jit
def residual_tile(
    p_p, p_q, begin, columns, top_p, factor_p, top_q, factor_q, token, CERTAIN: tl.constexpr, TILE: tl.constexpr
):
    """Return max(0, w p - q) of a tile ``[TILE]``; a certain drafter's q is 1 at its token."""
    b_p = exponentials(load_tile(p_p, begin, columns, TILE), top_p) * factor_p
    if CERTAIN:
        return tl.where(begin + tl.arange(0, TILE) == token, 0.0, b_p)
    b_q = exponentials(load_tile(p_q, begin, columns, TILE), top_q) * factor_q
    return tl.where(b_p > b_q, b_p - b_q, 0.0)


@triton.jit
def factors(p_state, i_k, block, CERTAIN: tl.constexpr):
    """Return what turns exponentials into w p and q at a position: (top of p, factor, top of q, factor)."""
    p_own = p_state + i_k
    weight = tl.load(p_own + 4 * (block + 1))
    top_p, mass_p = tl.load(p_own), tl.load(p_own + block + 1)
    factor_p = tl.where(top_p > -INFINITY, weight / mass_p, 0.0)
    top_q, factor_q = top_p, factor_p
    if not CERTAIN:
        top_q, mass_q = tl.load(p_own + 2 * (block + 1)), tl.load(p_own + 3 * (block + 1))
        factor_q = tl.where(top_q > -INFINITY, 1.0 / mass_q, 0.0)
        top_q = tl.where(top_q > -INFINITY, top_q, 0.0)  # a given logsumexp may be NaN
    return top_p.to(tl.float32), factor_p.to(tl.float32), top_q.to(tl.float32), factor_q.to(tl.float32)


@triton.jit
def residual_masses(p_residuals, i_k, tiles, RESIDUALS: tl.constexpr):
    """Return the residual mass of each tile of a position, float64 ``[RESIDUALS]``."""
    o_t = tl.arange(0, RESIDUALS)
    p_mass = p_residuals + i_k.to(tl.int64) * tiles + o_t
    return tl.load(p_mass, mask=o_t < tiles, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit(do_not_specialize=["batch", "block", "token_row_stride", "token_stride"])
def residual_kernel(
    p_target,
    inner,
    stride_outer,
    stride_inner,
    p_draft,
    draft_inner,
    draft_stride_outer,
    draft_stride_inner,
    columns,
    batch,
    block,
    p_tokens,
    token_row_stride,
    token_stride,
    seed: tl.int64,
    p_seeds,
    seed_stride,
    offset: tl.int64,
    p_offsets,
    offset_stride,
    p_accepted,
    p_next,
    p_prob,
    p_counters,
    p_state,
    p_pending,
    p_records,
    p_residuals,
    of_each,
    record_tiles,
    tiles,
    splits,
    FIRST: tl.constexpr,
    RULE: tl.constexpr,
    VEC: tl.constexpr,
    DRAFT_VEC: tl.constexpr,
    RECORD_TILE: tl.constexpr,
    RECORDS: tl.constexpr,
    TILE: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CERTAIN: tl.constexpr = p_draft is None
    i_program, i_split = tl.program_id(0) // splits, tl.program_id(0) % splits
    i_step, i_b = i_program // batch, i_program % batch
    pending = tl.load(p_pending + 2 * i_b)
    if pending < 0:
        return
    # The prefix in question: the longest that can pass, or those shorter than that from the right.
    i_k = pending
    if not FIRST:
        i_k = block - 2 - i_step
    p_state += i_b.to(tl.int64) * 5 * (block + 1)
    p_residuals += i_b.to(tl.int64) * block * tiles
    p_tokens += i_b.to(tl.int64) * token_row_stride
    weight = tl.load(p_state + 4 * (block + 1) + i_k)
    seed = setting(p_seeds, seed, i_b, seed_stride)
    offset = setting(p_offsets, offset, i_b, offset_stride)

    here = i_split == 0  # who passes the word of this prefix on
    accepted = tl.full([], -1, tl.int32)
    if (FIRST or i_k < pending) & (weight >= 0):
        p_p = p_target + row_offset(i_b * (block + 1) + i_k, inner, stride_outer, stride_inner, VEC)
        p_q = p_p
        if not CERTAIN:
            p_q = p_draft + row_offset(
                i_b * block + i_k, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_VEC
            )
        token = tl.load(p_tokens + i_k.to(tl.int64) * token_stride)
        top_p, factor_p, top_q, factor_q = factors(p_state, i_k, block, CERTAIN)
        first = i_split
        if not FIRST:  # a longer prefix that has passed in the meantime leaves nothing to ask here
            best = tl.load(p_pending + 2 * i_b + 1, cache_modifier=".cg")
            first = tl.where(best > i_k, tiles, i_split)
        for i_tile in range(first, tiles, splits):
            b_r = residual_tile(
                p_p, p_q, i_tile * TILE, columns, top_p, factor_p, top_q, factor_q, token, CERTAIN, TILE
            )
            tl.store(p_residuals + i_k.to(tl.int64) * tiles + i_tile, tl.sum(b_r, 0))
        here = arrives_last(p_counters, i_program, splits)
        if here:
            if RULE == "exact" or i_k == 0:
                accepted = i_k
            else:
                b_mass = residual_masses(p_residuals, i_k, tiles, RESIDUALS)
                total = tl.sum(b_mass, 0)
                rest = total + 1.0 - weight
                h = tl.where(rest > 0, total / tl.where(rest > 0, rest, 1.0), 1.0)
                tl.store(p_prob + i_b * block + i_k - 1, h.to(tl.float32))
                if uniform(seed, offset, i_b, ((i_k - 1) << 8) | ACCEPT) < h:
                    accepted = i_k
    if not FIRST:
        if accepted >= 0:
            tl.atomic_max(p_pending + 2 * i_b + 1, accepted)
        accepted = tl.full([], -1, tl.int32)
        if here:
            if arrives_last(p_counters + batch * (block - 1), i_b, block - 1):
                accepted = tl.load(p_pending + 2 * i_b + 1, cache_modifier=".cg")

    if accepted >= 0:
        u = uniform(seed, offset, i_b, RESIDUAL)
        b_mass = residual_masses(p_residuals, accepted, tiles, RESIDUALS)
        i_p = i_b * (block + 1) + accepted
        p_p = p_target + row_offset(i_p, inner, stride_outer, stride_inner, VEC)
        total = tl.sum(b_mass, 0)
        if total > 0:
            p_q = p_p
            if not CERTAIN:
                p_q = p_draft + row_offset(
                    i_b * block + accepted, draft_inner, draft_stride_outer, draft_stride_inner, DRAFT_VEC
                )
            token = tl.load(p_tokens + accepted.to(tl.int64) * token_stride)
            top_p, factor_p, top_q, factor_q = factors(p_state, accepted, block, CERTAIN)
            i_tile, before = draw_index(b_mass, u * total, RESIDUALS)
            b_r = residual_tile(
                p_p, p_q, i_tile * TILE, columns, top_p, factor_p, top_q, factor_q, token, CERTAIN, TILE
            )
            following = (i_tile * TILE + draw_column(b_r, u * total - before, TILE)).to(tl.int64)
        else:
            # p = q leaves no residual; only rounding can have rejected, and p is then the law to draw from.
            p_record = p_records + (i_b * of_each + accepted).to(tl.int64) * record_tiles * 2
            following = draw_softmax(p_p, columns, p_record, record_tiles, u, RECORD_TILE, RECORDS)
        tl.store(p_accepted + i_b, accepted.to(tl.int64))
        tl.store(p_next + i_b, following)
        tl.store(p_pending + 2 * i_b, -1)
        if RULE == "block":
            o_k = tl.arange(0, BLOCK_K)
            tl.store(p_prob + i_b * block + o_k, 1.0, mask=o_k + 1 < accepted)


def accept_block(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    draft_lengths: Tensor | None,
    limit: float,
    limits: Tensor | None,
    slack: float,
    slacks: Tensor | None,
    draft_logsumexp: Tensor | None,
    bonus: bool,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Run the kernels: `ugsd_fast.ops.accept_block` with its arguments checked and split."""
    batch, block = draft_tokens.shape
    if out is None:
        counts = draft_tokens.new_empty((2, batch), dtype=torch.int64)
        out = counts[0], counts[1], target_logits.new_empty((batch, block), dtype=torch.float32)
    if batch == 0:
        return out
    device = target_logits.device
    target = describe(target_logits)
    columns, block_k = target.columns, triton.next_power_of_2(block + 1)
    blocks = draft_tokens, *draft_tokens.stride(), *flat(draft_lengths)
    sampling = rule in ("exact", "block")
    of_each = block + 1 + (block if sampling and draft_logits is not None and draft_logsumexp is None else 0)
    rows = batch * of_each
    launch = plan_of(target, rows)
    if not sampling:
        counters, (verdicts, records) = _scratch(device, rows + batch, rows, 5 * rows * launch.tiles)
        prefix_kernel[launch.grid](
            target.tensor,
            *target.address,
            columns,
            block,
            *blocks,
            float(limit),
            *flat(limits),
            float(slack),
            *flat(slacks),
            *out,
            counters,
            verdicts.view(torch.int32),
            records,
            rows,
            launch.tiles,
            launch.splits,
            RULE=rule,
            BONUS=bonus,
            VEC=target.vec,
            TILE=launch.tile,
            RECORDS=launch.records,
            BLOCK_K=block_k,
            num_warps=launch.warps,
        )
        return out

    again = plan_of(target, batch)
    counters, (state, pending, records, residuals) = _scratch(
        device,
        max(rows + batch, batch * block),
        2 * FIELDS * batch * (block + 1),
        2 * batch,
        2 * rows * launch.tiles,
        batch * block * again.tiles,
    )
    state, pending = state.view(torch.float64), pending.view(torch.int32)
    verifier = target.tensor, *target.address
    drafter: tuple[object, ...] = None, 1, 0, 0
    draft_vec = 1
    if draft_logits is not None:
        draft = describe(draft_logits)
        drafter, draft_vec = (draft.tensor, *draft.address), draft.vec
    carried = (None, 0, 0) if draft_logsumexp is None else (draft_logsumexp, *draft_logsumexp.stride())
    draws = seed, *flat(seeds), offset, *flat(offsets)
    weights_kernel[launch.grid](
        *verifier,
        *drafter,
        *carried,
        columns,
        block,
        *blocks,
        *draws,
        *out,
        counters,
        state,
        pending,
        records,
        rows,
        launch.tiles,
        launch.splits,
        RULE=rule,
        BONUS=bonus,
        VEC=target.vec,
        DRAFT_VEC=draft_vec,
        TILE=launch.tile,
        RECORDS=launch.records,
        BLOCK_K=block_k,
        num_warps=launch.warps,
        **registers(96),
    )
    for first in (True, False)[: min(block, 2 if rule == "block" else 1)]:
        residual_kernel[again.grid if first else (again.grid[0] * (block - 1),)](
            *verifier,
            *drafter,
            columns,
            batch,
            block,
            *blocks[:3],
            *draws,
            *out,
            counters,
            state,
            pending,
            records,
            residuals,
            of_each,
            launch.tiles,
            again.tiles,
            again.splits,
            FIRST=first,
            RULE=rule,
            VEC=target.vec,
            DRAFT_VEC=draft_vec,
            RECORD_TILE=launch.tile,
            RECORDS=launch.records,
            TILE=again.tile,
            RESIDUALS=again.records,
            BLOCK_K=block_k,
            num_warps=again.warps,
            **registers(96),
        )
    return out


def _scratch(device: torch.device, counters: int, *floats: int) -> tuple[Tensor, list[Tensor]]:
    """Return zeroed counters and stretches of float32, each aligned to 256 bytes, as `scratch` keeps them."""
    sizes = [-(-size // 64) * 64 for size in floats]
    zeros, room = scratch(device, counters, sum(sizes))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return zeros, [room[end - size : end] for end, size in zip(ends, sizes)]
