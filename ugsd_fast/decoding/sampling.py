"""The distribution that tokens are drawn from, and the draw, which notes its entropy."""

from __future__ import annotations

from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.config import UGSDConfig

# Rules whose acceptance needs the distribution that the draft was sampled from.
RULES_WITH_DRAFT_LOGITS = frozenset({"exact", "block"})


def draw(z: Tensor, config: UGSDConfig, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row of the logits `z` [B, V], and its entropy [B]; `offset` counts the draws."""
    if not config.temperature:
        stats = ops.token_stats(z)
        return stats.argmax, stats.entropy
    drawn = ops.sample(
        z,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=config.seed,
        offset=offset,
    )
    return drawn.tokens, drawn.stats.entropy


def filter_logits(logits: Tensor, config: UGSDConfig) -> Tensor:
    """Logits of the distribution that `config` samples from."""
    return ops.filter_logits(
        logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
    )
