"""Oracle of ``accept_block``: six acceptance rules, one correction or bonus token.

Positions count from 0 here: ``p[:, i]`` and ``q[:, i]`` are the distributions of draft token ``i``,
and ``p[:, length]`` that of the bonus token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ugsd_fast.reference.logprob_rank import logprob_rank
from ugsd_fast.reference.philox import Stream, uniform
from ugsd_fast.reference.sample import inverse_cdf
from ugsd_fast.reference.token_stats import clean, per_row, token_stats

RULES = ("greedy", "rank", "exact", "block", "typical", "relaxed")


class Acceptance(NamedTuple):
    """The verdict on one drafted block a sequence.

    Attributes
    ----------
    num_accepted
        Draft tokens kept, from the left (int64).
    next_token
        The correction at the first rejection, or the bonus token when all were kept (int64); -1 where there is none.
    accept_prob
        Probability with which each position was accepted: 0 or 1 for the rules that draw nothing. ``exact``:
        ``min(1, p/q)`` up to the first rejection, 0 after it. ``block``: 1 before the last accepted position,
        ``h_i`` there, and behind it ``h_i`` where ``u_i < w_i`` and 0 where not: ``h_i <= w_i``, so that such a
        position is rejected without its residual.
    """

    num_accepted: Tensor
    next_token: Tensor
    accept_prob: Tensor


def accept_block(
    draft_tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None = None,
    rule: str = "greedy",
    draft_lengths: Tensor | None = None,
    limits: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    draft_logsumexp: Tensor | None = None,
    bonus: bool = True,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    uniforms: Tensor | None = None,
) -> Acceptance:
    """Accept a prefix of ``draft_tokens[B, K]`` by the rule and choose the token after it.

    ``limits`` are the rule's own numbers: (rank, -) for rank, (epsilon, delta) for typical, (top_n, delta) for
    relaxed. ``uniforms[B, K + 1]`` replaces the Philox draws: K for acceptance, one for the next token. Without
    ``draft_logits`` the drafter is taken to be certain of its tokens.
    """
    batch, block = draft_tokens.shape
    device = target_logits.device
    if draft_lengths is None:
        draft_lengths = torch.full((batch,), block, device=device)
    lengths = draft_lengths.long().clamp(0, block)
    if uniforms is None:
        rows = torch.arange(batch, device=device)
        streams = [Stream.ACCEPT.at(i) for i in range(block)] + [int(Stream.RESIDUAL)]
        uniforms = torch.stack([uniform(seed, offset, rows, stream) for stream in streams], dim=-1)
    if rule in ("exact", "block"):
        num_accepted, next_token, accept_prob = _speculative(
            draft_tokens, target_logits, draft_logits, draft_logsumexp, lengths, uniforms, rule
        )
    else:
        passed = _passes(draft_tokens, target_logits[:, :block], rule, limits)
        passed &= torch.arange(block, device=device) < lengths.unsqueeze(-1)
        accept_prob = passed.cumprod(-1).double()  # [B, K], 1 up to the first rejection
        num_accepted = passed.cumprod(-1).sum(-1)
        next_token = token_stats(_row(target_logits, num_accepted)).argmax
    if not bonus:
        next_token = torch.where(num_accepted == lengths, -1, next_token)
    return Acceptance(num_accepted, next_token, accept_prob)


def _row(logits: Tensor, position: Tensor) -> Tensor:
    """Return ``logits[b, position[b]]`` for every sequence: ``[B, V]``."""
    return logits.gather(1, position[:, None, None].expand(-1, 1, logits.shape[-1])).squeeze(1)


def _passes(tokens: Tensor, logits: Tensor, rule: str, limits: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """Return whether each draft token passes a rule that draws nothing: bool ``[B, K]``."""
    stats = token_stats(logits)
    logprob, rank = logprob_rank(logits, tokens)
    possible = (tokens >= 0) & (tokens < logits.shape[-1]) & (logprob > -torch.inf)
    limit, slack = (per_row(value, tokens) for value in limits)  # [B, 1]
    if rule == "greedy":
        return possible & (tokens == stats.argmax)
    if rule == "rank":
        return possible & (rank <= limit)
    if rule == "typical":
        return possible & (logprob.exp() > torch.minimum(limit, slack * torch.exp(-stats.entropy)))
    best = (stats.max_logit - stats.logsumexp).exp()
    return possible & (rank <= limit) & (logprob.exp() >= best - slack)


def _speculative(
    tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_logsumexp: Tensor | None,
    lengths: Tensor,
    uniforms: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the rules that keep the verifier's distribution (``exact``, ``block``)."""
    batch, block = tokens.shape
    vocabulary = target_logits.shape[-1]
    drafted = torch.arange(block, device=tokens.device) < lengths.unsqueeze(-1)  # [B, K]
    inside = (tokens >= 0) & (tokens < vocabulary) & drafted
    token = tokens.long().clamp(0, vocabulary - 1).unsqueeze(-1)  # [B, K, 1]

    p = _probabilities(target_logits, None)  # [B, K + 1, V]
    if draft_logits is None:
        q = torch.zeros_like(p[:, :block]).scatter(-1, token, inside.unsqueeze(-1).double())
    else:
        q = _probabilities(draft_logits, draft_logsumexp)
    # A bonus position has no draft distribution: with q = 0 its residual is p itself.
    q = torch.where(drafted.unsqueeze(-1), q, 0.0)
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    p_x = p[:, :block].gather(-1, token).squeeze(-1)  # [B, K]
    q_x = q[:, :block].gather(-1, token).squeeze(-1)
    ratio = torch.where(inside & (q_x > 0) & (p_x > 0), p_x / q_x, 0.0)

    if rule == "exact":
        accept = ratio.clamp(max=1.0)
        reached = (uniforms[:, :block] < accept).cumprod(-1)  # [B, K]: accepted, and all before it
        before = torch.cat([reached.new_ones(batch, 1), reached[:, :-1]], dim=-1) if block else reached
        num_accepted = reached.sum(-1)
        accept_prob = torch.where(before > 0, accept, 0.0)
        weight = p.new_ones(batch)
    else:
        weights = [p.new_ones(batch)]  # w_0 .. w_K
        for i in range(block):
            weights.append((weights[-1] * ratio[:, i]).clamp(max=1.0))
        w = torch.stack(weights, dim=-1)  # [B, K + 1]
        # h[:, i] decides whether the first i tokens are kept; after the last drafted one it is w itself.
        residual = (w.unsqueeze(-1) * p - q).clamp(min=0).sum(-1)  # S_0 .. S_K
        h = torch.where(residual + 1 - w > 0, residual / (residual + 1 - w), 1.0)
        prefix = torch.arange(block + 1, device=tokens.device)
        h = torch.where(prefix == lengths.unsqueeze(-1), w, h)
        success = (uniforms[:, :block] < h[:, 1:]) & (prefix[1:] <= lengths.unsqueeze(-1))
        num_accepted = (success * prefix[1:]).amax(-1) if block else torch.zeros_like(lengths)
        in_question = torch.where(uniforms[:, :block] < w[:, 1:], h[:, 1:], 0.0)
        accept_prob = torch.where(prefix[1:] < num_accepted.unsqueeze(-1), 1.0, in_question)
        accept_prob = torch.where(prefix[1:] <= lengths.unsqueeze(-1), accept_prob, 0.0)
        weight = w.gather(-1, num_accepted.unsqueeze(-1)).squeeze(-1)

    p_next = _row(p, num_accepted)
    weight = torch.where(num_accepted == lengths, 1.0, weight)
    mass = (weight.unsqueeze(-1) * p_next - _row(q, num_accepted)).clamp(min=0)
    # p = q leaves no residual; only rounding can have rejected, and p is then the law to draw from.
    mass = torch.where(mass.sum(-1, keepdim=True) > 0, mass, p_next)
    return num_accepted, inverse_cdf(mass, uniforms[:, block]), accept_prob


def _probabilities(logits: Tensor, logsumexp: Tensor | None) -> Tensor:
    """Return ``softmax(logits)`` in float64; all zero for a row with no token left."""
    z = clean(logits)
    if logsumexp is None:
        logsumexp = token_stats(logits).logsumexp
    return (z - logsumexp.double().clamp(min=torch.finfo(torch.float64).min).unsqueeze(-1)).exp()
