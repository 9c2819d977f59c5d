"""Top-k, top-p and min-p as one threshold on the logit, for `filter_logits` and `sample`: what is under it goes.

No sort, and few columns read twice. The pass that reads the row keeps the maximum of each group of 128 columns. The
k-th largest of those is a bound under which no survivor of top-k lies; columns under (1 - p) / V of the mass cannot,
all together, hold what top-p cuts. Only groups that reach the bound are read again. They are searched by bisection of
the bit patterns, which order like the numbers: while more columns are in question than a tile holds, one pass over the
groups halves the interval; the last one writes the columns in question side by side, and the rest happens in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import FIELDS, INFINITY, LARGEST, Plan, Rows, clean, exponents, flat, registers, scratch

GROUP = 128


@triton.jit
def key_of(z):
    """Return the int32 that orders as the float32 does."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """Return the float32 of `key_of`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def middle(low, high):
    """Return the integer halfway, rounded down, with no overflow: ``low`` where nothing lies between."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def bisect(b_z, b_weight, above, target, low, high):
    """Return the key, from ``low`` on and under ``high``, of the lowest of the largest logits that weigh ``target``.

    ``above`` is the weight at or over ``high``, which falls short; that of ``low`` is known to suffice. Both ends close
    on logits that are there: as many steps as a search among those takes, not one a bit.
    """
    while middle(low, high) > low:
        mid = middle(low, high)
        m_upper = b_z >= value_of(mid)
        enough = above + tl.sum(tl.where(m_upper, b_weight, 0.0), 0).to(tl.float64) >= target
        # The smallest at or over the middle, negative, or the largest under it.
        nearest = tl.max(tl.where(m_upper == enough, tl.where(enough, -b_z, b_z), -INFINITY), 0)
        low = tl.where(enough, tl.minimum(key_of(-nearest), high - 1), low)
        high = tl.where(enough, high, key_of(nearest) + 1)
    return low


@triton.jit
def store_group_maxima(p_work, b_z, i_tile, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Write the maxima of a tile's groups to the row's workspace ``[GROUPS maxima, GROUPS numbers, TILE values]``."""
    b_max = tl.max(tl.reshape(b_z, (TILE // GROUP, GROUP)), 1)
    tl.store(p_work + i_tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP), b_max)


@triton.jit
def load_group_maxima(p_work, tiles, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Return the maxima of all groups of a row, ``[GROUPS]``."""
    o_g = tl.arange(0, GROUPS)
    return tl.load(p_work + o_g, mask=o_g < tiles * (TILE // GROUP), other=-INFINITY, cache_modifier=".cg")


@triton.jit
def list_groups(p_work, tiles, bound, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Write the numbers of the groups that reach ``bound`` side by side, and return how many they are."""
    p_numbers = (p_work + GROUPS).to(tl.pointer_type(tl.int32), bitcast=True)
    m_in = load_group_maxima(p_work, tiles, TILE, GROUP, GROUPS) >= bound
    tl.debug_barrier()  # the list before this one has been read
    tl.store(p_numbers + tl.cumsum(m_in.to(tl.int32), 0) - 1, tl.arange(0, GROUPS), mask=m_in)
    tl.debug_barrier()
    return tl.sum(m_in.to(tl.int32), 0)


@triton.jit
def load_groups(p_row, p_work, first, listed, columns, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Return the logits ``[TILE]`` of the listed groups from ``first`` on, -inf past the last."""
    p_numbers = (p_work + GROUPS).to(tl.pointer_type(tl.int32), bitcast=True)
    o_g = first + tl.arange(0, TILE // GROUP)
    b_number = tl.load(p_numbers + o_g, mask=o_g < listed, other=0)
    o_v = b_number[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_z = tl.load(p_row + o_v, mask=(o_g < listed)[:, None] & (o_v < columns), other=-INFINITY)
    return clean(tl.reshape(b_z, (TILE,)))


@triton.jit
def weights(b_z, top, octaves, MASS: tl.constexpr):
    """Return what each column counts: its mass relative to ``top``, or one."""
    return tl.exp2(exponents(b_z, top, octaves)) if MASS else tl.where(b_z > -INFINITY, 1.0, 0.0)


@triton.jit
def select(
    p_row,
    p_work,
    listed,
    columns,
    top,
    octaves,
    target,
    lowest,
    MASS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the lowest of the largest logits that together weigh ``target``, none of which is under ``lowest``."""
    p_values = p_work + 2 * GROUPS
    low, high = key_of(lowest), key_of(top) + 1
    above = tl.full((), 0.0, tl.float64)
    found = tl.full((), 0, tl.int32)
    searching = True
    while searching:
        mid = middle(low, high)
        found = tl.full((), 0, tl.int32)
        weight = above * 0.0
        for first in range(0, listed, TILE // GROUP):
            b_z = load_groups(p_row, p_work, first, listed, columns, TILE, GROUP, GROUPS)
            m_in = (b_z >= value_of(low)) & (b_z < value_of(high))
            m_upper = (b_z >= value_of(mid)) & (b_z < value_of(high))
            weight += tl.sum(tl.where(m_upper, weights(b_z, top, octaves, MASS), 0.0), 0).to(tl.float64)
            place = found + tl.cumsum(m_in.to(tl.int32), 0) - 1
            tl.store(p_values + place, b_z, mask=m_in & (place < TILE))
            found += tl.sum(m_in.to(tl.int32), 0)
        searching = (found > TILE) & (mid > low)
        if searching:
            enough = above + weight >= target
            low = tl.where(enough, mid, low)
            high = tl.where(enough, high, mid)
            above = tl.where(enough, above, above + weight)
            tl.debug_barrier()
    tl.debug_barrier()
    o_i = tl.arange(0, TILE)
    b_z = tl.load(p_values + o_i, mask=o_i < found, other=-INFINITY)
    return value_of(bisect(b_z, weights(b_z, top, octaves, MASS), above, target, low, high))


@triton.jit
def sum_groups(
    p_row,
    p_work,
    listed,
    columns,
    threshold,
    top,
    octaves,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Return the masses, float64 ``[RECORDS]``, of the columns at or over ``threshold`` by tile of listed groups."""
    o_t = tl.arange(0, RECORDS)
    b_mass = tl.zeros((RECORDS,), tl.float64)
    for i_tile in range(tl.cdiv(listed, TILE // GROUP)):
        b_z = load_groups(p_row, p_work, i_tile * (TILE // GROUP), listed, columns, TILE, GROUP, GROUPS)
        b_e = tl.where(b_z >= threshold, tl.exp2(exponents(b_z, top, octaves)), 0.0)
        b_mass = tl.where(o_t == i_tile, tl.sum(b_e, 0).to(tl.float64), b_mass)
    return b_mass


@triton.jit
def filter_threshold(
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
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Return the lowest logit that stays in a row with a finite one; -inf where the filters cut nothing."""
    GROUPS: tl.constexpr = RECORDS * (TILE // GROUP)
    threshold = tl.full((), -INFINITY, tl.float32)
    total = 1.0 + others
    if MIN_P:
        if min_p > 0:
            bound = top.to(tl.float64) + tl.log(tl.minimum(min_p, 1.0).to(tl.float64)) / scale
            threshold = bound.to(tl.float32)
            threshold = tl.where(threshold.to(tl.float64) < bound, value_of(key_of(threshold) + 1), threshold)
    lowest = threshold  # of top-p's columns: what is under min-p's bound decides nothing
    if TOP_K:
        if (top_k > 0) & (top_k < columns):
            k = top_k.to(tl.float64)
            b_max = load_group_maxima(p_work, tiles, TILE, GROUP, GROUPS)
            b_one = tl.where(b_max > -INFINITY, 1.0, 0.0)
            bound = value_of(bisect(b_max, b_one, 0.0, k, key_of(tl.full((), -LARGEST, tl.float32)), key_of(top) + 1))
            listed = list_groups(p_work, tiles, bound, TILE, GROUP, GROUPS)
            kth = select(p_row, p_work, listed, columns, top, octaves, k, bound, False, TILE, GROUP, GROUPS)
            lowest = tl.maximum(lowest, kth)
            if TOP_P:
                if top_p < 1:
                    listed = list_groups(p_work, tiles, kth, TILE, GROUP, GROUPS)
                    b_mass = sum_groups(p_row, p_work, listed, columns, kth, top, octaves, TILE, GROUP, GROUPS, RECORDS)
                    total = tl.sum(b_mass, 0)
    threshold = lowest
    if TOP_P:
        if top_p < 1:
            p = top_p.to(tl.float64)
            share = 0.99 * (1.0 - p) * total / columns  # a digit is left for rounding
            bound = tl.minimum(top.to(tl.float64), tl.maximum(top.to(tl.float64) + tl.log(share) / scale, -LARGEST))
            lowest = tl.maximum(lowest, bound.to(tl.float32))
            listed = list_groups(p_work, tiles, lowest, TILE, GROUP, GROUPS)
            nucleus = select(p_row, p_work, listed, columns, top, octaves, p * total, lowest, True, TILE, GROUP, GROUPS)
            threshold = tl.maximum(threshold, nucleus)
    return threshold


class Filters(NamedTuple):
    """Which filters may cut in a launch: those with a tensor, and numbers that do."""

    top_k: bool
    top_p: bool
    min_p: bool

    def group(self, launch: Plan) -> int:
        """Return the columns of a group."""
        return min(GROUP, launch.tile)

    def workspace(self, launch: Plan) -> int:
        """Return the floats of a row's workspace: maxima and numbers of its groups, and the columns in question."""
        return 2 * launch.records * (launch.tile // self.group(launch)) + launch.tile if any(self) else 0

    def scratch(self, rows: Rows, launch: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Return counters, records and workspaces for one launch."""
        records = rows.count * FIELDS.value * launch.tiles
        counters, floats = scratch(rows.tensor.device, rows.count, records + rows.count * self.workspace(launch))
        return counters, floats, floats[records:]

    def options(self, launch: Plan) -> dict[str, int | bool]:
        """Return the launch's constants and options."""
        constants = {
            "TILE": launch.tile,
            "RECORDS": launch.records,
            "TOP_K": self.top_k,
            "TOP_P": self.top_p,
            "MIN_P": self.min_p,
            "GROUP": self.group(launch),
            "WORKSPACE": self.workspace(launch),
        }
        return constants | launch.options | (registers(168) if any(self) else {})


def filters_of(columns: int, settings: tuple[Any, ...]) -> Filters:
    """Return the filters among ``(temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps)``."""
    _, _, top_k, top_ks, top_p, top_ps, min_p, min_ps = settings
    return Filters(
        top_ks is not None or 0 < top_k < columns, top_ps is not None or top_p < 1, min_ps is not None or min_p > 0
    )


def with_strides(settings: tuple[Any, ...]) -> list[Any]:
    """Return pairs of a number and a tensor a row as kernels take them: number, tensor, stride."""
    return [x for number, rows in zip(settings[::2], settings[1::2]) for x in (number, *flat(rows))]
