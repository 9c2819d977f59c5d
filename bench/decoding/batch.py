"""What sharing forwards brings: several requests decoded together against the same requests one after another.

Prompts are prepared beforehand, prefill is timed; both ways emit the same tokens, checked here. Four and eight clips,
lossless greedy and gated; the embedded pair on its demo clips (captions of some 43 tokens), and a tiny random pair that
decodes 64 tokens, whose forwards are short beside their call overhead.

``python -m bench.decoding.batch [--quick] [--threads N] [--json FILE]``
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from bench.harness import SCHEMA, Row, Settings, begin, interleave, machine, ratios, spread
from tests.checkpoints import build_qwen2_audio, copy_checkpoint
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.demo import clips, load_pair

TARGET = 2.0  # times the tokens a second of single requests, four together
NEVER_ENDS = -1  # no token has this id
LOSSLESS: dict[str, Any] = {"always_escalate": True, "rule": "greedy"}


@dataclass(frozen=True)
class Workload:
    """A pair with prepared inputs of several clips, and the settings to decode them with."""

    name: str
    draft: AudioLM
    verifier: LocalVerifier
    configs: Mapping[str, UGSDConfig]
    inputs: Sequence[Mapping[str, Tensor]]
    verifier_inputs: Sequence[Mapping[str, Tensor]]
    max_new_tokens: int


def embedded_pair(count: int, tokens: int) -> Workload:
    """Return the shipped pair and its first demo clips."""
    pair = load_pair()
    heard = [clip.path for clip in clips()[:count]]
    return Workload(
        "embedded pair",
        pair.draft,
        pair.verifier,
        {"lossless greedy": UGSDConfig(**LOSSLESS), "UGSD": pair.config},
        [pair.draft.prepare(path, pair.prompt) for path in heard],
        [pair.verifier.model.prepare(path, pair.prompt) for path in heard],
        tokens,
    )


def tiny_pair(count: int, tokens: int) -> Workload:
    """Return a tiny random Qwen2-Audio and a noisy copy of it that drafts."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_qwen2_audio(Path(folder) / "verifier")
        noisy = copy_checkpoint(path, Path(folder) / "draft", noise=0.02, seed=1)
        verifier, draft = (AudioLM.from_pretrained(p, dtype=torch.float32, device="cpu") for p in (path, noisy))
    rng = np.random.default_rng(0)
    sounds = [(rng.normal(0, 0.1, 16_000).astype(np.float32), 16_000) for _ in range(count)]
    return Workload(
        "tiny random pair",
        draft,
        LocalVerifier(verifier),
        {"lossless greedy": UGSDConfig(**LOSSLESS, eos_token_id=NEVER_ENDS)},
        [draft.prepare(sound) for sound in sounds],
        [verifier.prepare(sound) for sound in sounds],
        tokens,
    )


def measure(workload: Workload, setting: str, batch: int, settings: Settings) -> Row:
    """Time `batch` requests together and one after another."""
    decoder = Decoder(workload.draft, workload.verifier, workload.configs[setting])
    inputs, verifier_inputs = list(workload.inputs[:batch]), list(workload.verifier_inputs[:batch])
    limit = workload.max_new_tokens

    def single() -> list[Any]:
        return [
            decoder.generate(inputs=ours, verifier_inputs=theirs, max_new_tokens=limit)
            for ours, theirs in zip(inputs, verifier_inputs, strict=True)
        ]

    def together() -> list[Any]:
        return decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=limit)

    alone, shared = single(), together()
    if [result.tokens for result in alone] != [result.tokens for result in shared]:
        raise RuntimeError(f"{workload.name}, {setting}: batch and single requests decoded different tokens")
    tokens = sum(len(result.tokens) for result in alone)
    samples, _ = interleave({"single": single, "batch": together}, settings)
    faster = spread(ratios(samples["single"], samples["batch"]))
    return {
        "pair": workload.name,
        "setting": setting,
        "batch": batch,
        "tokens": tokens,
        "acceptance_rate": sum(result.metrics.acceptance_rate for result in alone) / batch,
        "tokens_per_second": {
            name: spread([1 / seconds for seconds in values], tokens) for name, values in samples.items()
        },
        "faster": faster,
        "target": {"at_least": TARGET, "met": faster["median"] >= TARGET} if batch == 4 else None,
    }


def main() -> None:
    """Run from the command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = begin("bench.decoding.batch", "Batches against single requests.")
    quick = session.conditions["quick"]
    count, tokens = (4, 8) if quick else (8, 64)
    rows = [
        measure(workload, setting, batch, session.settings)
        for workload in (embedded_pair(count, 2 * tokens), tiny_pair(count, tokens))
        for setting in workload.configs
        for batch in (4, 8)[: 1 if quick else 2]
    ]
    for row in rows:
        rates, faster = row["tokens_per_second"], row["faster"]
        print(
            f"{row['pair']:18} {row['setting']:16} batch {row['batch']}: {rates['single']['median']:7.0f} → "
            f"{rates['batch']['median']:7.0f} tokens/s, {faster['median']:.2f}x "
            f"[{faster['p10']:.2f}, {faster['p90']:.2f}]"
        )
    session.write({"schema": SCHEMA, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
