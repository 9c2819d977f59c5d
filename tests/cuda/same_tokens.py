"""Draws 10,000 tokens on the C++ backend and on the emulated CUDA kernels: ``python -m tests.cuda.same_tokens``."""

from __future__ import annotations

import torch

from tests.cuda import emulated  # noqa: F401
from tests.ops import cases
from ugsd_fast import ops

ROWS, ALLOWED = 10_000, 10


def main() -> None:
    logits = cases.random_logits(ROWS, 97)
    draft = cases.random_logits(ROWS // 4, 4, 97, seed=1)
    target = draft.new_empty(ROWS // 4, 5, 97).copy_(cases.random_logits(ROWS // 4, 5, 97, seed=2))
    target[:, :4] = 0.5 * target[:, :4] + draft
    drawn: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("cpp", "cuda"):
        with ops.use_backend(name):
            tokens = ops.sample(draft.view(ROWS, 97), seed=5).tokens.view(-1, 4)
            drawn[name] = {"sample": ops.sample(logits, seed=3, offset=9).tokens}
            for rule in ("exact", "block"):
                verdict = ops.accept_block(tokens, target, draft, rule=rule, seed=4)
                drawn[name][f"{rule}: accepted"] = verdict.num_accepted
                drawn[name][f"{rule}: next token"] = verdict.next_token
    for what, expected in drawn["cpp"].items():
        different = int((expected != drawn["cuda"][what]).sum())
        print(f"{what}: {different} of {len(expected)} differ", flush=True)
        assert different <= ALLOWED


if __name__ == "__main__":
    main()
