"""What the decoding loop costs beside the model's forwards: an edge-only `Decoder` against a bare cached loop.

The model is a tiny random Qwen2-Audio, so that a forward is short and the loop around it shows. Both decode the
same tokens greedily from the same prepared inputs; the bare loop only feeds ``torch.argmax`` of the logits back.
The time of a draft step is that of a whole request, prompt included, over its tokens; the overhead is the
difference of the two within a round.

``python -m bench.decoding.overhead [--quick] [--threads N] [--json FILE]``
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from bench.harness import SCHEMA, Row, Settings, begin, interleave, machine, ratios, spread
from tests.checkpoints import build_qwen2_audio
from ugsd_fast import AudioLM, Decoder, UGSDConfig

TARGET_US = 100  # a draft step
NEVER_ENDS = -1  # no token has this id
DECODER, BARE, GENERATE = "Decoder, edge only", "bare forwards + argmax", "transformers generate"


def tiny_model() -> tuple[AudioLM, dict[str, Tensor]]:
    """Build the model in a temporary folder and prepare inputs of one second of sound."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_qwen2_audio(Path(folder) / "qwen2_audio")
        model = AudioLM.from_pretrained(path, dtype=torch.float32, device="cpu")
    tone = np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000).astype(np.float32)
    return model, model.prepare((tone, 16_000))


@torch.inference_mode()
def bare_loop(model: Any, inputs: dict[str, Tensor], tokens: int) -> list[int]:
    """Decode greedily with one cached forward a token and nothing else."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    logits = model(**inputs, past_key_values=cache, use_cache=True).logits
    length = inputs["input_ids"].shape[1]
    decoded = []
    for position in range(length, length + tokens):
        token = torch.argmax(logits[:, -1:], dim=-1)
        decoded.append(token)
        if len(decoded) < tokens:
            positions = torch.tensor([[position]])
            logits = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return torch.cat(decoded, dim=1)[0].tolist()


def measure_overhead(tokens: int, settings: Settings) -> Row:
    """Time the three loops in turns; the results are microseconds a draft step."""
    model, inputs = tiny_model()
    config = UGSDConfig(eos_token_id=NEVER_ENDS)
    decoder = Decoder(model, None, config)
    length = inputs["input_ids"].shape[1]

    def decode() -> list[int]:
        return decoder.generate(inputs=inputs, max_new_tokens=tokens).tokens

    def bare() -> list[int]:
        return bare_loop(model.model, inputs, tokens)

    def generate() -> list[int]:
        output = model.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return output[0, length:].tolist()

    calls = {DECODER: decode, BARE: bare, GENERATE: generate}
    decoded = {name: call() for name, call in calls.items()}
    if decoded[DECODER] != decoded[BARE] or decoded[GENERATE] != decoded[BARE]:
        raise RuntimeError(f"the loops decoded different tokens, expected the same: {decoded}")
    samples, _ = interleave(calls, settings)
    scale = 1e6 / tokens
    overhead = spread([a - b for a, b in zip(samples[DECODER], samples[BARE], strict=True)], scale)
    return {
        "model": "tiny random Qwen2-Audio, 2 layers, 544 columns",
        "tokens": tokens,
        "block_size": config.block_size,
        "step_us": {name: spread(values, scale) for name, values in samples.items()},
        "overhead_us": overhead,
        "ratio_to_bare": spread(ratios(samples[DECODER], samples[BARE])),
        "target": {"at_most": TARGET_US, "met": overhead["median"] <= TARGET_US},
    }


def main() -> None:
    """Run from the command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = begin("bench.decoding.overhead", "Overhead of the decoding loop over bare forwards.")
    result = measure_overhead(8 if session.conditions["quick"] else 64, session.settings)
    for name, step in result["step_us"].items():
        print(f"{name:28} {step['median']:9.1f} µs a step [{step['p10']:.1f}, {step['p90']:.1f}]")
    overhead, target = result["overhead_us"], result["target"]
    print(f"{'overhead of the loop':28} {overhead['median']:9.1f} µs a step", end=" ")
    print(f"[{overhead['p10']:.1f}, {overhead['p90']:.1f}], target ≤ {target['at_most']:g}")
    session.write({"schema": SCHEMA, "machine": machine(), **result})


if __name__ == "__main__":
    main()
