"""GPU kernels of FlashInfer and vLLM for what our ops do, where these packages are installed.

Both take probabilities: the softmax that makes them of the logits is part of the call, as it is in their engines.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Call = Callable[[], object]
PACKAGES = ("flashinfer", "vllm")


def missing() -> dict[str, str]:
    """Return why each package that is not measured is not."""
    return {name: "not installed" for name in PACKAGES if importlib.util.find_spec(name) is None}


def peers(op: str, arguments: dict[str, Any]) -> dict[str, Call]:
    """Return the peers' calls on an op's arguments, by the name that reports print."""
    found: dict[str, Call] = {}
    absent = missing()
    if "flashinfer" not in absent:
        if op == "sample":
            found["flashinfer"] = lambda: _flashinfer_sample(arguments)
        elif op == "accept_block" and arguments["rule"] == "exact":
            found["flashinfer softmax + chain_speculative_sampling"] = lambda: _flashinfer_chain(arguments)
    if "vllm" not in absent and op == "accept_block" and arguments["rule"] == "exact":
        found["vllm softmax + rejection_sample"] = _vllm_chain(arguments)
    return found


def _flashinfer_sample(arguments: dict[str, Any]) -> object:
    from flashinfer import sampling

    logits = arguments["logits"].float()
    if "top_k" not in arguments and "top_p" not in arguments:
        return sampling.sampling_from_logits(logits)
    top_k = arguments.get("top_k", logits.shape[-1])
    return sampling.top_k_top_p_sampling_from_logits(logits, top_k, arguments.get("top_p", 1.0))


def _flashinfer_chain(arguments: dict[str, Any]) -> object:
    from flashinfer import sampling

    draft, target = (
        torch.softmax(arguments[name], -1, dtype=torch.float32) for name in ("draft_logits", "target_logits")
    )
    return sampling.chain_speculative_sampling(draft, arguments["draft_tokens"].int(), target)


def _vllm_chain(arguments: dict[str, Any]) -> Call:
    """Return vLLM's rejection sampling: the bonus token is drawn outside, by its exponential race."""
    tokens, target, draft = (arguments[name] for name in ("draft_tokens", "target_logits", "draft_logits"))
    batch, block = tokens.shape
    device = target.device
    ends = torch.arange(1, batch + 1, dtype=torch.int32, device=device) * block
    settings = SimpleNamespace(
        all_greedy=False, all_random=True, temperature=torch.ones(batch, device=device), generators={}
    )
    flat_tokens = tokens.int().flatten()

    def call() -> object:
        from vllm.v1.sample.rejection_sampler import rejection_sample

        p = torch.softmax(target, -1, dtype=torch.float32)
        q = torch.softmax(draft, -1, dtype=torch.float32)
        bonus = (p[:, -1] / torch.empty_like(p[:, -1]).exponential_()).argmax(-1, keepdim=True).int()
        verified = p[:, :-1].flatten(0, 1).contiguous()
        counts = [block] * batch
        return rejection_sample(flat_tokens, counts, block, ends, q.flatten(0, 1), verified, bonus, settings)

    return call
