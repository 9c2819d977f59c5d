"""Lossless greedy decoding against transformers' assisted generation: the same pairs, the same tokens.

transformers never gives its drafter the audio (the assistant's first forward counts as a later one, from which audio
inputs are dropped), so its assisted generation is timed twice: *stock*, and *hearing*, where the drafter's
``prepare_inputs_for_generation`` is told that the first forward is the first. Each is timed with its own default, up to
20 tokens cut at a confidence of 0.4, with up to 64, and with 5; the decoder with up to 64 tokens under
``adaptive="cost"``, and with 5. The fastest of its settings stands for each. Plain ``generate`` of the verifier, and
``custom_generate``, stand beside them.

The embedded pair decodes three demo clips one after another; noise on the drafter's weights makes it accept less. The
tiny random pair is a Qwen2-Audio of two layers and noisy copies of it: its forwards are short, the loops around them
show.

``python -m bench.decoding.assisted [--quick] [--threads N] [--json FILE]``
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
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
JUDGED = (0.5, 0.9)  # acceptance with blocks of 5
OURS, DOOR, PLAIN = "decoder", "custom_generate", "verifier's generate"
FIXED, CUT, LONG, COST = "5 tokens", "up to 20 tokens", "up to 64 tokens", "up to 64 tokens by cost"
THEIR_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    FIXED: {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0},
    CUT: {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4},
    LONG: {"num_assistant_tokens": 64, "assistant_confidence_threshold": 0.4},
}


@dataclass(frozen=True)
class Pair:
    """Two models with prepared inputs of some clips, the same for both."""

    name: str
    draft: AudioLM
    verifier: AudioLM
    inputs: Sequence[Mapping[str, Tensor]]
    max_new_tokens: int


def embedded_pairs(noises: Sequence[float], count: int, tokens: int) -> Iterator[Pair]:
    """Yield the shipped pair with `count` demo clips, its drafter's weights more or less noisy."""
    for noise in noises:
        pair = load_pair()
        add_noise(pair.draft.model, noise)
        heard = [clip.path for clip in clips()[:count]]
        inputs = [pair.verifier.model.prepare(path, pair.prompt) for path in heard]
        for path, theirs in zip(heard, inputs, strict=True):
            own = pair.draft.prepare(path, pair.prompt)
            if theirs.keys() != own.keys() or not all(torch.equal(theirs[name], own[name]) for name in own):
                raise RuntimeError("the pair's inputs differ, expected the same: transformers' drafter has no others")
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
            yield Pair(f"tiny random pair, noise {noise}", draft, verifier, [verifier.prepare(sound)], tokens)


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

    @wraps(prepare)
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
    """Time every way of decoding the clips, prefill included; all of them must emit the same tokens."""
    draft, verifier, limit = pair.draft, pair.verifier, pair.max_new_tokens
    ends = verifier.model.generation_config.eos_token_id
    lossless = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=() if ends is None else ends)
    by_cost = replace(lossless, adaptive="cost", max_block=64)
    decoders = {
        name: Decoder(draft, LocalVerifier(verifier), config)
        for name, config in {FIXED: lossless, COST: by_cost}.items()
    }
    door = UGSDGenerate(draft, lambda inputs: inputs)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def decode(decoder: Decoder) -> list[Any]:
        return [decoder.generate(inputs=one, verifier_inputs=one, max_new_tokens=limit) for one in pair.inputs]

    def generate(**kwargs: Any) -> list[Tensor]:
        settings = {**greedy, "max_new_tokens": limit, **kwargs}
        return [verifier.model.generate(**one, **settings)[0, one["input_ids"].shape[1] :] for one in pair.inputs]

    def assisted(heard: bool, block: Mapping[str, Any]) -> list[Tensor]:
        for name, value in block.items():
            setattr(draft.model.generation_config, name, value)
        with hearing(draft.model) if heard else nullcontext():
            return generate(assistant_model=draft.model)

    calls: dict[str, Any] = {f"{OURS}, {name}": partial(decode, decoder) for name, decoder in decoders.items()}
    calls |= {f"{DOOR}, {FIXED}": partial(generate, custom_generate=door), PLAIN: generate}
    for kind in TARGETS:
        for name, block in THEIR_BLOCKS.items():
            calls[f"{kind}, {name}"] = partial(assisted, kind == "hearing", block)
    own = [tokens.tolist() for tokens in generate()]
    for name, call in calls.items():
        found = [one.tolist() if isinstance(one, Tensor) else one.tokens for one in call()]
        if found != own:
            raise RuntimeError(f"{pair.name}, {name}: decoded {found}, expected the verifier's own {own}")
    samples, _ = interleave(calls, settings)

    def fastest(kind: str) -> list[float]:
        return min((values for name, values in samples.items() if name.startswith(kind)), key=statistics.median)

    acceptance = {
        name: statistics.mean(one.metrics.acceptance_rate for one in decode(decoder))
        for name, decoder in decoders.items()
    }
    faster = {kind: spread(ratios(fastest(kind), fastest(OURS))) for kind in (*TARGETS, PLAIN)}
    judged = JUDGED[0] <= acceptance[FIXED] <= JUDGED[1]
    return {
        "pair": pair.name,
        "clips": len(own),
        "tokens": sum(map(len, own)),
        "acceptance_rate": acceptance,
        "ms": {name: spread(values, 1e3) for name, values in samples.items()},
        "faster": faster,
        "targets": {
            kind: {"at_least": at_least, "met": faster[kind]["median"] >= at_least}
            for kind, at_least in TARGETS.items()
            if judged and settings.judged
        },
    }


def main() -> None:
    """Run from the command line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = begin("bench.decoding.assisted", "Lossless greedy against transformers' assisted generation.")
    quick = session.conditions["quick"]
    pairs = [
        *embedded_pairs((0.0,) if quick else (0.0, 0.3), 1 if quick else 3, 8 if quick else 128),
        *tiny_pairs((0.02,) if quick else (0.02, 0.05, 0.1), 8 if quick else 64),
    ]
    rows = []
    for pair in pairs:
        row = measure(pair, session.settings)
        rows.append(row)
        accepted = ", ".join(f"{rate:.2f} with {name}" for name, rate in row["acceptance_rate"].items())
        print(f"{row['pair']}: {row['tokens']} tokens of {row['clips']} clips; accepted {accepted}")
        for name, ms in row["ms"].items():
            print(f"  {name:28} {ms['median']:8.1f} ms [{ms['p10']:.1f}, {ms['p90']:.1f}]")
        for name, ratio in row["faster"].items():
            target = row["targets"].get(name)
            verdict = (
                "" if target is None else f", target ≥ {target['at_least']}: {'met' if target['met'] else 'MISSED'}"
            )
            print(f"  {ratio['median']:.2f}x {name} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]{verdict}", flush=True)
    session.write({"schema": SCHEMA, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
