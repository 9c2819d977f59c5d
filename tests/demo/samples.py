"""A comparison as a run would leave it, made up: whole words are the tokens, and no model is needed."""

from __future__ import annotations

import dataclasses

import numpy as np

from ugsd_fast.audio import Audio
from ugsd_fast.decoding import BlockRecord, Result, Trace, UGSDConfig
from ugsd_fast.demo.attributes import compose, matches
from ugsd_fast.demo.run import Comparison, SweepPoint, Utterance, summarise

EOS = 0
WORDS: list[str] = ["<eos>"]


def tokens_of(text: str) -> list[int]:
    """One token a word; the vocabulary grows as needed."""
    ids = []
    for word in text.split():
        if word not in WORDS:
            WORDS.append(word)
        ids.append(WORDS.index(word))
    return [*ids, EOS]


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens if token != EOS)


def result_of(blocks: list[BlockRecord], latency: float, forwards: tuple[int, int]) -> Result:
    tokens = [token for block in blocks for token in block.emitted]
    trace = Trace(blocks)
    metrics = trace.metrics(
        latency=latency,
        time_to_first_token=latency / 10,
        verifier_forwards=forwards[0],
        drafter_forwards=forwards[1],
    )
    return Result(decode(tokens), tokens, trace, metrics)


def speculate(draft: str, target: str, rng: np.random.Generator, threshold: float) -> Result:
    """A run as the decoder would leave it: wherever the captions differ, the drafter was uncertain."""
    drafted, wanted = tokens_of(draft), tokens_of(target)
    assert len(drafted) == len(wanted)
    blocks, position, verified = [], 0, 0
    while position < len(wanted):
        block = drafted[position : position + 5]
        entropy = [
            float(rng.gamma(0.5, 0.3) if a == b else 0.6 + rng.gamma(2.0, 0.5))
            for a, b in zip(block, wanted[position:])
        ]
        escalated = max(entropy) > threshold
        accepted = len(block)
        if escalated:
            verified += 1
            accepted = next((i for i, t in enumerate(block) if t != wanted[position + i]), len(block))
        emitted = block[:accepted] + ([wanted[position + accepted]] if accepted < len(block) else [])
        blocks.append(
            BlockRecord(
                start=position,
                draft_tokens=tuple(block),
                entropy=tuple(entropy),
                uncertainty=max(entropy),
                escalated=escalated,
                num_accepted=accepted,
                emitted=tuple(emitted),
                draft_seconds=0.004,
                verify_seconds=0.006 if escalated else 0.0,
                verified=True,
            )
        )
        position += len(emitted)
    return result_of(blocks, 0.004 * len(blocks) + 0.007 * verified, (verified, len(wanted)))


def alone(text: str, rng: np.random.Generator) -> Result:
    """The verifier's own run: a block a token, nothing drafted."""
    blocks = [
        BlockRecord(index, (), (), 0.0, True, 0, (token,), 0.0, 0.007, True)
        for index, token in enumerate(tokens_of(text))
    ]
    return result_of(blocks, 0.007 * len(blocks), (len(blocks), 0))


def make_comparison(clips: int = 3, *, references: bool = True, sweep: bool = True) -> Comparison:
    rng = np.random.default_rng(7)
    config = UGSDConfig(rank=1, entropy_threshold=1.0)
    truths = [
        {"emotion": "happy", "intensity": "clearly", "gender": "woman"},
        {"emotion": "sad", "intensity": "deeply", "gender": "man"},
        {"emotion": "angry", "intensity": "slightly", "gender": "woman"},
    ]
    voice = {"pitch": "high", "pace": "quick", "loudness": "loud", "melody": "rising"}
    comparison = Comparison([], {m: [] for m in ("edge", "ugsd", "verifier", "lossless")}, config, decode)
    for index in range(clips):
        truth = {**truths[index % 3], **voice}
        target = compose(truth)
        heard = {**truth, "pitch": "low"} if index % 3 else truth
        draft = compose({**heard, "pace": "steady", "melody": "level"} if index % 3 else heard)
        samples = np.sin(np.arange(16_000) * 0.07) * np.hanning(16_000) * rng.uniform(0.3, 1, 16_000)
        comparison.utterances.append(
            Utterance(
                f"clip-{index:02d}.flac",
                Audio(samples.astype(np.float32), 16_000, "clip"),
                target if references else None,
                {"voice": "f2", "spoken": "<the weather & the sea>"},
            )
        )
        comparison.results["edge"].append(dataclasses.replace(speculate(draft, draft, rng, np.inf), text=draft))
        comparison.results["ugsd"].append(speculate(draft, target, rng, 1.0))
        comparison.results["verifier"].append(alone(target, rng))
        comparison.results["lossless"].append(speculate(draft, target, rng, -1.0))
    if references:
        comparison.matches = matches
    if references and sweep:
        for threshold in (0.25, 0.5, 1.0, 1.5):
            results = [
                speculate(decode(e.tokens), decode(v.tokens), rng, threshold)
                for e, v in zip(comparison.results["edge"], comparison.results["verifier"])
            ]
            comparison.sweep.append(SweepPoint(threshold, summarise(results, comparison.references, matches)))
    comparison.settings = {"Drafter": "draft", "Verifier": "verifier", "Processor": "A test's"}
    return comparison
