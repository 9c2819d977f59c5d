"""Makes reports of ``bench/results/*.json``: those of ``docs`` that its `write` names, and two sections of README.

``python -m bench.summary`` writes them anew without measuring anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import compile_report, gpu, traffic
from bench.harness import Row, target_text
from bench.kernels import accept_block, kv_compact, lm_head_stats, sample
from bench.markdown import machine_lines, number, table
from examples.embedded_pair.report import NAMES, SPLITS

ROOT = Path(__file__).resolve().parents[1]
NOTES = Path(__file__).with_name("notes.md")
HOW = """\
**How.** All contenders of a row run in one process and take turns, in a shuffled order: each round times each of them
once, over some milliseconds of calls. Medians over rounds; a ratio is the median of the ratios within a round. The op
is called as users call it, Python included. *Floor*: a bare read of the bytes that the result depends on (the faster
of glibc's `wmemchr` and torch's sum of the bytes as int64; with two threads the sum alone), for `kv_compact` a memcpy
of what moves, for `filter_logits` a copy to float32; *share of floor* is the floor's time over the op's, 100% being as
fast as reading. *Warm*: inputs in the last-level cache or nearer, as logits are that a model has just written (the
cache of `kv_compact` and the weight of `lm_head_stats` are larger and come from memory); *cold*: every call reads from
memory. *Normal* logits are gaussian × 3; *peaked* ones are synthetic, shaped like a language model's: a Zipf-like tail
and three strong candidates, top probability about 0.9. `×` behind a number is how many times the op's time the
baseline takes. Targets are for one thread, warm."""
REPORTS = {"traffic": traffic.document, "compile": compile_report.document, "gpu": gpu.document}
"""What makes a Markdown file of a result, by the name of both."""

MEASURABLE = 1 << 16  # bytes; a share of a floor under this only shows the cost of a call

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#000000"


class Headline(NamedTuple):
    """A case that README and the figure show, one thread and warm, with peaked logits where it takes any."""

    op: str
    case: str
    baseline: str


HEADLINES = (
    Headline("token_stats", "1 row", "torch eager"),
    Headline("token_stats", "5 rows", "torch eager"),
    Headline("logprob_rank", "from logits", "torch eager"),
    Headline("logprob_rank", "logsumexp given", "torch eager"),
    Headline("sample", "plain", sample.TRANSFORMERS),
    Headline("sample", "top-k 50, top-p 0.9", sample.TRANSFORMERS),
    Headline("filter_logits", "top-k 50, top-p 0.9", "transformers warpers"),
    Headline("accept_block", "exact, acceptance 0.5, draft logsumexp given", accept_block.TRANSFORMERS),
    Headline("accept_block", "block, acceptance 0.5, draft logsumexp given", accept_block.TRANSFORMERS),
    Headline("accept_block", "greedy, acceptance 1", accept_block.GREEDY),
    Headline("accept_block", "rank, acceptance 1", accept_block.GREEDY),
    Headline("gate_block", "whole blocks", "torch eager"),
    Headline("kv_compact", "full gather: a random half", kv_compact.INDEX),
    Headline("kv_compact", "ragged tail of 8 slots", kv_compact.COPIES),
    Headline("lm_head_stats", "1 row", lm_head_stats.TORCH),
    Headline("lm_head_stats", "6 rows", lm_head_stats.TORCH),
)


def rows_of(kernels: Row) -> Iterator[tuple[str, Row]]:
    """Yield every row of ``kernels.json`` with its op."""
    for run in kernels["runs"]:
        for row in run["rows"]:
            yield run["op"], row


def headline_rows(kernels: Row, headline: Headline) -> dict[str, Row]:
    """Return a headline's rows by dtype."""
    found: dict[str, Row] = {}
    for op, row in rows_of(kernels):
        plain = row["threads"] == 1 and row["cache"] == "warm" and row["logits"] in ("peaked", None)
        if plain and (op, row["case"]) == headline[:2] and headline.baseline in row["baselines"]:
            found.setdefault(row["dtype"], row)
    return found


def share_of_floor(row: Row) -> str:
    """Return the time of the floor over the op's in percent, where it says anything."""
    return f"{row['floor']['share']['median']:.0%}" if row["bytes"] >= MEASURABLE else "–"


def condition_line(conditions: Sequence[Row]) -> str:
    """Return under which conditions the runs were."""
    thresholds = (
        "raised to 1 GiB" if all(one["malloc_thresholds_raised"] for one in conditions) else "at their defaults"
    )
    rounds = sorted({one["rounds"] for one in conditions})
    loads = [one["load_before"] for one in conditions]
    return (
        f"- malloc's mmap and trim thresholds {thresholds}; {' or '.join(map(str, rounds))} rounds; load of the "
        f"machine before the runs {min(loads):.1f} to {max(loads):.1f} (quiet: below 1), preemptions during them "
        f"{sum(one['preemptions'] for one in conditions)}"
    )


def targets_table(kernels: Row) -> list[str]:
    """Return every target with the range of what was measured over the kinds of logits."""
    judged: dict[tuple[str, str, str, str], list[Row]] = {}
    for op, row in rows_of(kernels):
        for target in row["targets"]:
            judged.setdefault((op, row["case"], row["dtype"], target_text(target)), []).append(target)
    lines = []
    for (op, case, dtype, text), targets in judged.items():
        measured = sorted(target["measured"] for target in targets)
        span = " – ".join(f"{number(value)}×" for value in dict.fromkeys((measured[0], measured[-1])))
        met = sum(target["met"] for target in targets)
        verdict = "yes" if met == len(targets) else "**no**" if not met else f"**{met} of {len(targets)}**"
        lines.append((f"`{op}`", case, dtype, text, span, verdict))
    return table(("op", "case", "dtype", "target", "measured", "met"), lines, 4)


def op_table(rows: Sequence[Row]) -> list[str]:
    """Return all rows of an op."""
    baselines = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    lines = []
    for row in rows:
        subject = row["subject"]
        against = [row["baselines"].get(name) for name in baselines]
        lines.append(
            (
                row["case"],
                row["dtype"],
                row["logits"] or "–",
                row["cache"],
                str(row["threads"]),
                number(subject["median"]),
                f"{number(subject['p10'])} – {number(subject['p90'])}",
                share_of_floor(row),
                *(f"{number(one['ratio']['median'])}× ({number(one['median'])})" if one else "–" for one in against),
                "; ".join(f"{target_text(one)}: {'yes' if one['met'] else '**no**'}" for one in row["targets"]) or "–",
            )
        )
    header = ("case", "dtype", "logits", "cache", "threads", "median µs", "p10 – p90", "share of floor")
    return table((*header, *(f"{name} (µs)" for name in baselines), "target: met"), lines, 4)


def overhead_lines(overhead: Row) -> list[str]:
    """Return the section on the decoding loop."""
    target = overhead["target"]
    lines = [
        (name, number(step["median"]), f"{number(step['p10'])} – {number(step['p90'])}")
        for name, step in overhead["step_us"].items()
    ]
    spread = overhead["overhead_us"]
    return [
        "## The decoding loop",
        "",
        f"Greedy decoding of {overhead['tokens']} tokens by a {overhead['model']}, one thread, blocks of "
        f"{overhead['block_size']}; the time of a request over its tokens. The loop costs "
        f"**{number(spread['median'])} µs a draft step** over the bare forwards (p10 – p90: {number(spread['p10'])} – "
        f"{number(spread['p90'])}); target ≤ {target['at_most']} µs: {'met' if target['met'] else '**missed**'}. The "
        "bare forwards call the whole model; behind the audio the loop calls its text decoder and head alone, which "
        "makes up for some of what it costs.",
        "",
        *table(("loop", "µs a step", "p10 – p90"), lines, 1),
        "",
    ]


def cache_lines(cache: Row) -> list[str]:
    """Return the section on the key/value cache."""
    step, ragged = cache["step"], cache["ragged"]
    target, ours = step["target"], step["step_us"]["GrowingCache"]

    def rows(timings: Row) -> list[tuple[str, str, str]]:
        return [
            (name, number(us["median"]), f"{number(us['p10'])} – {number(us['p90'])}") for name, us in timings.items()
        ]

    return [
        "## The key/value cache",
        "",
        f"One decode step of {cache['shape']}, batch 1, {step['context']} tokens cached, one thread, without a model: "
        f"the growing cache costs **{number(ours['median'])} µs a step** (p10 – p90: {number(ours['p10'])} – "
        f"{number(ours['p90'])}), {number(step['faster']['median'])}× less than concatenation; target ≤ "
        f"{target['at_most']} µs: {'met' if target['met'] else '**missed**'}. The floor copies the step's "
        f"{step['bytes']:,} bytes, a layer at a time.",
        "",
        *table(("cache", "µs a step", "p10 – p90"), rows(step["step_us"]), 1),
        "",
        f"A block of 5 tokens appended to {ragged['batch']} rows at {ragged['context']} tokens, then 0 to 4 of them "
        "rolled back in each row, another number in every row:",
        "",
        *table(("cache", "µs a block", "p10 – p90"), rows(ragged["block_us"]), 1),
        "",
    ]


def batch_lines(batch: Row) -> list[str]:
    """Return the section on batches."""
    lines = []
    for row in batch["rows"]:
        rates, faster, target = row["tokens_per_second"], row["faster"], row["target"]
        verdict = "" if target is None else f"≥ {target['at_least']:g}×: {'met' if target['met'] else '**missed**'}"
        lines.append(
            (
                row["pair"],
                row["setting"],
                str(row["batch"]),
                number(rates["single"]["median"]),
                number(rates["batch"]["median"]),
                f"{faster['median']:.2f}×",
                f"{faster['p10']:.2f} – {faster['p90']:.2f}",
                verdict,
            )
        )
    header = ("pair", "setting", "requests", "one by one, tokens/s", "together", "faster", "p10 – p90", "target")
    return [
        "## Batches",
        "",
        "The same requests one after another and in one `generate` call, one thread, prompts prepared, prefill timed; "
        "both emit the same tokens. Decoding shares its forwards; a prompt's audio and text is arithmetic that a batch "
        "does not make less of on a CPU, and a gated request has few other forwards of the verifier's to share.",
        "",
        *table(header, lines, 2),
        "",
    ]


def assisted_lines(assisted: Row) -> list[str]:
    """Return the section on transformers' assisted generation."""

    def fastest(row: Row, kind: str) -> str:
        return number(min(ms["median"] for name, ms in row["ms"].items() if name.startswith(kind)))

    def times(row: Row, kind: str) -> str:
        ratio, target = row["faster"][kind], row["targets"].get(kind)
        verdict = "" if target is None else f" (≥ {target['at_least']:g}×: {'met' if target['met'] else '**missed**'})"
        return f"{ratio['median']:.2f}× [{ratio['p10']:.2f}, {ratio['p90']:.2f}]{verdict}"

    lines = [
        (
            row["pair"],
            str(row["tokens"]),
            " / ".join(f"{rate:.2f}" for rate in row["acceptance_rate"].values()),
            *(fastest(row, kind) for kind in ("decoder", "custom_generate", "stock", "hearing", "verifier's generate")),
            times(row, "stock"),
            times(row, "hearing"),
        )
        for row in assisted["rows"]
    ]
    header = ("pair", "tokens", "accepted", "decoder, ms", "custom_generate", "stock", "hearing", "verifier alone")
    return [
        "## Against transformers' assisted generation",
        "",
        "Lossless greedy, the same tokens from all, one thread, prefill timed; three demo clips, or one of noise for "
        "the tiny pair. *Stock*: transformers as it is, whose drafter does not hear the audio; *hearing*: patched so "
        "that it does. For each the fastest of its settings counts: transformers with 5 tokens a block, with up to 20 "
        "(its default) or 64, cut at a confidence of 0.4; the decoder with 5, and with up to 64 under "
        '`adaptive="cost"`. *Accepted* is the rate of either. Targets count where blocks of 5 are accepted to 0.5 – '
        "0.9. The embedded pair's time is nearly all in its forwards, which every loop pays; the tiny pair shows the "
        "loops.",
        "",
        *table((*header, "faster than stock", "than hearing"), lines, 1),
        "",
    ]


DECODING = {"overhead": overhead_lines, "cache": cache_lines, "batch": batch_lines, "assisted": assisted_lines}
"""The decoding benchmarks by module and file, each with what writes its section."""


def document(kernels: Row, **decoding: Row | None) -> str:
    """Return ``docs/benchmarks.md``; what `DECODING` names goes by these names."""
    conditions = [run["conditions"] for run in kernels["runs"]]
    lines = [
        "# Benchmarks of the ops",
        "",
        f"Written by `make bench` ({kernels['date']}); the numbers are in `bench/results/kernels.json`.",
        "",
        *machine_lines(kernels["machine"]),
        condition_line(conditions),
        "- backends: " + ", ".join(f"`{op}` {backend}" for op, backend in backends_of(kernels).items()),
        "",
        HOW,
        "",
        "![Speed against baselines, and share of the floor](benchmarks.png)",
        "",
        "## Targets",
        "",
        *targets_table(kernels),
        "",
    ]
    if NOTES.exists():
        lines += [NOTES.read_text().strip(), ""]
    for op in backends_of(kernels):
        rows = [row for name, row in rows_of(kernels) if name == op]
        shapes = ", ".join(dict.fromkeys(row["shape"] for row in rows))
        lines += [f"## `{op}`", "", f"Shapes: {shapes}.", "", *op_table(rows), ""]
    for name, section in DECODING.items():
        found = decoding.get(name)
        if found:
            lines += section(found)
    return "\n".join(lines).rstrip() + "\n"


def backends_of(kernels: Row) -> dict[str, str]:
    """Return the backend of each op that ran, in order."""
    return {run["op"]: run["backend"] for run in kernels["runs"]}


def both(found: dict[str, Row], text: Any) -> str:
    """Return a cell of a float32 and a bfloat16 figure, or of the only one there is."""
    figures = [text(found[dtype]) for dtype in ("float32", "bfloat16") if dtype in found]
    return " / ".join(figures)


def kernels_section(kernels: Row) -> str:
    """Return README's short table."""
    lines = []
    for headline in HEADLINES:
        found = headline_rows(kernels, headline)
        if found:
            name = headline.baseline
            median = both(found, lambda row: number(row["subject"]["median"]))
            ratio = both(found, lambda row, name=name: f"{number(row['baselines'][name]['ratio']['median'])}×")
            lines.append((f"`{headline.op}`", headline.case, median, both(found, share_of_floor), ratio, name))
    header = ("op", "case", "µs", "share of floor", "faster", "than")
    machine = kernels["machine"]
    return "\n".join(
        [
            f"One thread of an {machine['cpu']} ({machine['isa']}), vocabulary 152064, LM-like logits, inputs in "
            "cache; 5 rows where not said, blocks of 5 tokens; float32 / bfloat16 (the last two ops bfloat16 alone). "
            "*Share of floor*: time of a bare read of the same bytes over the op's. Spread, other settings, targets, "
            "and which of them are missed: [docs/benchmarks.md](docs/benchmarks.md).",
            "",
            *table(header, lines, 2),
            "",
            "![Speed against baselines, and share of the floor](docs/benchmarks.png)",
        ]
    )


def embedded_pair_section(results: Row) -> str:
    """Return README's table of the embedded pair."""
    percent = "{:.1%}".format
    splits = {name: split for name, split in results["splits"].items() if name in SPLITS}
    header = ["method"]
    for name in splits:
        header += [
            f"{SPLITS[name].split(',')[0].lower()}: attributes right",
            "BLEU-4",
            "escalated",
            "latency",
            "speed-up",
        ]
    lines = []
    for method, title in NAMES.items():
        line = [title]
        for split in splits.values():
            quality, speed = split["methods"][method], split["speed"][method]
            asks = method in ("ugsd", "lossless")
            line += [
                percent(quality["attribute_accuracy"]),
                f"{quality['bleu4']:.1f}",
                percent(quality["escalated_share"]) if asks else "–",
                f"{speed['latency_ms']:.0f} ms",
                f"{speed['speedup']:.2f}×",
            ]
        lines.append(line)
    clips = ", ".join(f"{split['clips']} clips of {SPLITS[name].lower()}" for name, split in splits.items())
    return "\n".join(
        [
            f"Held-out synthetic speech: {clips}. Latency is the median from waveform to caption on one CPU thread, "
            "speed-up is over the verifier alone. By attribute, by threshold and with spread: "
            "[docs/embedded-pair.md](docs/embedded-pair.md).",
            "",
            *table(header, lines, 1),
        ]
    )


def replace_section(text: str, name: str, content: str) -> str:
    """Put ``content`` between ``<!-- name -->`` and ``<!-- /name -->``; text without the markers stays as it is."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def draw(kernels: Row, path: Path) -> None:
    """Draw the headlines: how many times faster than the baseline, and the share of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(headline, headline_rows(kernels, headline)) for headline in HEADLINES]
    found = [(headline, rows) for headline, rows in found if rows]
    figure, (speed, floor) = pyplot.subplots(
        1, 2, figsize=(12, 1.6 + 0.5 * len(found)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    for place, (headline, rows) in enumerate(found):
        present = [dtype for dtype in ("float32", "bfloat16") if dtype in rows]
        for i, dtype in enumerate(present):
            row = rows[dtype]
            y = place + (0.4 * i - 0.2 if len(present) > 1 else 0)
            style = {"height": 0.36, "color": BLUE if dtype == "float32" else ORANGE}
            ratio = row["baselines"][headline.baseline]["ratio"]
            error = [[ratio["median"] - ratio["p10"]], [ratio["p90"] - ratio["median"]]]
            speed.barh(y, ratio["median"] - 1, left=1, xerr=error, error_kw={"lw": 0.8}, **style)
            end = ratio["p90"]
            for target in row["targets"]:
                if target["of"] == headline.baseline:
                    wanted = target["at_least"] if "at_least" in target else 1 / target["at_most"]
                    speed.plot([wanted, wanted], [y - 0.2, y + 0.2], color=BLACK, lw=1.6)
                    end = max(end, wanted)
            speed.text(max(end, 1) * 1.06, y, f"{number(ratio['median'])}×", va="center", fontsize=8)
            if row["bytes"] >= MEASURABLE:
                share = row["floor"]["share"]["median"]
                floor.barh(y, 100 * share, **style)
                floor.text(100 * share + 1, y, f"{share:.0%}", va="center", fontsize=8)
    labels = [f"{headline.op}: {headline.case}\nagainst {headline.baseline}" for headline, _ in found]
    speed.set_yticks(range(len(found)), labels, fontsize=8)
    speed.invert_yaxis()
    speed.set_xscale("log")
    speed.axvline(1, color=BLACK, lw=0.6)
    speed.set_xlabel("times faster than the baseline (bold line: target; whisker: p10 – p90)")
    floor.axvline(100, color=BLACK, lw=0.6)
    floor.set_xlabel("share of the floor, %")
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, ORANGE)]
    speed.legend(keys, ("float32", "bfloat16"), loc="lower right", fontsize=8)
    figure.suptitle("One thread, warm cache, vocabulary 152064, LM-like logits", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def load(path: Path) -> Row | None:
    """Return a file of results, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def write(results: Path, docs: Path, readme: Path | None) -> None:
    """Write every report for which there are results.

    Parameters
    ----------
    results
        Folder of ``kernels.json``, ``embedded_pair.json`` and those that `DECODING` and `REPORTS` name, each optional.
    docs
        Folder for ``benchmarks.md``, ``benchmarks.png`` and a Markdown file for each of `REPORTS`.
    readme
        File whose marked sections are written anew, None to leave README alone.
    """
    kernels, pair = load(results / "kernels.json"), load(results / "embedded_pair.json")
    docs.mkdir(parents=True, exist_ok=True)
    for name, report in REPORTS.items():
        found = load(results / f"{name}.json")
        if found:
            (docs / f"{name}.md").write_text(report(found))
    if kernels:
        (docs / "benchmarks.md").write_text(
            document(kernels, **{name: load(results / f"{name}.json") for name in DECODING})
        )
        draw(kernels, docs / "benchmarks.png")
    if readme:
        text = readme.read_text()
        if kernels:
            text = replace_section(text, "kernels", kernels_section(kernels))
        if pair:
            text = replace_section(text, "embedded-pair", embedded_pair_section(pair))
        readme.write_text(text)


if __name__ == "__main__":
    write(ROOT / "bench" / "results", docs=ROOT / "docs", readme=ROOT / "README.md")
