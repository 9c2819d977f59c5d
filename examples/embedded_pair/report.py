"""The evaluation as Markdown: ``docs/embedded-pair.md`` and the pair's ``MODEL_CARD.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ugsd_fast.demo import PAIR_FOLDER
from ugsd_fast.demo.attributes import ATTRIBUTES

DOCUMENT = Path("docs/embedded-pair.md")
NAMES = {"edge": "drafter alone", "ugsd": "UGSD (default)", "lossless": "lossless greedy", "verifier": "verifier alone"}
SPLITS = {"seen": "Known voices, new sentences", "unseen": "New voices, new sentences"}

_CARD = """# The embedded pair

Two small audio-language models that caption the emotion in short English speech. They exist so that this library's
decoding can be run, tested and measured offline on any CPU. They are no use for real emotion recognition: **all their
speech is synthetic**, made by the formant synthesiser espeak-ng, and each emotion is a rule that shapes the signal,
not a human performance.

{settings}

## Results on held-out clips

{tables}

More, with threshold sweeps: `docs/embedded-pair.md` in the repository.

## Data

- Speech: espeak-ng voices in {accents} English accents, with vocal-tract scaling, rooms, equalisers and noise. The
  voices of `tune-unseen` and `test-unseen` and all tuning and test sentences are absent from the training data.
- Attributes are drawn independently of each other: emotion (8), intensity (3, none for neutral), gender, pitch, pace,
  loudness, melody. Emotion is heard in the voice quality: angry is saturated and bright, sad dull and fading, happy
  has vibrato and a wide range, fearful trembles, disgusted is nasal, surprised takes a breath first, calm is breathy.
  Intensity is the size of that mark.
- Captions follow one grammar without free choices, so a caption can be read back into its attributes
  (`ugsd_fast.demo.attributes`) and what is uncertain in it is what was heard.

## Limits

- Real recordings are outside of what the models have heard: the captions of human speech are fluent and mean nothing.
- One language, one speaker, one prompt (`{prompt}`), clips of at most 4 s.
- The models name a gender from pitch and formants of synthetic voices. Do not apply them to people.
- UGSD accepts certain blocks without asking the verifier: its output is not the verifier's. Only
  `always_escalate=True` with a lossless rule is.
- The clips and the training data were made with espeak-ng (GPLv3), a build-time tool that is not part of this package.
- The shipped weights were made by this code and these seeds, with two differences: the synthesiser's noise was seeded
  with the time in the training shards (it is seeded with a constant now), and the first 446 steps of the verifier
  followed a slower decay of the learning rate. A new run gives models of the same kind, not the same bits.
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _methods_table(split: dict[str, Any]) -> list[str]:
    lines = [
        "| method | attribute accuracy | BLEU-1 | BLEU-4 | escalated | acceptance | latency | speed-up (p10–p90) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, name in NAMES.items():
        one, speed = split["methods"][method], split["speed"][method]
        verified = one["verifier_forwards"] and method in ("ugsd", "lossless")
        lines.append(
            f"| {name} | {_percent(one['attribute_accuracy'])} | {one['bleu1']:.1f} | {one['bleu4']:.1f} "
            f"| {_percent(one['escalated_share']) if verified else '–'} "
            f"| {_percent(one['acceptance_rate']) if verified else '–'} | {speed['latency_ms']:.1f} ms "
            f"| {speed['speedup']:.2f}× ({speed['speedup_p10']:.2f}–{speed['speedup_p90']:.2f}) |"
        )
    return lines


def _attributes_table(split: dict[str, Any]) -> list[str]:
    lines = [f"| method | {' | '.join(ATTRIBUTES)} |", "|---|" + "---:|" * len(ATTRIBUTES)]
    for method, name in NAMES.items():
        values = split["methods"][method]["by_attribute"]
        lines.append(f"| {name} | {' | '.join(_percent(values[attribute]) for attribute in ATTRIBUTES)} |")
    return lines


def _sweep_table(split: dict[str, Any]) -> list[str]:
    lines = [
        "| rank | threshold | escalated | attribute accuracy | gap recovered | BLEU-4 | gap recovered | acceptance |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines.extend(
        f"| {point['rank']} | {point['threshold']:g} | {_percent(point['escalated_share'])} "
        f"| {_percent(point['attribute_accuracy'])} | {_percent(point['gap_recovered_attribute_accuracy'])} "
        f"| {point['bleu4']:.1f} | {_percent(point['gap_recovered_bleu4'])} | {_percent(point['acceptance_rate'])} |"
        for point in split["sweep"]
    )
    return lines


def _facts(split: dict[str, Any]) -> list[str]:
    ugsd, auc = split["methods"]["ugsd"], split["entropy_auc"]
    along, drafted = auc["along_verifier_captions"], auc["along_drafts"]
    return [
        f"- UGSD recovers {_percent(ugsd['gap_recovered_attribute_accuracy'])} of the drafter-to-verifier gap in "
        f"attribute accuracy and {_percent(ugsd['gap_recovered_bleu4'])} in BLEU-4, escalating "
        f"{_percent(ugsd['escalated_share'])} of the draft tokens.",
        f"- The drafter's entropy predicts that its argmax is not the verifier's with AUC {along['auc']:.3f} along the "
        f"verifier's captions and {drafted['auc']:.3f} along its own; mean entropy "
        f"{along['entropy_where_agreeing']:.3f} nats where they agree, {along['entropy_where_not']:.3f} where not "
        f"({_percent(along['disagreement'])} of tokens).",
        f"- Lossless greedy speculative decoding writes the tokens of the verifier's own `generate` on "
        f"{_percent(split['lossless_equals_generate'])} of {split['clips']} clips.",
    ]


def _settings(results: dict[str, Any]) -> list[str]:
    config, steps = results["settings"]["config"], results["steps"]
    training = results["settings"]["training"]
    sizes = ", ".join(
        f"{name} {one['parameters'] / 1e6:.2f} M parameters "
        f"(text layers: {one['text_layers'] + one['grown_layers']}, steps: {one['steps_done']})"
        for name, one in training.items()
    )
    return [
        f"- Models: {sizes}; both `Qwen2AudioForConditionalGeneration`, weights stored in float16.",
        f"- Default: block {config['block_size']}, {config['rule']} {config['rank']}, escalate above "
        f"{config['entropy_threshold']:g} nats (largest token entropy), chosen on {results['tuning']['clips']} tuning "
        f"clips: the highest threshold that recovers {_percent(results['tuning']['target'])} of the gap there in both "
        "metrics.",
        f"- One cached decoding step (float32, one thread): drafter {steps['drafter_step_ms']:.2f} ms, verifier "
        f"{steps['verifier_step_ms']:.2f} ms, ratio {steps['step_ratio']:.1f}.",
        f"- Measured on {results['machine']['Processor']}, {results['machine']['Threads used']} thread; "
        f"{results['machine']['Versions']}.",
    ]


def write_reports(results: dict[str, Any]) -> None:
    """Write both documents from ``bench/results/embedded_pair.json``'s content."""
    head = _settings(results)
    tables: list[str] = []
    document = ["# The embedded pair, measured", "", "Written by `examples/embedded_pair/evaluate.py`.", "", *head]
    for name, title in SPLITS.items():
        split = results["splits"][name]
        body = [f" {title} ({split['clips']} clips)", "", *_methods_table(split), "", *_facts(split), ""]
        tables += ["###" + body[0], *body[1:]]
        document += ["", "##" + body[0], *body[1:]]
        document += ["Accuracy by attribute:", "", *_attributes_table(split), ""]
        document += [f"Thresholds (UGSD on the first {split['sweep_clips']} of these clips):", "", *_sweep_table(split)]
    document += [
        "",
        "Latency: median over the clips, from waveform to caption, methods taking turns clip by clip; a speed-up is "
        "the verifier's latency over the method's on the same clip. Rank 20 of a vocabulary of 800 accepts almost "
        "anything; it is listed because it is the paper's default.",
    ]
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text("\n".join(document) + "\n")
    card = _CARD.format(
        settings="\n".join(head), tables="\n".join(tables).strip(), accents=8, prompt=results["settings"]["prompt"]
    )
    (PAIR_FOLDER / "MODEL_CARD.md").write_text(card)
