"""How fast devices and servers are: published or derived figures, and what transformers' dispatch takes here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.harness import Row

# Qwen3-Omni-30B-A3B's text model: 48 layers of 128 experts, 8 of them for a token, each three matrices 2048 × 768.
LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 48, 128, 8
EXPERT = 3 * 2048 * 768  # parameters
ACTIVE = 3.3e9  # parameters a token
FOUR_BITS = 4.5 / 8  # bytes a parameter, scales included


@dataclass(frozen=True)
class Pace:
    """How long a model's forwards take, in milliseconds.

    Parameters
    ----------
    step : float
        Of one token behind a prompt.
    more : float
        Of each further token in the same forward.
    prompt : float
        Of the prompt with its audio.
    source : str
        Where the figures come from.
    """

    step: float
    more: float
    prompt: float
    source: str

    def seconds(self, positions: int, *, first: bool) -> float:
        """Of a forward over `positions` tokens."""
        return (self.prompt if first else self.step + self.more * (positions - 1)) / 1e3


ORIN_NANO, ORIN, THOR = "Jetson Orin Nano Super", "Jetson AGX Orin", "Jetson AGX Thor"
IDLE, BUSY, TRANSFORMERS = "vLLM-Omni, 1 stream", "vLLM-Omni, 16 streams", "transformers"
DENSE = "dense 30B, A100"

# A step of a 3B drafter is bound by memory: its weights are read once, however many rows it has, and what a few rows
# compute hides behind that (8 × 2 × 3.1e9 operations: 7, 3 and 0.5 ms). Each further row reads the keys and values of
# 150 positions: 28 layers × 2 × 8 heads × 128 in float16, at 70% of 102, 205 and 273 GB/s. A prompt is bound by
# arithmetic: 100 positions × 2 × 3.1e9 at 40% of the dense float16 rate (17, 43 and 250 TFLOPS).
_KEYS_AND_VALUES = 150 * 28 * 2 * 8 * 128 * 2  # bytes
_EMBEDL = "embedl Edge-Inference-Benchmarks"
DEVICES = {
    name: Pace(1e3 / rate, _KEYS_AND_VALUES / (0.7 * bandwidth) * 1e3, prompt, source)
    for name, rate, bandwidth, prompt, source in (
        (ORIN_NANO, 43.07, 102e9, 91.0, "Llama 3.2 3B, INT4, MLC: 43.07 tokens/s (NVIDIA, Orin Nano Super)"),
        (ORIN, 61.21, 204.8e9, 36.0, f"Llama 3.2 3B, W4A16: 61.21 tokens/s ({_EMBEDL})"),
        (THOR, 73.59, 273e9, 14.0, f"Llama 3.2 3B, W4A16: 73.59 tokens/s ({_EMBEDL})"),
    )
}


def more_experts(tokens: int, bandwidth: float) -> float:
    """Milliseconds that the further experts of a forward over several tokens take to read in bfloat16."""
    touched = EXPERTS * (1 - (1 - EXPERTS_PER_TOKEN / EXPERTS) ** tokens)
    return (touched - EXPERTS_PER_TOKEN) * LAYERS * EXPERT * 2 / bandwidth * 1e3


_MORE = more_experts(6, 0.7 * 3.35e12) / 5  # an H100 at 70% of its memory's rate
_PER_OUTPUT_TOKEN = "mean time per output token of Qwen3-Omni-30B-A3B (vllm-project/vllm-omni#3695)"
SERVERS = {
    IDLE: Pace(12.99, _MORE, 40.0, f"{_PER_OUTPUT_TOKEN}, concurrency 1; experts of a block's tokens at 2.3 TB/s"),
    BUSY: Pace(31.14, _MORE, 93.0, f"{_PER_OUTPUT_TOKEN}, concurrency 16; experts of a block's tokens at 2.3 TB/s"),
    DENSE: Pace(
        61 / (0.7 * 2039) * 1e3,
        0.0,
        2 * 30.5e9 * 100 / 156e12 * 1e3,
        "61 GB in bfloat16 at 70% of 2039 GB/s; a prompt of 100 positions at half of 312 TFLOPS",
    ),
}


def strong_on_device() -> Pace:
    """The 30B on an Orin Nano: 6 of 8 GB hold what they can of its 4-bit weights, the rest is read at 3.5 GB/s."""
    experts = LAYERS * EXPERTS * EXPERT * FOUR_BITS
    per_token = LAYERS * EXPERTS_PER_TOKEN * EXPERT * FOUR_BITS
    others = (ACTIVE - LAYERS * EXPERTS_PER_TOKEN * EXPERT) * FOUR_BITS
    missed = 1 - (6e9 - others) / experts
    step = (missed * per_token / 3.5e9 + ACTIVE * FOUR_BITS / (0.7 * 102e9)) * 1e3
    source = (
        f"Qwen3-Omni-30B-A3B in 4.5 bits: {experts / 1e9:.1f} GB of experts, {100 * missed:.0f}% not in memory; "
        f"{per_token / 1e9:.2f} GB a token at 3.5 GB/s (PCIe 3 x4), active weights at 70% of 102 GB/s"
    )
    return Pace(step, step, missed * experts / 3.5e9 * 1e3, f"{source}; a prompt reads all experts")


def dispatch(rounds: int = 15, layers: int = LAYERS) -> Pace:
    """The 30B under transformers: its 48 layers with tiny matrices, so that only the calls are left, timed here.

    On a GPU the calls of an eager forward are issued by one CPU thread; what the GPU computes hides behind them.
    """
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
    )
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm").eval()
    cache = DynamicCache(config=config)
    taken: dict[int, list[float]] = {1: [], 6: [], 100: []}
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
        for _ in range(rounds):
            for tokens, seconds in taken.items():
                started = time.perf_counter()
                model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
                seconds.append(time.perf_counter() - started)
                cache.crop(-tokens)
    one, six, prompt = (1e3 * statistics.median(seconds) for seconds in taken.values())
    source = (
        f"dispatch of Qwen3-MoE's {layers} layers by transformers' grouped_mm, one CPU thread, matrices tiny: "
        f"{one:.1f} ms for 1 token, {six:.1f} ms for 6; the least of an eager forward, whose weights take under 9 ms"
    )
    return Pace(one, max(six - one, 0.0) / 5, prompt, source)


@contextmanager
def paced(model: nn.Module, pace: Pace) -> Iterator[None]:
    """Have a model's forwards take as long as `pace` says: what is left of the time is slept."""
    started: list[tuple[float, float]] = []

    def before(_: nn.Module, args: Any, kwargs: Row) -> None:
        given = kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        cache = kwargs.get("past_key_values")
        first = cache is None or not cache.get_seq_length()
        started[:] = [(time.perf_counter(), pace.seconds(given.shape[1], first=first))]

    def after(*_: Any) -> None:
        begun, seconds = started[0]
        time.sleep(max(begun + seconds - time.perf_counter(), 0.0))

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
