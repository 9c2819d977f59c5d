"""Oracle of ``sample``: one Philox uniform and an inverse CDF in column order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ugsd_fast.reference.filter_logits import filter_logits
from ugsd_fast.reference.philox import Stream, uniform
from ugsd_fast.reference.token_stats import TokenStats, per_row, token_stats

BLOCK = 4096
"""Columns whose mass is kept as one number: a draw finds its block first, then its column inside it."""


class Sample(NamedTuple):
    """One drawn token a row.

    Attributes
    ----------
    tokens
        Token ids (int64); -1 for a row with no token left.
    logprob
        ``log q(token)`` under the distribution it was drawn from, so after temperature and filters;
        at temperature 0, under the untempered softmax.
    stats
        `TokenStats` of the tempered logits before the filters: the uncertainty of the model.
    """

    tokens: Tensor
    logprob: Tensor
    stats: TokenStats


def inverse_cdf(mass: Tensor, u: Tensor) -> Tensor:
    """Return the first column whose running mass exceeds ``u * total``, for ``mass[..., V]`` and ``u[...]``.

    The sum runs over blocks of `BLOCK` columns first, then inside the chosen block: the same column as
    one long running sum, from two short ones. A column without mass is never chosen; a row without
    mass gives -1.
    """
    blocks = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block_mass = blocks.sum(-1)  # [..., V / BLOCK]
    running = block_mass.cumsum(-1)
    target = u * running[..., -1]
    block = torch.minimum((running <= target.unsqueeze(-1)).sum(-1), _last_positive(block_mass))
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0.0)
    columns = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, BLOCK)).squeeze(-2)
    inside = (columns.cumsum(-1) <= (target - before).unsqueeze(-1)).sum(-1)
    token = block * BLOCK + torch.minimum(inside, _last_positive(columns))
    return torch.where(running[..., -1] > 0, token, -1)


def _last_positive(mass: Tensor) -> Tensor:
    """Return the last column with mass (0 if there is none): where a draw lands that rounding pushed past the end."""
    columns = torch.arange(mass.shape[-1], device=mass.device)
    return torch.where(mass > 0, columns, 0).amax(-1)


def sample(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
) -> Sample:
    """Draw one token a row from ``softmax(filter_logits(logits))``."""
    stats = token_stats(logits, temperature)
    s = filter_logits(logits, temperature, top_k, top_p, min_p)
    rows = torch.arange(stats.argmax.numel(), device=logits.device).view(stats.argmax.shape)
    mass = (s - s.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)).exp()
    tokens = inverse_cdf(mass, uniform(seed, offset, rows, Stream.DRAFT))
    greedy = per_row(temperature, logits).squeeze(-1) <= 0
    tokens = torch.where(greedy, stats.argmax, tokens)
    logprob = s.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1) - s.logsumexp(-1)
    logprob = torch.where(greedy, stats.max_logit - stats.logsumexp, logprob)
    return Sample(tokens, torch.where(tokens < 0, -torch.inf, logprob), stats)
