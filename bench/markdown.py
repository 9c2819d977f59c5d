"""Numbers and tables as the reports print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> list[str]:
    """Return the lines of a Markdown table; columns after the first ``text_columns`` are numbers."""
    align = ["---" if i < text_columns else "---:" for i in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]
