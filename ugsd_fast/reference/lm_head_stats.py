"""Oracle of ``lm_head_stats``: `token_stats` of the logits that a language-model head would give."""

from __future__ import annotations

from torch import Tensor

from ugsd_fast.reference.token_stats import TokenStats, token_stats


def lm_head_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float | Tensor = 1.0
) -> TokenStats:
    """Compute `token_stats` of ``hidden[..., D] @ weight[V, D].T + bias[V]``, products and sums in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return token_stats(logits, temperature)
