"""Choose the pair's threshold on the tuning split, then measure everything on the test splits.

Writes ``bench/results/embedded_pair.json`` and, from it, ``docs/embedded-pair.md`` and the pair's ``MODEL_CARD.md``.
Decoding is the library's own, on one thread; methods that are compared in time take turns clip by clip.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from transformers import DynamicCache

from examples.embedded_pair.dataset import SAMPLE_RATE, load_audio, load_split, make_dataset
from examples.embedded_pair.export import BLOCK_SIZE, RANK
from examples.embedded_pair.report import write_reports
from ugsd_fast import AudioLM, Decoder, UGSDConfig, ops
from ugsd_fast.audio import Audio
from ugsd_fast.decoding import Result
from ugsd_fast.demo import PAIR_FOLDER, EmbeddedPair, load_pair
from ugsd_fast.demo.attributes import ATTRIBUTES, matches
from ugsd_fast.demo.run import FOUR_WAYS, Comparer, Utterance, machine, summarise

THRESHOLDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
TUNING_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
TUNING_TARGET = 0.95
UNTIMED_LIMIT = 150  # clips of each split in a sweep
TUNING_SPLITS = ("tune-seen", "tune-unseen")
RESULTS = Path("bench/results/embedded_pair.json")


def utterances(work: Path, name: str, limit: int | None) -> list[Utterance]:
    """The clips of one held-out split."""
    captions = load_split(work / "data", [name]).captions
    waves = load_audio(work / "data", name)
    return [
        Utterance(f"{name}-{i:03d}", Audio(wave, SAMPLE_RATE, f"{name}-{i:03d}"), caption)
        for i, (wave, caption) in enumerate(zip(waves, captions, strict=True))
    ][:limit]


def decode(decoder: Decoder, clips: Sequence[Utterance], pair: EmbeddedPair) -> list[Result]:
    """Caption every clip."""
    return [decoder.generate(clip.audio, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens) for clip in clips]


def quality(results: Sequence[Result], clips: Sequence[Utterance]) -> dict[str, Any]:
    """The library's summary of one method, with accuracy by attribute."""
    references = [clip.reference or "" for clip in clips]
    compared = [matches(result.text, reference) for result, reference in zip(results, references, strict=True)]
    return asdict(summarise(results, references, matches)) | {
        "by_attribute": {name: statistics.fmean(same[name] for same in compared if name in same) for name in ATTRIBUTES}
    }


def recovered(summary: dict[str, Any], edge: dict[str, Any], verifier: dict[str, Any]) -> dict[str, float]:
    """Share of the drafter-to-verifier gap that a method closes."""
    return {
        f"gap_recovered_{name}": (summary[name] - edge[name]) / (verifier[name] - edge[name])
        for name in ("attribute_accuracy", "bleu4")
    }


@dataclass(frozen=True)
class Trial:
    """One untimed run over the clips of some splits: edge-only, verifier-only, or UGSD at a threshold and rank."""

    splits: tuple[str, ...]
    method: str
    threshold: float = 0.0
    rank: int = RANK


def run_trial(work: Path, trial: Trial, limit: int | None) -> dict[str, Any]:
    """Quality of one trial; runs in a process of its own."""
    pair = load_pair(threads=1)
    clips = [clip for name in trial.splits for clip in utterances(work, name, limit)]
    config = UGSDConfig(block_size=BLOCK_SIZE, rule="rank", rank=trial.rank, entropy_threshold=trial.threshold)
    draft = None if trial.method == "verifier" else pair.draft
    verifier = None if trial.method == "edge" else pair.verifier
    return quality(decode(Decoder(draft, verifier, config), clips, pair), clips)


def run_trials(work: Path, trials: Sequence[Trial], limit: int | None, workers: int = 2) -> list[dict[str, Any]]:
    """Several trials side by side."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(run_trial, work, limit=limit), trials))


def sweep(work: Path, splits: tuple[str, ...], points: Sequence[tuple[int, float]], limit: int | None) -> list[dict]:
    """UGSD at each (rank, threshold), with the share of the gap that it recovers."""
    trials = [Trial(splits, "edge"), Trial(splits, "verifier")]
    trials += [Trial(splits, "ugsd", threshold, rank) for rank, threshold in points]
    edge, verifier, *found = run_trials(work, trials, limit)
    return [
        {"rank": rank, "threshold": threshold, **summary, **recovered(summary, edge, verifier)}
        for (rank, threshold), summary in zip(points, found, strict=True)
    ]


def choose_threshold(points: Sequence[dict[str, Any]]) -> float:
    """The highest threshold that recovers ``TUNING_TARGET`` of the gap in both metrics; the lowest if none does."""
    reached = [
        point["threshold"]
        for point in points
        if min(point["gap_recovered_attribute_accuracy"], point["gap_recovered_bleu4"]) >= TUNING_TARGET
    ]
    return max(reached, default=min(point["threshold"] for point in points))


@torch.inference_mode()
def teacher_forced(model: AudioLM, clip: Utterance, prompt: str, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [len(tokens), V] of a model along a given caption."""
    inputs = model.prepare(clip.audio, prompt)
    caption = torch.tensor([list(tokens)])
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], caption], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model.model(**inputs).logits[0, start - 1 : -1].float()


def entropy_auc(pair: EmbeddedPair, clips: Sequence[Utterance], captions: Sequence[Sequence[int]]) -> dict[str, float]:
    """How well the drafter's entropy predicts that its argmax is not the verifier's, along given captions."""
    entropies, disagree = [], []
    for clip, tokens in zip(clips, captions, strict=True):
        stats = ops.token_stats(teacher_forced(pair.draft, clip, pair.prompt, tokens))
        entropies.append(stats.entropy)
        disagree.append(stats.argmax != teacher_forced(pair.verifier.model, clip, pair.prompt, tokens).argmax(-1))
    entropy, differs = torch.cat(entropies), torch.cat(disagree)
    return {
        "auc": float(roc_auc_score(differs.numpy(), entropy.numpy())),
        "disagreement": float(differs.float().mean()),
        "entropy_where_agreeing": float(entropy[~differs].mean()),
        "entropy_where_not": float(entropy[differs].mean()),
    }


@torch.inference_mode()
def matches_generate(pair: EmbeddedPair, clips: Sequence[Utterance], results: Sequence[Result]) -> float:
    """Share of the clips where a method's tokens are those of the verifier's own ``generate``."""
    same = 0
    for clip, result in zip(clips, results, strict=True):
        inputs = pair.verifier.model.prepare(clip.audio, pair.prompt)
        tokens = pair.verifier.model.model.generate(**inputs, max_new_tokens=pair.max_new_tokens)
        same += tokens[0, inputs["input_ids"].shape[1] :].tolist() == list(result.tokens)
    return same / len(clips)


@torch.inference_mode()
def step_times(pair: EmbeddedPair, clip: Utterance, rounds: int = 300) -> dict[str, float]:
    """Milliseconds of one cached decoding step of each model (batch 1, float32), taking turns."""
    models = {"drafter": pair.draft, "verifier": pair.verifier.model}
    caches, times = {}, {name: [] for name in models}
    for name, model in models.items():
        inputs = model.prepare(clip.audio, pair.prompt)
        caches[name] = DynamicCache(config=model.model.config.get_text_config(decoder=True))
        model.model(**inputs, past_key_values=caches[name], use_cache=True)
    token = torch.tensor([[300]])
    for _ in range(rounds):
        for name, model in models.items():
            position = torch.tensor([[caches[name].get_seq_length()]])
            start = time.perf_counter()
            model.model(input_ids=token, past_key_values=caches[name], position_ids=position, use_cache=True)
            times[name].append(1e3 * (time.perf_counter() - start))
            caches[name].crop(-1)
    medians = {f"{name}_step_ms": statistics.median(values[20:]) for name, values in times.items()}
    return medians | {"step_ratio": medians["verifier_step_ms"] / medians["drafter_step_ms"]}


def speedups(latencies: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per method, clip by clip against the verifier alone: median and the middle 80%."""
    found = {}
    for method, values in latencies.items():
        ratios = sorted(slow / fast for slow, fast in zip(latencies["verifier"], values, strict=True))
        tenth = len(ratios) // 10
        found[method] = {
            "latency_ms": 1e3 * statistics.median(values),
            "speedup": statistics.median(ratios),
            "speedup_p10": ratios[tenth],
            "speedup_p90": ratios[-1 - tenth],
        }
    return found


def measure(work: Path, pair: EmbeddedPair, name: str, limit: int | None) -> dict[str, Any]:
    """Everything about one test split."""
    clips = utterances(work, name, limit)
    comparer = Comparer(
        pair.draft,
        pair.verifier,
        pair.config,
        prompt=pair.prompt,
        max_new_tokens=pair.max_new_tokens,
        methods=FOUR_WAYS,
        matches=matches,
    )
    comparer.warm_up(clips[0])
    for clip in clips:
        comparer.add(clip)
    results = comparer.comparison.results
    methods = {name: quality(found, clips) for name, found in results.items()}
    for method in ("ugsd", "lossless"):
        methods[method] |= recovered(methods[method], methods["edge"], methods["verifier"])
    verifier_captions = [result.tokens for result in results["verifier"]]
    return {
        "clips": len(clips),
        "sweep_clips": min(limit or UNTIMED_LIMIT, len(clips)),
        "methods": methods,
        "sweep": sweep(work, (name,), [(rank, t) for rank in (1, 20) for t in THRESHOLDS], limit or UNTIMED_LIMIT),
        "speed": speedups({name: [one.metrics.latency for one in found] for name, found in results.items()}),
        "entropy_auc": {
            "along_verifier_captions": entropy_auc(pair, clips, verifier_captions),
            "along_drafts": entropy_auc(pair, clips, [result.tokens for result in results["edge"]]),
        },
        "lossless_equals_generate": matches_generate(pair, clips, results["lossless"]),
    }


def evaluate_pair(work: Path, limit: int | None = None) -> None:
    """Choose the threshold, write it to ``pair.json``, measure, and write results and reports.

    Parameters
    ----------
    work : pathlib.Path
        Where ``data`` lies.
    limit : int, optional
        Clips of each split, for a quick look.
    """
    points = sweep(work, TUNING_SPLITS, [(RANK, threshold) for threshold in TUNING_THRESHOLDS], limit or UNTIMED_LIMIT)
    path = PAIR_FOLDER / "pair.json"
    settings = json.loads(path.read_text())
    settings["config"]["entropy_threshold"] = choose_threshold(points)
    path.write_text(json.dumps(settings, indent=1) + "\n")
    pair = load_pair(threads=1)
    results = {
        "machine": machine(),
        "settings": settings,
        "tuning": {"clips": len(TUNING_SPLITS) * (limit or UNTIMED_LIMIT), "target": TUNING_TARGET, "points": points},
        "steps": step_times(pair, utterances(work, "test-seen", 1)[0]),
        "splits": {name: measure(work, pair, f"test-{name}", limit) for name in ("seen", "unseen")},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_reports(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("build/embedded_pair"))
    parser.add_argument("--limit", type=int, help="clips of each split, for a quick look")
    arguments = parser.parse_args()
    make_dataset(arguments.work_dir / "data", train_shards=0)
    evaluate_pair(arguments.work_dir, arguments.limit)


if __name__ == "__main__":
    main()
