"""Float64 oracles of every op, in plain torch, written to be read beside the maths they implement.

Each module computes one op the obvious way: whole rows, no blocking, no streaming. Results are
float64 (token ids int64); as the ``reference`` backend they are rounded to the op's dtypes.
Every function takes numbers or tensors for temperatures, thresholds, seeds and offsets, and none
reads a value back to the host.
"""

from ugsd_fast.reference.accept_block import Acceptance, accept_block
from ugsd_fast.reference.filter_logits import filter_logits
from ugsd_fast.reference.gate_block import gate_block
from ugsd_fast.reference.kv_compact import kv_compact
from ugsd_fast.reference.lm_head_stats import lm_head_stats
from ugsd_fast.reference.logprob_rank import logprob_rank
from ugsd_fast.reference.philox import Stream, philox4x32, uniform
from ugsd_fast.reference.sample import Sample, inverse_cdf, sample
from ugsd_fast.reference.token_stats import TokenStats, token_stats

__all__ = [
    "Acceptance",
    "Sample",
    "Stream",
    "TokenStats",
    "accept_block",
    "filter_logits",
    "gate_block",
    "inverse_cdf",
    "kv_compact",
    "lm_head_stats",
    "logprob_rank",
    "philox4x32",
    "sample",
    "token_stats",
    "uniform",
]
