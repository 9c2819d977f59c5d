"""Lossless greedy decoding against transformers' assisted generation: the same pairs, the same tokens.

transformers never gives its drafter the audio (the assistant's first forward counts as a later one, from which audio
inputs are dropped), so its assisted generation is timed twice: *stock*, and *hearing*, where the drafter's
``prepare_inputs_for_generation`` is told that the first forward is the first. Each of the two is timed with transformers'
own block (20 tokens, cut at a confidence of 0.4) and with blocks of 5 tokens as our decoder's, and the faster of them is
what we compare with. Plain ``generate`` of the verifier stands beside them.

The embedded pair decodes a demo clip; noise on the drafter's weights makes it accept less. The tiny random pair is a
Qwen2-Audio of two layers and noisy copies of it: its forwards are short, the loops around them show.

``python -m bench.decoding.assisted [--quick] [--threads N] [--json FILE]``
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from ugsd_fast.hf import UGSDGenerate

TARGETS = {"stock": 2.0, "hearing": 1.3}  # times as fast, where 0.5 to 0.9 of the draft tokens are accepted
JUDGED = (0.5, 0.9)
OURS, DOOR, PLAIN = "Decoder", "generate(custom_generate=UGSDGenerate)", "verifier's generate"
BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "20 tokens, confidence 0.4": {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4},
    "5 tokens": {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0},
}


@dataclass(frozen=True)
class Pair:
    """Two models with prepared inputs of one clip."""

    name: str
    draft: AudioLM
    verifier: AudioLM
    inputs: Mapping[str, Tensor]
    max_new_tokens: int


def embedded_pairs(noises: Sequence[float], tokens: int) -> Iterator[Pair]:
    """Yield the shipped pair, its drafter's weights more or less noisy."""
    for noise in noises:
        pair = load_pair()
        add_noise(pair.draft.model, noise)
        inputs = pair.verifier.model.prepare(clips()[0].path, pair.prompt)
        own = pair.draft.prepare(clips()[0].path, pair.prompt)
        if inputs.keys() != own.keys() or not all(torch.equal(inputs[name], own[name]) for name in own):
            raise RuntimeError("the embedded pair's processors differ, expected one: transformers' drafter has no other")
        name = f"embedded pair, drafter with noise {noise}" if noise else "embedded pair"
        yield Pair(name, pair.draft, pair.verifier.model, inputs, tokens)


def tiny_pairs(noises: Sequence[float], tokens: int) -> Iterator[Pair]:
    """Yield a tiny random Qwen2-Audio with noisy copies of it as drafters."""
    rng = np.random.default_rng(0)
    sound = (rng.normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    with tempfile.TemporaryDirectory() as folder:
        path = build_qwen2_audio(Path(folder) / "verifier")
        for noise in noises:
            noisy = copy_checkpoint(path, Path(folder) / f"draft-{noise}", noise=noise, seed=1)
            verifier, draft = (AudioLM.from_pretrained(p, dtype=torch.float32, device="cpu") for p in (path, noisy))
            for model in (verifier.model, draft.model):
                model.generation_config.eos_token_id = None  # every caption runs to max_new_tokens
            yield Pair(f"tiny random pair, noise {noise}", draft, verifier, verifier.prepare(sound), tokens)


def add_noise(model: Any, noise: float) -> None:
    """Add gaussian noise to every weight matrix, relative to its spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if noise and weight.ndim > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)


@contextmanager
def hearing(model: Any) -> Iterator[None]:
    """Have a drafter of transformers' assisted generation hear the audio on its first forward."""
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def first_is_first(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        kwargs["is_first_iteration"] = cache is None or cache.get_seq_length() == 0
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation = first_is_first
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


def measure(pair: Pair, settings: Settings) -> Row:
    """Time every way of decoding one clip, prefill included; all of them must emit the same tokens."""
    draft, verifier, inputs = pair.draft, pair.verifier, dict(pair.inputs)
    prompt = inputs["input_ids"].shape[1]
    ends = verifier.model.generation_config.eos_token_id
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=() if ends is None else ends)
    decoder = Decoder(draft, LocalVerifier(verifier), config)
    door = UGSDGenerate(draft, inputs)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def generate(**kwargs: Any) -> list[int]:
        output = verifier.model.generate(**inputs, **greedy, max_new_tokens=pair.max_new_tokens, **kwargs)
        return output[0, prompt:].tolist()

    def ours() -> list[int]:
        return decoder.generate(inputs=inputs, verifier_inputs=inputs, max_new_tokens=pair.max_new_tokens).tokens

    def assisted(heard: bool, block: Mapping[str, Any]) -> list[int]:
        for name, value in block.items():
            setattr(draft.model.generation_config, name, value)
        with hearing(draft.model) if heard else nullcontext():
            return generate(assistant_model=draft.model)

    calls: dict[str, Any] = {OURS: ours, DOOR: lambda: generate(custom_generate=door), PLAIN: generate}
    kinds = {f"{kind}, {name}": (kind == "hearing", block) for kind in TARGETS for name, block in BLOCKS.items()}
    calls |= {name: functools.partial(assisted, *arguments) for name, arguments in kinds.items()}
    decoded = {name: call() for name, call in calls.items()}
    if any(tokens != decoded[PLAIN] for tokens in decoded.values()):
        raise RuntimeError(f"{pair.name}: the loops decoded different tokens, expected the same: {decoded}")
    metrics = decoder.generate(inputs=inputs, verifier_inputs=inputs, max_new_tokens=pair.max_new_tokens).metrics
    samples, _ = interleave(calls, settings)
    low, high = JUDGED
    judged = low <= metrics.acceptance_rate <= high
    faster, targets = {}, {}
    for kind, at_least in TARGETS.items():
        best = [min(values) for values in zip(*(samples[name] for name in kinds if name.startswith(kind)), strict=True)]
        faster[kind] = spread(ratios(best, samples[OURS]))
        if judged:
            targets[kind] = {"at_least": at_least, "met": faster[kind]["median"] >= at_least}
    return {
        "pair": pair.name,
        "tokens": len(decoded[PLAIN]),
        "acceptance_rate": metrics.acceptance_rate,
        "ms": {name: spread(values, 1e3) for name, values in samples.items()},
        "faster": {**faster, PLAIN: spread(ratios(samples[PLAIN], samples[OURS]))},
        "targets": targets,
    }


def main() -> None:
    """Run from the command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = begin("bench.decoding.assisted", "Lossless greedy against transformers' assisted generation.")
    quick = session.conditions["quick"]
    pairs = [
        *embedded_pairs((0.0,) if quick else (0.0, 0.1, 0.2), 8 if quick else 128),
        *tiny_pairs((0.02,) if quick else (0.01, 0.02, 0.05), 8 if quick else 64),
    ]
    rows = []
    for pair in pairs:
        row = measure(pair, session.settings)
        rows.append(row)
        print(f"{row['pair']}: {row['tokens']} tokens, acceptance {row['acceptance_rate']:.2f}")
        for name, ms in row["ms"].items():
            print(f"  {name:40} {ms['median']:8.1f} ms [{ms['p10']:.1f}, {ms['p90']:.1f}]")
        for name, ratio in row["faster"].items():
            target = row["targets"].get(name)
            verdict = "" if target is None else f", target ≥ {target['at_least']}: {'met' if target['met'] else 'MISSED'}"
            print(f"  {ratio['median']:.2f}x {name} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]{verdict}", flush=True)
    session.write({"schema": SCHEMA, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
