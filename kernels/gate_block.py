"""``gate_block``: the uncertainty of drafted blocks and whether each is sent to the verifier, in one launch.

Reads the drafted positions of ``entropy[B, K]`` once: 4 bytes a position, 5 bytes written a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B = 32
BLOCK_K = 8


@triton.jit(
    do_not_specialize=["batch", "block", "row_stride", "column_stride", "length_stride", "threshold_stride"],
    do_not_specialize_on_alignment=["p_entropy", "p_lengths", "p_thresholds", "p_uncertainty", "p_escalate"],
)
def _gate_block_kernel(
    p_entropy,
    p_lengths,
    threshold,
    p_thresholds,
    p_uncertainty,
    p_escalate,
    batch,
    block,
    row_stride,
    column_stride,
    length_stride,
    threshold_stride,
    REDUCE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    m_b = o_b < batch
    length = tl.full([BLOCK_B], 0, tl.int64) + block
    if p_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(p_lengths + o_b * length_stride, m_b, 0).to(tl.int64), 0), length)
    if REDUCE == "first":
        length = tl.minimum(length, 1)

    largest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.full([BLOCK_B], 0, tl.float64)
    nans = tl.full([BLOCK_B], 0, tl.int32)
    for k in range(0, block, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m = m_b[:, None] & (o_k[None, :] < length[:, None])  # [BLOCK_B, BLOCK_K]
        entropy = tl.load(p_entropy + o_b[:, None] * row_stride + o_k[None, :] * column_stride, m, 0.0)
        # A maximum may drop a NaN, which must escalate.
        nan = m & (entropy != entropy)
        nans += tl.sum(nan.to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(m & ~nan, entropy, float("-inf")), 1))
        total += tl.sum(entropy.to(tl.float64), 1)

    value = largest.to(tl.float64)
    if REDUCE == "mean":
        value = total / tl.maximum(length, 1).to(tl.float64)
    value = tl.where(nans > 0, float("nan"), tl.where(length > 0, value, 0.0))
    limit = tl.full([BLOCK_B], 0.0, tl.float32) + threshold
    if p_thresholds is not None:
        limit = tl.load(p_thresholds + o_b * threshold_stride, m_b, 0.0)
    tl.store(p_uncertainty + o_b, value.to(tl.float32), m_b)
    tl.store(p_escalate + o_b, (~(value <= limit.to(tl.float64))).to(tl.int8), m_b)


def gate_block(
    entropy: Tensor,
    lengths: Tensor | None,
    threshold: float,
    thresholds: Tensor | None,
    reduce: str,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Run ``ugsd_fast::gate_block``."""
    batch, block = entropy.shape
    if out is None:
        out = entropy.new_empty(batch), entropy.new_empty(batch, dtype=torch.bool)
    uncertainty, escalate = out
    if batch:
        with torch.cuda.device_of(entropy):
            _gate_block_kernel[(triton.cdiv(batch, BLOCK_B),)](
                entropy,
                lengths,
                float(threshold),
                thresholds,
                uncertainty,
                escalate.view(torch.int8),
                batch,
                block,
                entropy.stride(0),
                entropy.stride(1),
                0 if lengths is None else lengths.stride(0),
                0 if thresholds is None else thresholds.stride(0),
                REDUCE=reduce,
                BLOCK_B=BLOCK_B,
                BLOCK_K=BLOCK_K,
                num_warps=1,
            )
    return out
