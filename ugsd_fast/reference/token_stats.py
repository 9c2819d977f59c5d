"""Oracle of ``token_stats``: logsumexp, entropy, maximum, argmax and margin of every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What one pass over a row of logits tells; every field has the rows' shape.

    Attributes
    ----------
    logsumexp
        ``log sum exp(s)`` of the tempered logits ``s = logits / temperature``.
    entropy
        Entropy of ``softmax(s)`` in nats.
    max_logit
        Largest ``s``.
    argmax
        Lowest column that holds it (int64); -1 for a row with no token left.
    margin
        Largest minus second-largest ``s``: 0 on a tie, infinite when one token is left.
    """

    logsumexp: Tensor
    entropy: Tensor
    max_logit: Tensor
    argmax: Tensor
    margin: Tensor


def clean(logits: Tensor) -> Tensor:
    """Return ``logits`` in float64 with NaN masked (-inf) and +inf at float32's largest number."""
    return torch.nan_to_num(logits.double(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def per_row(value: float | Tensor, rows: Tensor) -> Tensor:
    """Return ``value``, a number or a tensor that broadcasts to the rows, as float64 of shape ``[..., 1]``."""
    value = torch.as_tensor(value, dtype=torch.float64, device=rows.device)
    return value.expand(rows.shape[:-1]).unsqueeze(-1)


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``logits / temperature`` in float64; temperature 0, the greedy limit, leaves them as they are."""
    temperature = per_row(temperature, logits)
    return clean(logits) / torch.where(temperature > 0, temperature, 1.0)


def token_stats(logits: Tensor, temperature: float | Tensor = 1.0) -> TokenStats:
    """Compute ``TokenStats`` of ``logits[..., V]``: L = m + log Σe^{s−m}, H = L − Σ p·s."""
    s = tempered(logits, temperature)
    m, argmax = s.max(dim=-1)
    empty = m == -torch.inf
    d = s - torch.where(empty, 0.0, m).unsqueeze(-1)  # [..., V], 0 at the maximum
    e = d.exp()
    others = e.scatter(-1, argmax.unsqueeze(-1), 0.0).sum(-1)  # Σe^{s−m} without the maximum's 1
    b = torch.where(e > 0, d * e, 0.0).sum(-1)
    # log1p keeps the entropy of a nearly certain row exact where log(1 + others) would round it away.
    entropy = torch.log1p(others) - b / (1.0 + others)
    second = s.scatter(-1, argmax.unsqueeze(-1), -torch.inf).amax(-1)
    return TokenStats(
        logsumexp=torch.where(empty, -torch.inf, m + torch.log1p(others)),
        entropy=torch.where(empty, 0.0, entropy),
        max_logit=m,
        argmax=torch.where(empty, -1, (s == m.unsqueeze(-1)).to(torch.uint8).argmax(-1)),
        margin=torch.where(empty, 0.0, m - second),
    )
