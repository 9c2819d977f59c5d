"""``accept_block``: how much of a drafted block the verifier keeps, and the token that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from ugsd_fast import reference
from ugsd_fast.ops.backend import extension, register, run
from ugsd_fast.ops.checks import (
    check_device,
    check_integers,
    check_logits,
    check_option,
    check_out,
    check_shape,
    number_or_rows,
    word_or_rows,
)
from ugsd_fast.reference import Acceptance
from ugsd_fast.reference.accept_block import RULES

LOSSLESS_RULES = frozenset({"greedy", "exact", "block"})


def accept_block(
    draft_tokens: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None = None,
    *,
    rule: str = "greedy",
    draft_lengths: Tensor | None = None,
    rank: int | Tensor = 20,
    epsilon: float | Tensor = 0.09,
    delta: float | Tensor = 0.3,
    top_n: int | Tensor = 10,
    relax_delta: float | Tensor = 0.6,
    draft_logsumexp: Tensor | None = None,
    bonus: bool = True,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    out: Acceptance | tuple[Tensor, Tensor, Tensor] | None = None,
) -> Acceptance:
    """Keep a prefix of a drafted block and choose the token after it.

    Both logits are those of the distributions that were, or would be, sampled: after temperature and filters
    (`filter_logits`). Write p for the verifier's distribution at a position, q for the drafter's, x for the
    drafted token.

    ===========  ==================================================  ==============================  ========
    rule         keeps x                                             next token                      lossless
    ===========  ==================================================  ==============================  ========
    ``greedy``   x is p's argmax                                     argmax p                        yes
    ``rank``     x ranks in p's first ``rank`` (2603.11397)          argmax p                        no
    ``exact``    u < p(x)/q(x) (2211.17192, 2302.01318)              from max(0, p - q), or p        yes
    ``block``    jointly, scanned from the right (2403.10444)        from max(0, w p - q), or p      yes
    ``typical``  p(x) > min(epsilon, delta exp(-H(p))) (2401.10774)  argmax p                        no
    ``relaxed``  x in p's ``top_n``, p(x) >= max p - relax_delta     argmax p                        no
    ===========  ==================================================  ==============================  ========

    Parameters
    ----------
    draft_tokens
        ``[B, K]`` int64 or int32. Ids outside ``[0, V)`` are rejected, and so is a token with q(x) = 0.
    target_logits
        ``[B, K + 1, V]``: the verifier's logits at each drafted position and at the one after.
    draft_logits
        ``[B, K, V]``, for ``exact`` and ``block`` only. None: the drafter was certain of its tokens (greedy
        drafting, lookup).
    rule
        See the table. `LOSSLESS_RULES` names those that keep the verifier's output.
    draft_lengths
        ``[B]`` int64 or int32: how many tokens of each block were drafted; all K if None.
    rank, epsilon, delta, top_n, relax_delta
        The rules' numbers, or tensors that broadcast to ``[B]``.
    draft_logsumexp
        ``[B, K]`` float32, logsumexp of the rows of ``draft_logits``, if at hand: draft rows are then read only
        where a residual is drawn.
    bonus
        Whether a fully accepted block is followed by one more token of the verifier's.
    seed, offset
        Any integer, or an integer tensor that broadcasts to ``[B]``; disjoint from the draws of `sample`.
    out
        Where to write: an `Acceptance`, or its three tensors in order, contiguous and on the inputs' device. It must
        not overlap an input. No tensor is made then, but where a setting is a tensor of another dtype or layout.

    Returns
    -------
    Acceptance
        ``num_accepted`` ``[B]`` int64; ``next_token`` ``[B]`` int64, -1 where there is none; ``accept_prob``
        ``[B, K]`` float32.

    Raises
    ------
    ValueError
        If a dtype, shape, stride, device or setting does not fit.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> target = torch.tensor([[[0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [5.0, 0.0, 0.0]]])
    >>> verdict = ops.accept_block(torch.tensor([[1, 0]]), target)
    >>> verdict.num_accepted.tolist(), verdict.next_token.tolist()
    ([1], [2])
    """
    check_option("accept_block", "rule", rule, RULES)
    check_integers("accept_block", "draft_tokens", draft_tokens)
    if draft_tokens.dim() != 2:
        raise ValueError(
            f"accept_block: draft_tokens has shape {tuple(draft_tokens.shape)}, expected 2 dimensions [B, K]"
        )
    check_logits("accept_block", "target_logits", target_logits, dim=3)
    batch, block = draft_tokens.shape
    vocabulary = target_logits.shape[-1]
    why = f"K+1 rows for K={block} draft tokens"
    check_shape("accept_block", "target_logits", target_logits, (batch, block + 1, vocabulary), why)
    check_device("accept_block", "draft_tokens", draft_tokens, "target_logits", target_logits)
    if draft_logits is not None:
        check_logits("accept_block", "draft_logits", draft_logits, dim=3)
        why = "K rows over the verifier's vocabulary"
        check_shape("accept_block", "draft_logits", draft_logits, (batch, block, vocabulary), why)
        check_device("accept_block", "draft_logits", draft_logits, "target_logits", target_logits)
        if draft_logsumexp is not None:
            check_shape("accept_block", "draft_logsumexp", draft_logsumexp, (batch, block), "one number a draft row")
            check_device("accept_block", "draft_logsumexp", draft_logsumexp, "target_logits", target_logits)
    elif draft_logsumexp is not None:
        raise ValueError("accept_block: draft_logsumexp was given without draft_logits, expected both or neither")
    if draft_lengths is not None:
        check_integers("accept_block", "draft_lengths", draft_lengths)
        check_shape("accept_block", "draft_lengths", draft_lengths, (batch,), "one length a block")
        check_device("accept_block", "draft_lengths", draft_lengths, "target_logits", target_logits)

    limit: float | Tensor = 0.0
    slack: float | Tensor = 0.0
    if rule == "rank":
        limit = rank
    elif rule == "typical":
        limit, slack = epsilon, delta
    elif rule == "relaxed":
        limit, slack = top_n, relax_delta
    limit, limits = number_or_rows(
        "accept_block", f"the limit of {rule}", limit, draft_tokens, low=0, dtype=torch.float64
    )
    slack, slacks = number_or_rows(
        "accept_block", f"the slack of {rule}", slack, draft_tokens, low=0, dtype=torch.float64
    )
    seed, seeds = word_or_rows("accept_block", "seed", seed, draft_tokens)
    offset, offsets = word_or_rows("accept_block", "offset", offset, draft_tokens)
    checked = None
    if out is not None:
        each, shape = draft_tokens.shape[:1], draft_tokens.shape
        expected = [("num_accepted", torch.int64, each), ("next_token", torch.int64, each)]
        checked = check_out("accept_block", out, [*expected, ("accept_prob", torch.float32, shape)], draft_tokens)
    verdict = run(
        "accept_block",
        _op,
        target_logits,
        draft_tokens,
        draft_logits if rule in ("exact", "block") else None,
        rule,
        draft_lengths,
        limit,
        limits,
        slack,
        slacks,
        draft_logsumexp,
        bonus,
        seed,
        seeds,
        offset,
        offsets,
        out=checked,
    )
    return Acceptance._make(verdict)


def _fake(target_logits: Tensor, draft_tokens: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    batch = draft_tokens.shape[:1]
    return (
        target_logits.new_empty(batch, dtype=torch.int64),
        target_logits.new_empty(batch, dtype=torch.int64),
        target_logits.new_empty(draft_tokens.shape, dtype=torch.float32),
    )


def _reference(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    draft_lengths: Tensor | None,
    limit: float,
    limits: Tensor | None,
    slack: float,
    slacks: Tensor | None,
    draft_logsumexp: Tensor | None,
    bonus: bool,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_accepted, next_token, accept_prob = reference.accept_block(
        draft_tokens,
        target_logits,
        draft_logits,
        rule,
        draft_lengths,
        (limit if limits is None else limits, slack if slacks is None else slacks),
        draft_logsumexp,
        bonus,
        seed if seeds is None else seeds,
        offset if offsets is None else offsets,
    )
    return num_accepted, next_token, accept_prob.float()


def _cpp(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    draft_lengths: Tensor | None,
    limit: float,
    limits: Tensor | None,
    slack: float,
    slacks: Tensor | None,
    draft_logsumexp: Tensor | None,
    bonus: bool,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
    uniforms: Tensor | None = None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return extension.accept_block(
        target_logits,
        draft_logits,
        draft_tokens,
        RULES.index(rule),
        draft_lengths,
        limit,
        limits,
        slack,
        slacks,
        draft_logsumexp,
        bonus,
        seed,
        seeds,
        offset,
        offsets,
        uniforms,
        torch.get_num_threads(),
        out,
    )


_op = register(
    "accept_block",
    "(Tensor target_logits, Tensor draft_tokens, Tensor? draft_logits, str rule, Tensor? draft_lengths, "
    "float limit, Tensor? limits, float slack, Tensor? slacks, Tensor? draft_logsumexp, bool bonus, "
    "SymInt seed, Tensor? seeds, SymInt offset, Tensor? offsets) -> (Tensor, Tensor, Tensor)",
    _fake,
    reference=_reference,
    cpp=_cpp,
)
