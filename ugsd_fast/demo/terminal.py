"""A `Comparison` on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ugsd_fast.decoding import Result
from ugsd_fast.demo.report import TITLES, lossless_check, pieces, table_columns, table_rows
from ugsd_fast.demo.run import Comparison


def show_clip(console: Console, comparison: Comparison, index: int) -> None:
    """Print one clip's captions, and what they cost."""
    utterance = comparison.utterances[index]
    heading = f"{utterance.name} · {utterance.audio.duration:.1f} s"
    console.print(Text(heading, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for method, title in (("edge", "edge"), ("ugsd", "UGSD"), ("verifier", "verifier")):
        result = comparison.results[method][index]  # type: ignore[index]
        table.add_row(title, _coloured(result, comparison) if method == "ugsd" else Text(result.text))
    if utterance.reference is not None:
        table.add_row("reference", Text(utterance.reference, style="italic dim"))
    edge, ugsd, verifier = (comparison.results[m][index].metrics for m in ("edge", "ugsd", "verifier"))
    times = " · ".join(
        f"{name} {1e3 * one.latency:.0f} ms" for name, one in (("edge", edge), ("UGSD", ugsd), ("verifier", verifier))
    )
    table.add_row("", Text(f"{100 * ugsd.escalated_share:.0f}% escalated · {times}", style="dim"))
    console.print(table)
    console.print()


def _coloured(result: Result, comparison: Comparison) -> Text:
    """A caption with the verifier's share in it marked: accepted tokens green, its own bold yellow."""
    styles = {"accepted": "green", "corrected": "bold yellow underline", "bonus": "bold green"}
    text = Text()
    texts = pieces(comparison.decode, result.tokens)
    for piece, token in zip(texts, result.trace.tokens(), strict=True):
        text.append(piece, styles.get(token.source))
    return text


def show_summary(console: Console, comparison: Comparison) -> None:
    """The report's table, turned: it fits a terminal of 80 columns."""
    rows = dict(table_rows(comparison))
    table = Table(title=f"{len(comparison.utterances)} clips", title_justify="left", title_style="bold")
    table.add_column("")
    for method in rows:
        table.add_column(TITLES[method], justify="right", style="bold" if method == "ugsd" else None)
    for index, (heading, remark) in enumerate(table_columns(comparison)):
        name = f"{heading}, {remark}" if remark else heading
        table.add_row(name, *(cells[index] for cells in rows.values()))
    console.print(table)
    remarks = ["Captions of synthetic speech by small models; quality on a handful of clips."]
    if checked := lossless_check(comparison):
        remarks.append(f"Lossless: {checked[0].lower()}{checked[1:]}")
    if console.is_terminal:
        remarks.append("In UGSD's captions, green was accepted by the verifier and yellow written by it.")
    console.print(Text("\n".join(remarks), "dim"))
