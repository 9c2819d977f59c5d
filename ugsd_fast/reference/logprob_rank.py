"""Oracle of ``logprob_rank``: log-probability and rank of one given token a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast.reference.token_stats import clean, per_row, token_stats


def logprob_rank(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor = 1.0, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``log p(x)`` and ``1 + #{v : z_v > z_x}``; a token outside ``[0, V)`` has -inf and ``V + 1``."""
    vocabulary = logits.shape[-1]
    z = clean(logits)
    if logsumexp is None:
        logsumexp = token_stats(logits, temperature).logsumexp
    inside = (tokens >= 0) & (tokens < vocabulary)
    z_x = z.gather(-1, tokens.long().clamp(0, vocabulary - 1).unsqueeze(-1))  # [..., 1]
    temperature = per_row(temperature, logits)
    s_x = (z_x / torch.where(temperature > 0, temperature, 1.0)).squeeze(-1)
    logprob = torch.where(inside & (s_x > -torch.inf), s_x - logsumexp.double(), -torch.inf)
    rank = torch.where(inside, 1 + (z > z_x).sum(-1), vocabulary + 1)
    return logprob, rank
