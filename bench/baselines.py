"""What transformers does to sample: its own logits warpers, then softmax and multinomial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

# Settings of `sample` and `filter_logits` that are measured, by the name that reports print.
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


def warpers(filters: dict[str, Any]) -> LogitsProcessorList:
    """Return transformers' warpers for the filters, in the order in which ``generate`` applies them."""
    chain = LogitsProcessorList()
    if "top_k" in filters:
        chain.append(TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        chain.append(TopPLogitsWarper(filters["top_p"]))
    return chain


def warp(chain: LogitsProcessorList, logits: Tensor) -> Tensor:
    """Return warped float32 logits: ``generate`` converts them first, too."""
    return chain(torch.LongTensor(), logits.float())


def warp_and_sample(chain: LogitsProcessorList, logits: Tensor) -> Tensor:
    """Return one token a row, as ``generate(do_sample=True)`` draws it."""
    return torch.multinomial(torch.softmax(warp(chain, logits), -1), num_samples=1).squeeze(1)
