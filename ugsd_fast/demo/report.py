"""One self-contained HTML page of a `Comparison`: captions by token, a table, plots, audio.

The page needs nothing but itself: styles, script, plots and audio are inside it, and its content security policy
forbids the browser to load anything else.
"""

from __future__ import annotations

import base64
import errno
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ugsd_fast.audio import Audio

if TYPE_CHECKING:
    from ugsd_fast.decoding import BlockRecord, Result
    from ugsd_fast.demo.run import Comparison, Method, Summary

TITLES: dict[str, str] = {
    "edge": "Edge only",
    "ugsd": "UGSD",
    "verifier": "Verifier only",
    "lossless": "Lossless",
}
EXPLAINED: dict[str, str] = {
    "edge": "the drafter alone",
    "ugsd": "uncertain blocks go to the verifier",
    "verifier": "the verifier alone, token by token",
    "lossless": "every block goes to the verifier, rule greedy",
}
SOURCES: dict[str, tuple[str, str]] = {
    "edge": ("", "drafted on the edge and kept there; the verifier has not seen it"),
    "accepted": ("✓", "drafted on the edge, accepted by the verifier"),
    "corrected": ("≠", "the verifier's, in place of a rejected draft token"),
    "bonus": ("+", "the verifier's, after a block accepted whole"),
    "verifier": ("", "written by the verifier alone"),
}


@dataclass(frozen=True)
class Level:
    """A bin of entropy: nats below `upper`, and (background, ink) on a light and on a dark page."""

    upper: float
    light: tuple[str, str]
    dark: tuple[str, str]


# The cividis scale, turned so that uncertainty stands out from the page in either theme: its lightness runs one way
# only, which is what is left of it without colour vision. The bar under a token says the same without any colour.
LEVELS = (
    Level(0.05, ("#ffffff", "#16202b"), ("#171d25", "#e8edf2")),
    Level(0.25, ("#fbf3c4", "#16202b"), ("#1d3157", "#f0f4f8")),
    Level(0.5, ("#ecd968", "#16202b"), ("#3f4c6b", "#ffffff")),
    Level(1.0, ("#b9ab6e", "#10171f"), ("#66676d", "#ffffff")),
    Level(2.0, ("#5a6070", "#ffffff"), ("#b7ab6c", "#0d1218")),
    Level(math.inf, ("#0b2550", "#ffffff"), ("#fee838", "#0d1218")),
)

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # no HTML document may hold one


def level_of(entropy: float | None) -> int | None:
    """Index in `LEVELS` of an entropy in nats; None for a token that the drafter did not sample."""
    if entropy is None:
        return None
    return next(index for index, level in enumerate(LEVELS) if entropy < level.upper or level.upper == math.inf)


@dataclass(frozen=True)
class TokenView:
    """A token as the page shows it: `space` before it stays outside its box; `ends` marks the one after the text."""

    space: str
    text: str
    source: str
    level: int | None
    value: str
    tip: str
    ends: bool


@dataclass(frozen=True)
class BlockView:
    """A block of tokens, with the draft tokens that the verifier rejected."""

    tokens: list[TokenView]
    escalated: bool
    rejected: str
    rejected_at: int
    tip: str


def pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], prefix: Sequence[int] = ()) -> list[str]:
    """Text that each token adds after `prefix`; a character spread over tokens comes with the last of them.

    Examples
    --------
    >>> pieces(lambda tokens: bytes(tokens).decode(errors="replace"), [104, 195, 164], prefix=[72])
    ['h', '', 'ä']
    """
    from ugsd_fast.decoding.text import IncrementalText

    text = IncrementalText(decode)
    if prefix:
        text.extend(prefix)
    return [text.extend([token], final=index == len(tokens) - 1) for index, token in enumerate(tokens)]


def blocks_of(result: Result, decode: Callable[[Sequence[int]], str], threshold: float) -> Iterator[BlockView]:
    """The blocks of one caption, token by token."""
    texts, last = iter(pieces(decode, result.tokens)), 0
    for number, block in enumerate(result.trace.blocks, start=1):
        views = []
        for token in block.tokens():
            text = next(texts)
            level = level_of(token.entropy)
            value = "" if token.entropy is None else f"{token.entropy:.2f}"
            tip = f"{token.source}: {SOURCES[token.source][1]}"
            if token.entropy is not None:
                tip = f"entropy {value} nats · {tip}"
            elif token.source == "corrected":
                tip = f"drafter's entropy here {block.entropy[block.num_accepted]:.2f} nats · {tip}"
            text = _CONTROL.sub("\ufffd", text)
            core = text.lstrip()
            last += 1
            ends = not core and last == len(result.tokens)
            space = text[: len(text) - len(core)]
            views.append(TokenView(space, core or "·", token.source, level, value, tip, ends))
        dropped = block.draft_tokens[block.num_accepted :]
        kept = result.tokens[: block.start + block.num_accepted]
        yield BlockView(
            tokens=views,
            escalated=block.escalated and bool(block.draft_tokens),
            rejected="".join(pieces(decode, dropped, kept)).strip() or ("(end)" if dropped else ""),
            rejected_at=block.num_accepted,
            tip=_block_tip(number, block, threshold),
        )


def _block_tip(number: int, block: BlockRecord, threshold: float) -> str:
    if not block.draft_tokens:
        return ""
    if not block.escalated:
        return f"block {number}: uncertainty {block.uncertainty:.2f} nats, kept on the edge"
    sign = ">" if block.uncertainty > threshold else "≤"
    verdict = f"{block.num_accepted} of {len(block.draft_tokens)} draft tokens accepted"
    if not block.verified:
        verdict = "no answer from the verifier, the draft stands unverified"
    return (
        f"block {number}: uncertainty {block.uncertainty:.2f} {sign} {_nats(threshold)}, escalated · {verdict} · "
        f"verifier {1e3 * block.verify_seconds:.1f} ms"
    )


def render(comparison: Comparison, *, title: str = "Uncertainty-guided speculative decoding") -> str:
    """The report as HTML text.

    Parameters
    ----------
    comparison : Comparison
        Of `ugsd_fast.demo.run`.
    title : str
        Heading of the page.

    Returns
    -------
    str
        A whole document, that needs no other file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ugsd_fast.demo", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nats"] = _nats
    return environment.get_template("report.html.j2").render(
        title=title,
        comparison=comparison,
        config=comparison.config,
        titles=TITLES,
        explained=EXPLAINED,
        sources=SOURCES,
        levels=LEVELS,
        level_ranges=_level_ranges(),
        tiles=list(_tiles(comparison)),
        columns=table_columns(comparison),
        rows=list(table_rows(comparison)),
        plots=_plots(comparison),
        clips=list(_clips(comparison)),
        lossless=lossless_check(comparison),
        data=_rounded(comparison.to_dict()),
    )


def _rounded(value: Any) -> Any:
    """JSON with as many digits as mean something, and none of the infinities that it has no word for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value


def _level_ranges() -> list[str]:
    lower, ranges = 0.0, list[str]()
    for level in LEVELS:
        ranges.append(f"{lower:g} to {level.upper:g}" if level.upper < math.inf else f"{lower:g} and more")
        lower = level.upper
    return ranges


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def _nats(entropy: float) -> str:
    return f"{entropy:.1f} nats" if entropy == round(entropy, 1) else f"{entropy:g} nats"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _tiles(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """(figure, what it is, what it is relative to) of the headline."""
    summaries = comparison.summaries
    ugsd, verifier = summaries.get("ugsd"), summaries.get("verifier")
    if ugsd is not None:
        accuracy, bleu4 = comparison.gap_recovered("attribute_accuracy"), comparison.gap_recovered("bleu4")
        if accuracy is not None:
            beside = "" if bleu4 is None else f"; {_percent(bleu4)} of that in BLEU-4"
            yield _percent(accuracy), "of the quality gap recovered", f"attribute accuracy{beside}"
        elif bleu4 is not None:
            yield _percent(bleu4), "of the quality gap recovered", "BLEU-4, drafter to verifier"
        if verifier is not None:
            yield _percent(ugsd.escalated_share), "of draft tokens escalated", "the rest never left the edge"
            faster = verifier.latency / ugsd.latency if ugsd.latency else 0.0
            yield f"{faster:.1f}×", "the speed of the verifier alone", "ratio of median latencies"
            saved = f"{verifier.verifier_forwards:.0f} for the verifier alone"
            yield f"{ugsd.verifier_forwards:.1f}", "verifier forwards a clip", saved
    count, seconds = len(comparison.utterances), sum(one.audio.duration for one in comparison.utterances)
    if len(summaries) < 3:
        yield f"{count}", "clip" if count == 1 else "clips", f"{seconds:.1f} s of audio"


def table_columns(comparison: Comparison) -> list[tuple[str, str]]:
    """(heading, unit or remark) of the table."""
    columns = []
    summaries = list(comparison.summaries.values())
    if any(summary.bleu4 is not None for summary in summaries):
        columns += [("BLEU-1", ""), ("BLEU-4", "")]
    if any(summary.attribute_accuracy is not None for summary in summaries):
        columns += [("Attributes", "accuracy")]
    return [
        *columns,
        ("Latency", "median"),
        ("First token", "median"),
        ("Tokens/s", ""),
        ("Escalated", "draft tokens"),
        ("Accepted", "where verified"),
        ("Verifier", "forwards/clip"),
    ]


def table_rows(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """(method, cells) of the table."""
    headings = [heading for heading, _ in table_columns(comparison)]
    for method, summary in comparison.summaries.items():
        drafted = method in ("ugsd", "lossless")
        cells = {
            "BLEU-1": _number(summary.bleu1),
            "BLEU-4": _number(summary.bleu4),
            "Attributes": "–" if summary.attribute_accuracy is None else _percent(summary.attribute_accuracy, 1),
            "Latency": _milliseconds(summary.latency),
            "First token": _milliseconds(summary.time_to_first_token),
            "Tokens/s": f"{summary.tokens_per_second:.0f}",
            "Escalated": _percent(summary.escalated_share) if drafted else "–",
            "Accepted": _percent(summary.acceptance_rate) if drafted and summary.acceptance_length else "–",
            "Verifier": f"{summary.verifier_forwards:.1f}",
        }
        yield method, [cells[heading] for heading in headings]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def lossless_check(comparison: Comparison) -> str:
    """What this run says about losslessness, empty where it says nothing."""
    method: Method
    for method in ("lossless", "ugsd"):
        if comparison.results.get(method) and comparison.results.get("verifier"):
            if method == "ugsd" and not comparison.config.lossless:
                continue
            same, clips = comparison.agreement(method)
            return f"Checked in this run: {same} of {clips} captions equal the verifier's own, token for token."
    return ""


def _clips(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for index, utterance in enumerate(comparison.utterances):
        captions = []
        for method, results in comparison.results.items():
            if method == "lossless":  # the verifier's own caption, once more
                continue
            result = results[index]
            attributes = {}
            if comparison.matches is not None and utterance.reference is not None:
                attributes = dict(comparison.matches(result.text, utterance.reference))
            captions.append(
                {
                    "method": method,
                    "text": result.text,
                    "blocks": list(blocks_of(result, comparison.decode, comparison.config.entropy_threshold)),
                    "facts": _facts(method, result),
                    "attributes": attributes,
                }
            )
        yield {
            "name": utterance.name,
            "details": dict(utterance.details),
            "seconds": f"{utterance.audio.duration:.1f} s",
            "audio": audio_uri(utterance.audio),
            "wave": waveform(utterance.audio),
            "captions": captions,
            "reference": utterance.reference,
            "same": len({caption["text"] for caption in captions}) == 1,
        }


def _facts(method: Method, result: Result) -> list[str]:
    metrics = result.metrics
    facts = [_milliseconds(metrics.latency), f"first token {_milliseconds(metrics.time_to_first_token)}"]
    if method == "ugsd":
        facts.append(f"{_percent(metrics.escalated_share)} escalated")
    facts.append(f"{len(result.tokens)} tokens")
    if method != "edge":
        count = metrics.verifier_forwards
        facts.append(f"{count} verifier forward{'' if count == 1 else 's'}")
    return facts


def audio_uri(audio: Audio) -> str:
    """A clip as 16-bit FLAC in a data URI."""
    import soundfile

    audio = audio.resampled(min(audio.rate, 48_000))
    samples = audio.samples / max(1.0, float(np.abs(audio.samples).max()))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, audio.rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def waveform(audio: Audio, *, bars: int = 96, height: int = 40) -> str:
    """Path data of a clip's peaks, in a box of ``3 * bars`` by `height`."""
    chunks = np.array_split(np.abs(audio.samples), min(bars, len(audio.samples)))
    peaks = np.array([float(chunk.max()) for chunk in chunks])
    peaks = peaks / peaks.max()
    halves = np.maximum(peaks * (height - 2) / 2, 0.5)
    return "".join(f"M{3 * index + 1.5:g} {height / 2 - half:.1f}v{2 * half:.1f}" for index, half in enumerate(halves))


def _plots(comparison: Comparison) -> list[dict[str, Any]]:
    if len(comparison.sweep) < 2:
        return []
    plots = []
    for metric, name, scale, unit in (
        ("attribute_accuracy", "Attribute accuracy", 100.0, "%"),
        ("bleu4", "BLEU-4", 1.0, ""),
    ):
        if getattr(comparison.sweep[0].summary, metric) is not None:
            plots.append({"name": name, "svg": quality_plot(comparison, metric, name, scale, unit)})
    return plots


def quality_plot(comparison: Comparison, metric: str, name: str, scale: float = 1.0, unit: str = "") -> Any:
    """Quality against the escalated share as SVG: text is text, ink is the page's, each series has its own marker."""
    from markupsafe import Markup

    def value(summary: Summary) -> float:
        return scale * getattr(summary, metric)

    left, top, width, height = 46, 14, 332, 216
    points = [(100 * p.summary.escalated_share, value(p.summary), p.threshold) for p in comparison.sweep]
    chosen = comparison.config.entropy_threshold
    lines = {method: value(summary) for method, summary in comparison.summaries.items()}
    values = [y for _, y, _ in points] + list(lines.values())
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    shares = _ticks(0.0, max(x for x, _, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x / shares[-1], top + height * (high - y) / (high - low)

    out = []
    for y in ticks:
        _, row = at(0, y)
        out.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{row:.1f}" y2="{row:.1f}"/>')
        out.append(f'<text x="{left - 10}" y="{row + 4:.1f}" text-anchor="end">{y:g}</text>')
    for share in shares:
        column, _ = at(share, low)
        out.append(f'<text x="{column:.1f}" y="{top + height + 17}" text-anchor="middle">{share:g}</text>')
    out.append(
        f'<text x="{left + width / 2:g}" y="{top + height + 36}" text-anchor="middle">'
        "escalated share of draft tokens, %</text>"
    )
    _, row = at(0, lines["verifier"])
    out.append(f'<line class="line verifier" x1="{left}" x2="{left + width}" y1="{row:.1f}" y2="{row:.1f}"/>')
    edge = at(0, lines["edge"])
    route = sorted([edge, *(at(x, y) for x, y, _ in points)])
    out.append(f'<polyline class="route" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in route)}"/>')
    out.append(f'<rect class="mark edge" x="{edge[0] - 5:.1f}" y="{edge[1] - 5:.1f}" width="10" height="10"/>')
    for x, y, threshold in points:
        column, row = at(x, y)
        tip = f"<title>threshold {threshold:g}: {y:.1f}{unit} at {x:.1f}% escalated</title>"
        if threshold == chosen:
            diamond = f"M{column:.1f} {row - 8:.1f}l8 8l-8 8l-8-8z"
            out.append(f'<path class="mark chosen" d="{diamond}">{tip}</path>')
        else:
            out.append(f'<circle class="mark" cx="{column:.1f}" cy="{row:.1f}" r="4.5">{tip}</circle>')
    out += _labels([(*at(x, y), f"{threshold:g}", threshold == chosen) for x, y, threshold in points], left + width)
    described = "; ".join(f"threshold {t:g}: {y:.1f}{unit} at {x:.0f}% escalated" for x, y, t in points)
    described += f"; edge only {lines['edge']:.1f}{unit}; verifier only {lines['verifier']:.1f}{unit}"
    body = "".join(out)
    return Markup(
        f'<svg viewBox="0 0 {left + width + 12} {top + height + 44}" role="img" '
        f'aria-label="{escape(name)} against escalated share: {escape(described)}">{body}</svg>'
    )


def _labels(points: Sequence[tuple[float, float, str, bool]], right: float) -> list[str]:
    """A threshold beside each point: right below it, where a rising curve leaves room, or elsewhere if it is taken."""
    out = []
    placed: list[tuple[float, float]] = []
    for column, row, text, strong in sorted(points):
        spots = [(9, 15, "start"), (9, 29, "start"), (-9, -9, "end"), (-9, -23, "end")]
        if column > right - 40:  # no room for text there
            spots = [(-9, 15, "end"), (-9, 29, "end"), *spots[2:]]
        dx, dy, anchor = next(
            (
                spot
                for spot in spots
                if all(abs(column + spot[0] - x) > 36 or abs(row + spot[1] - y) > 13 for x, y in placed)
            ),
            spots[0],
        )
        placed.append((column + dx, row + dy))
        weight = ' class="strong"' if strong else ""
        out.append(f'<text{weight} x="{column + dx:.1f}" y="{row + dy:.1f}" text-anchor="{anchor}">{text}</text>')
    return out


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, about five of them, none above 100 that need not be."""
    span = max(high - low, 1.0)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step - 0.25), math.ceil(high / step + 0.25)
    if high <= 100 + 1e-9:
        last = min(last, math.floor(100 / step))
        first = min(first, last - 2)
    if low >= 0:
        first = max(first, 0)
    return [round(step * index, 10) for index in range(first, max(last, first + 2) + 1)]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure that a report can be written, before minutes of work depend on it.

    Raises
    ------
    OSError
        Naming the path and the reason.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder does not exist")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "is write-protected")
        trial = _beside(target)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise _not_writable(target, error) from None
    return target


def write(path: str | os.PathLike[str], html: str) -> Path:
    """Write a report whole or not at all.

    Raises
    ------
    OSError
        Naming the path and the reason; a report that was there before stays as it was.
    """
    target = Path(path)
    trial = _beside(target)
    try:
        with open(trial, "x", encoding="utf-8", errors="replace") as file:
            file.write(html)
        os.replace(trial, target)
    except OSError as error:
        raise _not_writable(target, error) from None
    finally:
        trial.unlink(missing_ok=True)
    return target


def _not_writable(target: Path, error: OSError) -> OSError:
    return type(error)(f"{target}: cannot be written ({error.strerror})")


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")
