"""Top-k, top-p and min-p as one threshold on the logit, for `filter_logits` and `sample`: what is under it goes.

No sort, and few columns read twice. The pass that reads the row keeps the maximum of each group of 32 or more columns.
The k-th largest of those is a bound under which no survivor of top-k lies; columns under (1 - p) / V of the mass
cannot, all together, hold what top-p cuts. Only groups that reach the bound are read again, once: the columns in them
that reach it, the *candidates*, are written side by side, and where they fit a tile, as they do but in flat rows, the
rest happens in registers. It is a bisection of the bit patterns, which order like the numbers. In flat rows each pass
over the groups halves the interval until no more columns are in question than a tile holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ugsd_fast.kernels.rows import (
    CHUNK,
    FIELDS,
    INFINITY,
    LARGEST,
    Plan,
    Rows,
    clean,
    draw_column,
    draw_index,
    exponents,
    flat,
    packed,
    registers,
    scratch,
)

MOST_GROUPS = 2048


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
def weight_of(b_z, m, top, octaves, by_mass):
    """Return what the columns in a mask weigh, a float64: their mass relative to ``top``, or their number."""
    b_weight = tl.where(by_mass, tl.exp2(exponents(b_z, top, octaves)), 1.0)
    return tl.sum(tl.where(m, b_weight, 0.0), 0).to(tl.float64)


@triton.jit
def bisect(b_z, top, octaves, above, target, low, high, by_mass):
    """Return the key, from ``low`` on and under ``high``, of the lowest of the largest logits that weigh ``target``.

    ``above`` is the weight at or over ``high``, which falls short; that of ``low`` is known to suffice. Both ends close
    on logits that are there: as many steps as a search among those takes, not one a bit.
    """
    while middle(low, high) > low:
        mid = middle(low, high)
        m_upper = b_z >= value_of(mid)
        enough = above + weight_of(b_z, m_upper, top, octaves, by_mass) >= target
        # The smallest at or over the middle, negative, or the largest under it.
        nearest = tl.max(tl.where(m_upper == enough, tl.where(enough, -b_z, b_z), -INFINITY), 0)
        low = tl.where(enough, tl.minimum(key_of(-nearest), high - 1), low)
        high = tl.where(enough, high, key_of(nearest) + 1)
    return low


# A row's workspace: TILE candidates of 8 bytes, then its groups' maxima, and the numbers of those listed.


@triton.jit
def maxima_of(p_work, p_row, TILE: tl.constexpr):
    """Return where a workspace has the maxima ``[GROUPS]``, of the logits' type."""
    return (p_work + 2 * TILE).to(tl.pointer_type(p_row.dtype.element_ty), bitcast=True)


@triton.jit
def numbers_of(p_work, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Return where a workspace has the numbers ``[GROUPS]``."""
    return (p_work + 2 * TILE + GROUPS).to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def store_group_maxima(p_work, p_row, b_z, i_tile, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Write the maxima of a tile's groups to the row's workspace."""
    b_max = tl.max(tl.reshape(b_z, (TILE // GROUP, GROUP)), 1)
    p_max = maxima_of(p_work, p_row, TILE) + i_tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    tl.store(p_max, packed(b_max, p_row))


@triton.jit
def list_groups(p_work, b_max, bound, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Write the numbers of the groups that reach ``bound`` side by side, and return how many they are."""
    m_in = b_max >= bound
    o_g = tl.arange(0, GROUPS)
    p_number = numbers_of(p_work, TILE, GROUPS) + tl.cumsum(m_in.to(tl.int32), 0) - 1
    tl.store(p_number, o_g.to(tl.int16), mask=m_in)
    tl.debug_barrier()
    return tl.sum(m_in.to(tl.int32), 0)


@triton.jit
def load_groups(p_row, p_work, first, listed, columns, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Return the logits ``[TILE]`` of the listed groups from ``first`` on, -inf past the last."""
    o_g = first + tl.arange(0, TILE // GROUP)
    b_number = tl.load(numbers_of(p_work, TILE, GROUPS) + o_g, mask=o_g < listed, other=0).to(tl.int32)
    o_v = b_number[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_z = tl.load(p_row + o_v, mask=(o_g < listed)[:, None] & (o_v < columns), other=-INFINITY)
    return clean(tl.reshape(b_z, (TILE,)))


@triton.jit
def columns_at(p_work, o_place, m, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Return the columns at places among the columns of the groups listed."""
    b_number = tl.load(numbers_of(p_work, TILE, GROUPS) + o_place // GROUP, mask=m).to(tl.int32)
    return b_number * GROUP + o_place % GROUP


@triton.jit
def bits_of(b_z, p_row):
    """Return the bits of logits in their own type, as int64."""
    if p_row.dtype.element_ty.primitive_bitwidth == 16:
        return packed(b_z, p_row).to(tl.uint16, bitcast=True).to(tl.int64)
    else:
        return packed(b_z, p_row).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def gather(
    p_row, p_work, listed, columns, low, high, TILE: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    """Write the first TILE columns of the listed groups from ``low`` on and up to ``high``; return how many there are.

    A candidate is its logit and its place among the columns of the groups listed.
    """
    p_candidate = p_work.to(tl.pointer_type(tl.int64), bitcast=True)
    found = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # what was there has been read
    for first in range(0, listed, TILE // GROUP):
        b_z = load_groups(p_row, p_work, first, listed, columns, TILE, GROUP, GROUPS)
        m_in = (b_z >= low) & (b_z <= high)
        o_i = found + tl.cumsum(m_in.to(tl.int32), 0) - 1
        b_place = (first * GROUP + tl.arange(0, TILE)).to(tl.int64)
        tl.store(p_candidate + o_i, (b_place << 32) | bits_of(b_z, p_row), mask=m_in & (o_i < TILE))
        found += tl.sum(m_in.to(tl.int32), 0)
    tl.debug_barrier()
    return found


@triton.jit
def load_candidates(p_row, p_work, found, TILE: tl.constexpr):
    """Return the candidates' logits ``[TILE]``, -inf past the last."""
    o_i = tl.arange(0, TILE)
    p_z = p_work.to(tl.pointer_type(p_row.dtype.element_ty), bitcast=True)
    step: tl.constexpr = 64 // p_row.dtype.element_ty.primitive_bitwidth
    return clean(tl.load(p_z + step * o_i, mask=o_i < found, other=-INFINITY))


@triton.jit
def load_places(p_work, o_i, m):
    """Return the candidates' places among the columns of the groups listed."""
    return tl.load(p_work.to(tl.pointer_type(tl.int32), bitcast=True) + 2 * o_i + 1, mask=m)


@triton.jit
def narrow(
    p_row,
    p_work,
    listed,
    question,
    columns,
    top,
    octaves,
    target,
    low,
    high,
    by_mass,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return (low, high, above) between which no more than TILE columns are in question, of ``question`` at first."""
    above = tl.full((), 0.0, tl.float64)
    while (question > TILE) & (middle(low, high) > low):
        mid = middle(low, high)
        weight, upper = above * 0.0, question * 0
        for first in range(0, listed, TILE // GROUP):
            b_z = load_groups(p_row, p_work, first, listed, columns, TILE, GROUP, GROUPS)
            m_upper = (b_z >= value_of(mid)) & (b_z < value_of(high))
            weight += weight_of(b_z, m_upper, top, octaves, by_mass)
            upper += tl.sum(m_upper.to(tl.int32), 0)
        enough = above + weight >= target
        question = tl.where(enough, upper, question - upper)
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid)
        above = tl.where(enough, above, above + weight)
    return low, high, above


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
        b_mass = tl.where(o_t == i_tile, weight_of(b_z, b_z >= threshold, top, octaves, True), b_mass)
    return b_mass


@triton.jit
def mass_over(
    p_row,
    p_work,
    listed,
    found,
    columns,
    threshold,
    top,
    octaves,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return the mass, a float64, of the candidates at or over ``threshold``."""
    mass = tl.full((), 0.0, tl.float64)
    for first in range(0, listed if found > TILE else 1, TILE // GROUP):
        if found <= TILE:
            b_z = load_candidates(p_row, p_work, found, TILE)
        else:
            b_z = load_groups(p_row, p_work, first, listed, columns, TILE, GROUP, GROUPS)
        mass += weight_of(b_z, b_z >= threshold, top, octaves, True)
    return mass


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
    """Return (threshold, listed, found) of a row with a finite logit, which some filter may cut.

    The lowest logit that stays; the groups listed, among which are all that reach it; and the candidates, all those
    that reach it among them, of which the workspace holds every one if there are no more than TILE.
    """
    GROUPS: tl.constexpr = RECORDS * (TILE // GROUP)
    total = 1.0 + others
    threshold = tl.full((), -LARGEST, tl.float32)
    if MIN_P:
        if min_p > 0:
            bound = top.to(tl.float64) + tl.log(tl.minimum(min_p, 1.0).to(tl.float64)) / scale
            threshold = bound.to(tl.float32)
            threshold = tl.where(threshold.to(tl.float64) < bound, value_of(key_of(threshold) + 1), threshold)
            threshold = tl.maximum(threshold, -LARGEST)
    cuts_k, cuts_p = top_k < 0, top_k < 0
    if TOP_K:
        cuts_k = (top_k > 0) & (top_k < columns)
    if TOP_P:
        cuts_p = top_p < 1

    # The bound of the candidates: what is under the threshold of min-p decides nothing, but for the mass of top-k.
    lowest = threshold
    if TOP_P:
        if cuts_p and not cuts_k:
            share = 0.99 * (1.0 - top_p.to(tl.float64)) * total / columns  # a digit is left for rounding
            bound = tl.maximum(top.to(tl.float64) + tl.log(share) / scale, -LARGEST)
            lowest = tl.maximum(lowest, tl.minimum(top.to(tl.float64), bound).to(tl.float32))
    o_g = tl.arange(0, GROUPS)
    m_g = o_g < tiles * (TILE // GROUP)
    b_max = clean(tl.load(maxima_of(p_work, p_row, TILE) + o_g, mask=m_g, other=-INFINITY, cache_modifier=".cg"))
    if TOP_K:
        if cuts_k:
            low, high = key_of(tl.full((), -LARGEST, tl.float32)), key_of(top) + 1
            bound = value_of(bisect(b_max, top, octaves, 0.0, top_k.to(tl.float64), low, high, False))
            lowest = bound if cuts_p else tl.maximum(lowest, bound)
    listed = list_groups(p_work, b_max, lowest, TILE, GROUPS)
    # All candidates first, then those in question for top-k, and for top-p of the mass that top-k leaves.
    found = tl.full((), 0, tl.int32)
    for stage in range(0, 3 if TOP_P else 2 if TOP_K else 1):
        by_mass = stage == 2
        if (stage == 0) | (cuts_p if by_mass else cuts_k):
            target = tl.where(by_mass, top_p.to(tl.float64) * total, top_k.to(tl.float64))
            low, high, above = narrow(
                p_row,
                p_work,
                listed,
                found,
                columns,
                top,
                octaves,
                target,
                key_of(lowest),
                key_of(top) + 1,
                by_mass,
                TILE,
                GROUP,
                GROUPS,
            )
            question = found
            if (stage == 0) | (found > TILE):
                question = gather(
                    p_row, p_work, listed, columns, value_of(low), value_of(high - 1), TILE, GROUP, GROUPS
                )
            if stage == 0:
                found = question
            else:
                b_z = load_candidates(p_row, p_work, question, TILE)
                lowest = value_of(bisect(b_z, top, octaves, above, target, low, high, by_mass))
                threshold = tl.maximum(threshold, lowest)
                if TOP_K and TOP_P:
                    if cuts_p and not by_mass:
                        total = mass_over(
                            p_row, p_work, listed, found, columns, lowest, top, octaves, TILE, GROUP, GROUPS
                        )
    return threshold, listed, found


@triton.jit
def draw_filtered(
    p_row,
    p_work,
    columns,
    threshold,
    listed,
    found,
    top,
    octaves,
    u,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    RECORDS: tl.constexpr,
):
    """Return the column of the draw ``u`` among those at or over ``threshold``, and their mass in units of ``top``."""
    GROUPS: tl.constexpr = RECORDS * (TILE // GROUP)
    begin = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    total = before
    if found <= TILE:
        b_z = load_candidates(p_row, p_work, found, TILE)
    else:
        b_mass = sum_groups(p_row, p_work, listed, columns, threshold, top, octaves, TILE, GROUP, GROUPS, RECORDS)
        total = tl.sum(b_mass, 0)
        i_tile, before = draw_index(b_mass, u * total, RECORDS)
        begin = i_tile * TILE
        b_z = load_groups(p_row, p_work, begin // GROUP, listed, columns, TILE, GROUP, GROUPS)
    b_e = tl.where(b_z >= threshold, tl.exp2(exponents(b_z, top, octaves)), 0.0)
    if found <= TILE:
        total = tl.sum(tl.sum(tl.reshape(b_e, (TILE // CHUNK, CHUNK)), 1).to(tl.float64), 0)
    place = begin + draw_column(b_e, u * total - before, TILE)
    if found <= TILE:
        place = load_places(p_work, place, None)
    column = columns_at(p_work, place, None, TILE, GROUP, GROUPS)
    return column, total


class Filters(NamedTuple):
    """Which filters may cut in a launch: those with a tensor, and numbers that do."""

    top_k: bool
    top_p: bool
    min_p: bool

    def group(self, launch: Plan) -> int:
        """Return the columns of a group: about √(2 V / k) for the usual k, where maxima and candidates weigh alike."""
        columns = launch.records * launch.tile
        return min(max(32, columns // MOST_GROUPS), launch.tile)

    def workspace(self, launch: Plan) -> int:
        """Return the floats of a row's workspace: candidates, maxima and numbers of its groups."""
        groups = launch.records * (launch.tile // self.group(launch))
        return 2 * (launch.tile + groups) if any(self) else 0

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
        return constants | launch.options | (registers(128) if any(self) else {})


def filters_of(columns: int, settings: tuple[Any, ...]) -> Filters:
    """Return the filters among ``(temperature, temperatures, top_k, top_ks, top_p, top_ps, min_p, min_ps)``."""
    _, _, top_k, top_ks, top_p, top_ps, min_p, min_ps = settings
    return Filters(
        top_ks is not None or 0 < top_k < columns, top_ps is not None or top_p < 1, min_ps is not None or min_p > 0
    )


def with_strides(settings: tuple[Any, ...]) -> list[Any]:
    """Return pairs of a number and a tensor a row as kernels take them: number, tensor, stride."""
    return [x for number, rows in zip(settings[::2], settings[1::2]) for x in (number, *flat(rows))]
