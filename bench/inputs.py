"""Inputs that benchmarks share: the op specs' logits, and drafted blocks with a known verdict."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ugsd_fast.reference.spec import LOGITS, Case, make_logits

__all__ = ["DTYPES", "LOGITS", "Block", "drafted_block", "logits"]

DTYPES = (torch.float32, torch.bfloat16)


def logits(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Make logits ``[..., V]`` of a kind in `LOGITS`; `ugsd_fast.reference.spec` says what they are like."""
    *rows, vocabulary = shape
    return make_logits(Case(vocabulary=vocabulary, dtype=dtype, logits=kind, seed=seed), *rows)


class Block(NamedTuple):
    """One drafted block of K tokens and the logits behind it.

    Attributes
    ----------
    tokens
        ``[1, K]`` int64.
    draft, target
        ``[1, K, V]`` and ``[1, K + 1, V]`` logits.
    logsumexp
        ``[1, K]`` float32, of the draft rows.
    """

    tokens: Tensor
    draft: Tensor
    target: Tensor
    logsumexp: Tensor


def drafted_block(kind: str, block: int, vocabulary: int, dtype: torch.dtype, accepted: int, seed: int) -> Block:
    """Make a block of which the rules ``exact`` and ``block`` keep exactly ``accepted`` tokens.

    The verifier agrees with the drafter's whole distribution, but at position ``accepted`` it gives the drafted
    token next to no probability.
    """
    draft = logits(kind, (1, block, vocabulary), dtype, seed)
    bonus = logits(kind, (1, 1, vocabulary), dtype, seed + 1)
    target = torch.cat([draft, bonus], dim=1)
    probabilities = torch.softmax(draft.float(), -1)[0]
    tokens = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).T.contiguous()
    if accepted < block:
        target[0, accepted, tokens[0, accepted]] -= 40
    return Block(tokens, draft, target, torch.logsumexp(draft.float(), -1))
