"""Numbers and tables as the reports print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> list[str]:
    """Return the lines of a Markdown table; columns after the first ``text_columns`` are numbers."""
    align = ["---" if i < text_columns else "---:" for i in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, align, *rows)]


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Return what `bench.harness.machine` says of a machine and its versions, as a list."""
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in machine["caches"].items())
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("ugsd_fast", "torch", "transformers", "numpy", "python")
    )
    return [
        f"- {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['simd'])}; the C++ ops chose "
        f"{machine['isa']}), {caches}, {machine['memory_gib']} GiB",
        f"- {versions}, {machine['libc']}; transparent huge pages `{machine['huge_pages']}`",
    ]
