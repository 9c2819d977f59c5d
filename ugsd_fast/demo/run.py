"""The three-way comparison: the same clips captioned by the drafter alone, by UGSD and by the verifier alone.

The methods take turns clip by clip, in rotating order and after a warm-up, so that a busy machine slows all of them
alike. Everything that the report shows is in the `Comparison` that comes out.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ugsd_fast.audio import Audio

if TYPE_CHECKING:
    from ugsd_fast import AudioLM, UGSDConfig
    from ugsd_fast.decoding import Result
    from ugsd_fast.verifier import Verifier

Method = Literal["edge", "ugsd", "verifier", "lossless"]
THREE_WAYS: tuple[Method, ...] = ("edge", "ugsd", "verifier")
FOUR_WAYS: tuple[Method, ...] = (*THREE_WAYS, "lossless")
DEMO_THRESHOLDS = (0.2, 1.0, 1.5)  # nats

Matches = Callable[[str, str], Mapping[str, bool]]
"""(caption, reference) -> whether each attribute that the reference states is stated alike."""


@dataclass(frozen=True)
class Utterance:
    """Something to caption.

    Attributes
    ----------
    name : str
        What the report calls it.
    audio : Audio
        The speech.
    reference : str, optional
        A caption to compare with.
    details : mapping of str to str
        Shown beside the name, such as the voice.
    """

    name: str
    audio: Audio
    reference: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """One method over all clips; times in seconds.

    Attributes
    ----------
    latency, time_to_first_token : float
        Medians over the clips.
    tokens_per_second : float
        All tokens / all latencies.
    escalated_share, acceptance_rate, acceptance_length : float
        As METRICS define them, over the pooled blocks.
    verifier_forwards, drafter_forwards : float
        Means over the clips.
    bleu1, bleu4 : float or None
        Corpus BLEU (sacrebleu); None without references.
    attribute_accuracy : float or None
        Mean over the clips; None without references or attributes.
    """

    latency: float
    time_to_first_token: float
    tokens_per_second: float
    escalated_share: float
    acceptance_rate: float
    acceptance_length: float
    verifier_forwards: float
    drafter_forwards: float
    bleu1: float | None = None
    bleu4: float | None = None
    attribute_accuracy: float | None = None


@dataclass(frozen=True)
class SweepPoint:
    """UGSD at one threshold, over all clips."""

    threshold: float
    summary: Summary


@dataclass
class Comparison:
    """What a run leaves for the report.

    Attributes
    ----------
    utterances : list of Utterance
    results : dict of method to list of Result
        One result a clip, in order.
    sweep : list of SweepPoint
        By rising threshold; empty without references.
    config : UGSDConfig
        Of the UGSD runs.
    settings : dict of str to str
        Models, prompt and everything else that one would need to run it again.
    decode : callable
        Text of token ids, for the pieces of a caption.
    matches : callable, optional
        Compares the attributes of two captions.
    failures : dict of str to str
        Inputs that could not be captioned, and why.
    """

    utterances: list[Utterance]
    results: dict[Method, list[Result]]
    config: UGSDConfig
    decode: Callable[[Sequence[int]], str]
    sweep: list[SweepPoint] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    matches: Matches | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def references(self) -> list[str] | None:
        """The reference captions; None unless every clip has one."""
        found = [utterance.reference for utterance in self.utterances]
        return [text for text in found if text is not None] if found and None not in found else None

    @cached_property
    def summaries(self) -> dict[Method, Summary]:
        """One `Summary` a method."""
        return {
            method: summarise(results, self.references, self.matches)
            for method, results in self.results.items()
            if results
        }

    def agreement(self, method: Method, other: Method = "verifier") -> tuple[int, int]:
        """(clips whose tokens are the same under both methods, clips)."""
        pairs = list(zip(self.results[method], self.results[other], strict=True))
        return sum(one.tokens == two.tokens for one, two in pairs), len(pairs)

    def gap_recovered(self, metric: str) -> float | None:
        """Share of the distance from drafter to verifier in `metric` that UGSD covers; None if there is none."""
        if not {"edge", "ugsd", "verifier"} <= self.summaries.keys():
            return None
        edge, ugsd, verifier = (getattr(self.summaries[method], metric) for method in THREE_WAYS)
        if edge is None or verifier <= edge:
            return None
        return (ugsd - edge) / (verifier - edge)

    def to_dict(self) -> dict[str, Any]:
        """All numbers and captions, as JSON takes them."""
        return {
            "settings": self.settings,
            "config": self.config.to_dict(),
            "summaries": {method: asdict(summary) for method, summary in self.summaries.items()},
            "sweep": [{"threshold": point.threshold, **asdict(point.summary)} for point in self.sweep],
            "clips": [
                {
                    "name": utterance.name,
                    "seconds": utterance.audio.duration,
                    "reference": utterance.reference,
                    "results": {method: results[index].to_dict() for method, results in self.results.items()},
                }
                for index, utterance in enumerate(self.utterances)
            ],
            "failures": self.failures,
        }


class Comparer:
    """Runs the methods over clips and collects their results.

    Parameters
    ----------
    draft : AudioLM or None
        Without one, only the verifier's captions are made.
    verifier : Verifier or None
        Without one, only the drafter's.
    config : UGSDConfig
        Of UGSD; the other methods are derived from it.
    prompt : str, optional
        The models' own by default.
    max_new_tokens : int
        A caption's limit.
    methods : sequence of str
        Which methods to run, where both models are there; `FOUR_WAYS` adds lossless speculative decoding.
    matches : callable, optional
        Compares the attributes of two captions.
    """

    def __init__(
        self,
        draft: AudioLM | None,
        verifier: Verifier | None,
        config: UGSDConfig,
        *,
        prompt: str | None = None,
        max_new_tokens: int = 128,
        methods: Sequence[Method] = THREE_WAYS,
        matches: Matches | None = None,
    ):
        from ugsd_fast import Decoder

        self._models = (draft, verifier)
        self._request: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens}
        self.decoders: dict[Method, Decoder] = {}
        for method in methods:
            needs_draft, needs_verifier = method != "verifier", method != "edge"
            if (needs_draft and draft is None) or (needs_verifier and verifier is None):
                continue
            settings = config
            if method == "lossless":
                if config.temperature > 0:
                    continue
                settings = replace(config, always_escalate=True, rule="greedy", bonus=None)
            self.decoders[method] = Decoder(
                draft if needs_draft else None, verifier if needs_verifier else None, settings
            )
        self.comparison = Comparison(
            [], {method: [] for method in self.decoders}, config, _decoder_of_text(draft, verifier), matches=matches
        )

    def warm_up(self, utterance: Utterance, *, max_new_tokens: int = 6) -> None:
        """Run every method once, for caches and lazy initialisation; nothing is recorded."""
        for decoder in self.decoders.values():
            decoder.generate(utterance.audio, **{**self._request, "max_new_tokens": max_new_tokens})

    def add(self, utterance: Utterance, results: Mapping[Method, Result] | None = None) -> dict[Method, Result]:
        """Caption one clip by every method, but for those whose `results` are there already."""
        found = dict(results or {})
        order = [method for method in self.decoders if method not in found]
        turn = len(self.comparison.utterances) % max(len(order), 1)
        for method in order[turn:] + order[:turn]:
            found[method] = self.decoders[method].generate(utterance.audio, **self._request)
        self.comparison.utterances.append(utterance)
        for method, collected in self.comparison.results.items():
            collected.append(found[method])
        return found

    def sweep(self, thresholds: Sequence[float] = DEMO_THRESHOLDS) -> Iterator[SweepPoint]:
        """Caption all clips again at each threshold, the configured one apart, which is there already."""
        from ugsd_fast import Decoder

        comparison, config = self.comparison, self.comparison.config
        known = {config.entropy_threshold: comparison.results["ugsd"]}
        for threshold in sorted({*thresholds, config.entropy_threshold}):
            results = known.get(threshold)
            if results is None:
                decoder = Decoder(*self._models, replace(config, entropy_threshold=threshold))
                results = [decoder.generate(one.audio, **self._request) for one in comparison.utterances]
            point = SweepPoint(threshold, summarise(results, comparison.references, comparison.matches))
            comparison.sweep.append(point)
            yield point


def summarise(results: Sequence[Result], references: Sequence[str] | None, matches: Matches | None = None) -> Summary:
    """Sum up one method's results; quality only where there are `references`."""
    from ugsd_fast.decoding import Trace

    metrics = [result.metrics for result in results]
    total = sum(one.latency for one in metrics)
    pooled = Trace([block for result in results for block in result.trace.blocks]).metrics(
        latency=total, time_to_first_token=0.0, verifier_forwards=0, drafter_forwards=0
    )
    texts = [result.text for result in results]
    return Summary(
        latency=statistics.median(one.latency for one in metrics),
        time_to_first_token=statistics.median(one.time_to_first_token for one in metrics),
        tokens_per_second=pooled.tokens_per_second,
        escalated_share=pooled.escalated_share,
        acceptance_rate=pooled.acceptance_rate,
        acceptance_length=pooled.acceptance_length,
        verifier_forwards=statistics.fmean(one.verifier_forwards for one in metrics),
        drafter_forwards=statistics.fmean(one.drafter_forwards for one in metrics),
        bleu1=None if references is None else bleu(texts, references, order=1),
        bleu4=None if references is None else bleu(texts, references, order=4),
        attribute_accuracy=None if references is None else _accuracy(texts, references, matches),
    )


def bleu(captions: Sequence[str], references: Sequence[str], *, order: int) -> float:
    """Corpus BLEU up to n-grams of `order`, 0 to 100 (sacrebleu, its 13a tokenizer, exponential smoothing).

    Examples
    --------
    >>> round(bleu(["a calm voice speaks"], ["a calm voice speaks"], order=4), 6)
    100.0
    """
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=order).corpus_score(list(captions), [list(references)]).score


def machine() -> dict[str, str]:
    """What the figures were measured on: processor, threads and versions."""
    import torch
    import transformers

    from ugsd_fast import __version__

    found = {
        "Processor": processor(),
        "Cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "Threads used": str(torch.get_num_threads()),
        "System": f"{platform.system()} {platform.machine()}",
        "Versions": f"ugsd-fast {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {sys.version.split()[0]}",
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accuracy(captions: Sequence[str], references: Sequence[str], matches: Matches | None) -> float | None:
    if matches is None:
        return None
    compared = [matches(caption, reference) for caption, reference in zip(captions, references, strict=True)]
    shares = [sum(same.values()) / len(same) for same in compared if same]
    return statistics.fmean(shares) if shares else None


def _decoder_of_text(draft: Any, verifier: Any) -> Callable[[Sequence[int]], str]:
    return (draft if draft is not None else verifier).decode
