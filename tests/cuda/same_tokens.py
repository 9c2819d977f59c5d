"""Draws 10,000 tokens of each kind on the C++ backend and on the emulated CUDA kernels.

``python -m tests.cuda.same_tokens``. Rows of several pieces, all dtypes by turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.cuda import emulated  # noqa: F401
from tests.ops import cases
from ugsd_fast import ops

DRAWS, ALLOWED = 10_000, 10
BATCH, BLOCK, VOCABULARY = 500, 4, 2100
FILTERS = ({"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01})


def blocks(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """A batch of drafter's rows and verifier's, alike enough for some tokens to stand."""
    draft = cases.random_logits(BATCH, BLOCK, VOCABULARY, seed=seed)
    target = cases.random_logits(BATCH, BLOCK + 1, VOCABULARY, seed=seed + 1)
    target[:, :BLOCK] = 0.5 * target[:, :BLOCK] + draft
    return draft.to(dtype), target.to(dtype)


def drawn(step: int) -> dict[str, Tensor]:
    """What one backend draws, by kind."""
    dtype = list(cases.DTYPES.values())[step % 3]
    draft, target = blocks(dtype, 2 * step)
    found = {}
    tokens = ops.sample(draft, seed=step, offset=9).tokens
    found["sample"] = tokens
    found["filtered sample"] = ops.sample(draft, seed=step, temperature=0.8, **FILTERS[step % len(FILTERS)]).tokens
    for rule in ("exact", "block"):
        verdict = ops.accept_block(tokens, target, draft, rule=rule, seed=step)
        found[f"{rule}: accepted"], found[f"{rule}: next token"] = verdict.num_accepted, verdict.next_token
    return found


def main() -> None:
    total: dict[str, int] = {}
    different: dict[str, int] = {}
    for step in range(DRAWS // (BATCH * BLOCK)):
        with ops.use_backend("cpp"):
            expected = drawn(step)
        with ops.use_backend("cuda"):
            got = drawn(step)
        for what, tokens in expected.items():
            total[what] = total.get(what, 0) + tokens.numel()
            different[what] = different.get(what, 0) + int((tokens != got[what]).sum())
    for what, count in total.items():
        print(f"{what}: {different[what]} of {count} differ", flush=True)
        assert different[what] <= count * ALLOWED / DRAWS


if __name__ == "__main__":
    main()
