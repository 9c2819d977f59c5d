"""Counts the memory traffic of the Triton kernels under the interpreter, and of what peers do instead.

Run as ``python -m bench.traffic``. Nothing is timed: a count is the same on any machine. *Asked* is what the lanes of
all loads, stores and atomics ask for, one address once an instruction; *sectors* is 32 bytes for each distinct 32-byte
sector of each such instruction.
A peer's figure is the sum of what every aten operator reads and writes, so a lower bound: a sort or a multinomial is
counted as one pass.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.harness import SCHEMA, Row, dtype_name, now
from bench.interpreter import quick_calls, watch
from bench.markdown import number, table
from bench.problems import BLOCK, Problem, problems
from ugsd_fast import ops
from ugsd_fast.ops.backend import OPS, select

SECTOR_BITS = 5  # 32 bytes
MANY, ONE = 1.02, 1.05  # most bytes asked for over those needed: several rows; one, whose partials weigh more
_MAKES_OR_VIEWS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "detach", "alias", "lift_fresh"
}  # fmt: skip
_WRITES_ONLY = {"copy_", "fill_", "zero_", "exponential_", "uniform_"}
_READS_WHAT_IT_RETURNS = {"gather", "index", "index_select", "embedding"}
_READS_ON_HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


@dataclass
class Counts:
    """Traffic of one call: a watcher of the interpreter.

    Attributes
    ----------
    asked, sectors
        Bytes.
    launches, programs
        Kernels launched, and programs of them all; launches of torch's own kernels count among the first.
    host_reads
        Operators that bring a value to the host, and so wait for the device.
    """

    asked: int = 0
    sectors: int = 0
    launches: int = 0
    programs: int = 0
    host_reads: int = 0
    kernels: list[str] = field(default_factory=list)

    def launch(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        self.launches += 1
        self.kernels.append(kernel)

    def grid(self, programs: tuple[int, int, int]) -> None:
        self.programs += int(np.prod(programs))

    def access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        if not len(addresses):
            return
        if (addresses[1:] <= addresses[:-1]).any():
            addresses = np.unique(addresses)
        self.asked += len(addresses) * size
        first, last = addresses >> SECTOR_BITS, (addresses + (size - 1)) >> SECTOR_BITS
        self.sectors += len(np.unique(np.concatenate([first, last]))) << SECTOR_BITS

    def operator(self, name: str, read: int, written: int) -> None:
        """Add one aten operator."""
        self.launches += 1
        self.kernels.append(f"aten::{name}")
        self.asked += read + written
        self.sectors += read + written


class Operators(TorchDispatchMode):
    """Counts aten operators, and runs ops of this package in its sight."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "ugsd_fast":
            with self:
                return select(name, "cpu")(*args)
        results = func(*args, **(kwargs or {}))
        self.counts.host_reads += name in _READS_ON_HOST
        if name in _MAKES_OR_VIEWS or name in _READS_ON_HOST or _is_view(func):
            return results
        written = _bytes(results)
        given = (args[1:] if name in _WRITES_ONLY else args, kwargs)
        read = _bytes(given)
        if name in _READS_WHAT_IT_RETURNS:
            read = read - _bytes(args[0]) + written
        self.counts.operator(name, read, written)
        return results


def _is_view(func: Any) -> bool:
    returned = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _bytes(tree: Any) -> int:
    """Return the bytes of the distinct elements of all tensors in a tree."""
    total = 0
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            sizes = (size for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride or not size)
            total += int(np.prod([leaf.element_size(), *sizes]))
    return total


def count(call: Callable[[], object]) -> tuple[Counts, Any]:
    """Run a call once and return its traffic and its results."""
    counts = Counts()
    with quick_calls(), watch(counts), Operators(counts):
        results = call()
    return counts, results


def row_of(problem: Problem, counts: Counts, arguments: dict[str, Any], results: Any) -> Row:
    """Return a problem's row of results."""
    return {
        "op": problem.op,
        "case": problem.label,
        "rows": problem.rows,
        "columns": problem.columns,
        "dtype": dtype_name(problem.dtype),
        "floor": problem.floor(arguments),
        "needed": problem.needed(arguments, results),
        "asked": counts.asked,
        "sectors": counts.sectors,
        "launches": counts.launches,
        "programs": counts.programs,
        "kernels": counts.kernels,
        "host_reads": counts.host_reads,
        "most_launches": problem.launches,
        "most_ratio": (ONE if problem.rows == 1 else MANY) if problem.op != "gate_block" else None,
    }


def measure(problem: Problem) -> tuple[Row, list[Row]]:
    """Return the row of the Triton kernel and those of its peers."""
    device = torch.device("cpu")
    built = problem.make(device)
    with ops.use_backend("triton"):
        counts, results = count(lambda: problem.run(built.arguments))
        if any(kernel.startswith("aten::") for kernel in counts.kernels):  # what later calls find done: scratch, tables
            counts, results = count(lambda: problem.run(built.arguments))
    row = row_of(problem, counts, built.arguments, results)
    # What compaction moves depends on the mask alone; everything else leaves its inputs as they were.
    peers = []
    for name, call in built.peers.items():
        counts, _ = count(call)
        kept = {key: row[key] for key in ("op", "case", "rows", "columns", "dtype", "floor", "needed")}
        peers.append({**kept, "peer": name, **_figures(counts)})
    return row, peers


def _figures(counts: Counts) -> Row:
    return {"asked": counts.asked, "launches": counts.launches, "host_reads": counts.host_reads}


def sizes(quick: bool, only: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the sizes at which every op is counted; ``only`` names one: rows, columns, dtype."""
    if quick:
        yield {"rows": 1, "vocabulary": 1000, "dtype": torch.float32, "width": 16, "slots": 16, "layers": 1}
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, vocabulary, width in ((1, 32000, 256), (4, 32000, 256), (1, 152064, 64)):
            if only is None or list(only) == [str(rows), str(vocabulary), dtype_name(dtype)]:
                size = {"rows": rows, "vocabulary": vocabulary, "dtype": dtype}
                yield {**size, "width": width, "slots": 1024, "layers": 28}


def met(row: Row) -> bool:
    """Return whether a row keeps what is promised."""
    ratio, launches = row["most_ratio"], row["most_launches"]
    return (ratio is None or row["asked"] <= ratio * row["needed"]) and (
        launches is None or row["launches"] <= launches
    )


def interpret() -> None:
    """Start this process anew under the interpreter, which triton chooses as it is imported, unless it runs there."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny size: whether it runs")
    parser.add_argument("--size", nargs=3, metavar=("ROWS", "COLUMNS", "DTYPE"), help="one of the sizes, not all")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results here as well")
    arguments = parser.parse_args()
    interpret()
    torch.set_num_threads(1)

    missing = {op: ops.backends().missing[op]["triton"] for op in OPS if "triton" not in ops.backends()[op]}
    rows: list[Row] = []
    peers: list[Row] = []
    start = time.monotonic()
    done: set[tuple[Any, ...]] = set()
    for size in sizes(arguments.quick, arguments.size):
        for problem in problems(**size):
            key = (problem.op, problem.label, problem.rows, problem.columns, problem.dtype)
            if problem.op not in arguments.ops or problem.op in missing or key in done:
                continue
            done.add(key)
            row, others = measure(problem)
            rows.append(row)
            peers += others
            print(describe(row), *map(describe_peer, others), sep="\n", flush=True)
    print(f"== {time.monotonic() - start:.0f} s")
    result = {"schema": SCHEMA, "date": now(), "versions": versions(), "missing": missing, "rows": rows, "peers": peers}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def versions() -> Row:
    """Return what the counts depend on."""
    import transformers
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}


HOW = """\
**How.** Each op runs once on the Triton backend under Triton's interpreter, and every load, store and atomic of every
program is counted: *asked* is what its lanes ask for, an address once; *sectors* 32 bytes for each distinct 32-byte
sector of one instruction. Both are divided by the bytes *needed*: each logit once; where a token is drawn, its block of
4096 columns and the rows of the residual again; where logits are filtered, 4096 columns again, among which the cut is
looked for, since it is known only when the row has been read. *Once* divides by every byte that matters counted once,
which a draw or a cut cannot reach.
Launches count kernels of the op and of torch together; what a first call prepares for later ones (scratch, tables of
addresses) is left out. `/` separates {dtypes}.
A peer's bytes are the sum of what each aten operator reads and writes, so a lower bound: a sort or a multinomial counts
as one pass. Logits are synthetic, shaped like a language model's; blocks have {block} tokens."""
DTYPES = ("float32", "bfloat16", "float16")


def document(result: Row) -> str:
    """Return ``docs/traffic.md``."""
    rows, peers = result["rows"], result["peers"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    wrong = [row for row in rows if not met(row)]
    lines = [
        "# Memory traffic of the Triton kernels",
        "",
        f"Written by `make bench` ({result['date']}, {versions}); the numbers are in `bench/results/traffic.json`.",
        "",
        HOW.format(dtypes=", ".join(DTYPES), block=BLOCK),
        "",
        f"Promised: asked ≤ {MANY} × needed, ≤ {ONE} × for one row (`gate_block` apart), and the launches "
        "in brackets: " + ("**kept by all**." if not wrong else f"**missed by {len(wrong)} of {len(rows)}**, in bold."),
        "",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        ours = [row for row in rows if row["op"] == op]
        theirs = [row for row in peers if row["op"] == op]
        lines += [f"## `{op}`", "", *_op_table(ours), ""]
        if theirs:
            lines += [*_peers_table(theirs, ours), ""]
    lines.append("Triton kernels of peers: none is installed here, so none is counted.")
    lines += [f"Not counted: `{op}`: {reason}." for op, reason in result["missing"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _groups(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    """Return the rows that agree in these keys, together, in order of dtype."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [sorted(group, key=lambda row: DTYPES.index(row["dtype"])) for group in groups.values()]


def _together(texts: Sequence[str]) -> str:
    """Return a cell of all dtypes, once where they agree."""
    return " / ".join(texts if len(set(texts)) > 1 else texts[:1])


def _op_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for group in _groups(rows, "case", "rows", "columns"):
        first = group[0]
        asked = [f"{row['asked'] / row['needed']:.3f}" for row in group]
        asked = [text if met(row) else f"**{text}**" for row, text in zip(group, asked, strict=True)]
        most = "" if first["most_launches"] is None else f" (≤ {first['most_launches']})"
        lines.append(
            (
                first["case"] or "–",
                f"{first['rows']} × {first['columns']}",
                _together([f"{row['needed'] / 1024:,.0f}" for row in group]),
                _together(asked),
                _together([f"{row['sectors'] / row['needed']:.3f}" for row in group]),
                _together([f"{row['asked'] / row['floor']:.3f}" if row["floor"] else "–" for row in group]),
                _together([f"{row['launches']}{most}" for row in group]),
                _together([str(row["programs"]) for row in group]),
            )
        )
    header = ("case", "rows × columns", "needed, KiB", "asked", "sectors", "once", "launches", "programs")
    return table(header, lines, 2)


def _peers_table(peers: Sequence[Row], ours: Sequence[Row]) -> list[str]:
    asked = {(row["case"], row["rows"], row["columns"], row["dtype"]): row["asked"] for row in ours}
    lines = []
    for group in _groups(peers, "peer", "case", "rows", "columns"):
        first = group[0]
        own = [asked[row["case"], row["rows"], row["columns"], row["dtype"]] for row in group]
        lines.append(
            (
                first["peer"],
                first["case"] or "–",
                f"{first['rows']} × {first['columns']}",
                _together([number(row["asked"] / row["needed"]) for row in group]),
                _together([f"{number(row['asked'] / one)}×" for row, one in zip(group, own, strict=True)]),
                _together([str(row["launches"]) for row in group]),
                _together([str(row["host_reads"]) for row in group]),
            )
        )
    header = ("instead", "case", "rows × columns", "bytes over needed", "over ours", "launches", "host reads")
    return table(header, lines, 3)


def describe(row: Row) -> str:
    """Return a row as one line of text."""
    name = f"{row['op']} {row['case']} {row['rows']} × {row['columns']} {row['dtype']}"
    return (
        f"{name:78} asked {row['asked'] / row['needed']:7.3f}  sectors {row['sectors'] / row['needed']:7.3f}  "
        f"once {row['asked'] / max(1, row['floor']):7.3f}  launches {row['launches']}  programs {row['programs']}"
        f"{'' if met(row) else '  MISSED'}"
    )


def describe_peer(row: Row) -> str:
    """Return a peer's row as one line of text."""
    return f"    {row['peer']:60} {row['asked'] / row['needed']:7.2f}  launches {row['launches']}"


if __name__ == "__main__":
    main()
