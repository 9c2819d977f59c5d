"""Fused decoding ops: statistics, sampling, acceptance and cache compaction over rows of logits.

Every op is registered with ``torch.library`` as ``ugsd_fast::<name>``, traces under ``torch.compile``, never
reads a value back to the host, and takes temperatures, thresholds, seeds and offsets as numbers or as tensors.
"""

from ugsd_fast.ops.accept_block import LOSSLESS_RULES, Acceptance, accept_block
from ugsd_fast.ops.backend import BackendError, Backends, backends, isa, use_backend
from ugsd_fast.ops.filter_logits import filter_logits
from ugsd_fast.ops.gate_block import gate_block
from ugsd_fast.ops.kv_compact import kv_compact
from ugsd_fast.ops.lm_head_stats import lm_head_stats
from ugsd_fast.ops.logprob_rank import logprob_rank
from ugsd_fast.ops.sample import Sample, sample
from ugsd_fast.ops.token_stats import TokenStats, token_stats

__all__ = [
    "LOSSLESS_RULES",
    "Acceptance",
    "BackendError",
    "Backends",
    "Sample",
    "TokenStats",
    "accept_block",
    "backends",
    "filter_logits",
    "gate_block",
    "isa",
    "kv_compact",
    "lm_head_stats",
    "logprob_rank",
    "sample",
    "token_stats",
    "use_backend",
]
