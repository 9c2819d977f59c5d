"""Runs every benchmark, each in a process of its own, writes ``bench/results/*.json`` and the reports made of them.

``python -m bench.run [--quick] [--threads 1 2] [--rounds N] [--ops token_stats …] [--parts kernels …]``

With ``--quick`` everything runs on tiny inputs and the results go to ``build/bench``: they measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import summary
from bench.harness import SCHEMA, Row, machine, now
from ugsd_fast.ops.backend import OPS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
REPORTS = {"traffic": "bench.traffic", "compile": "bench.compile_report"}
"""Reports on the GPU kernels, which need no GPU and time nothing."""

PARTS = ("kernels", "decoding", *REPORTS)


def run_module(module: str, options: Sequence[str]) -> Row:
    """Run one benchmark in a fresh process and return what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        print("==", module, *options, flush=True)
        command = [sys.executable, "-m", module, *options, "--json", str(output)]
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(output.read_text())


def run_kernels(ops: Sequence[str], threads: Sequence[int], options: Sequence[str], path: Path) -> None:
    """Run the kernels' benchmarks and write ``kernels.json`` after each, so that a failure costs one op."""
    for count in threads:
        for op in ops:
            result = run_module(f"bench.kernels.{op}", ["--threads", str(count), *options])
            kernels = {"schema": SCHEMA, "date": now(), "machine": machine(), "runs": [result]}
            write(path, merged(kernels, path))


def merged(new: Row, path: Path) -> Row:
    """Add to ``new`` the runs that an earlier file has of other ops, if they are of the same machine and versions."""
    if not path.exists():
        return new
    old = json.loads(path.read_text())
    if (old["schema"], old["machine"]) != (new["schema"], new["machine"]):
        return new
    done = {(run["op"], run["conditions"]["threads"]) for run in new["runs"]}
    kept = [run for run in old["runs"] if (run["op"], run["conditions"]["threads"]) not in done]
    runs = sorted(kept + new["runs"], key=lambda run: (run["conditions"]["threads"], OPS.index(run["op"])))
    return {**new, "runs": runs}


def with_other_ops(new: Row, path: Path, ops: Sequence[str]) -> Row:
    """Add to a report on the GPU kernels what an earlier one of the same versions has of other ops."""
    if not path.exists():
        return new
    old = json.loads(path.read_text())
    if (old["schema"], old["versions"]) != (new["schema"], new["versions"]):
        return new
    kept = {key: [row for row in old[key] if row["op"] not in ops] for key in ("rows", "peers") if key in new}
    return {**new, **{key: sorted(rows + new[key], key=lambda row: OPS.index(row["op"])) for key, rows in kept.items()}}


def write(path: Path, result: Row) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Run the benchmark suite.")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, few rounds: whether it runs, not how fast")
    parser.add_argument("--threads", type=int, nargs="+", default=None, metavar="N", help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=None, metavar="N")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()

    start = time.monotonic()
    threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    results = ROOT / "build" / "bench" if arguments.quick else RESULTS
    options = ["--quick"] if arguments.quick else []
    options += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    if "kernels" in arguments.parts:
        run_kernels(arguments.ops, threads, options, results / "kernels.json")
    if "decoding" in arguments.parts:
        for name in ("overhead", "cache", "batch"):
            write(results / f"{name}.json", run_module(f"bench.decoding.{name}", ["--threads", "1", *options]))
    for part, module in REPORTS.items():
        if part in arguments.parts and importlib.util.find_spec("triton") is None:
            print(f"== {module} left out: triton is not installed")
        elif part in arguments.parts:
            path = results / f"{part}.json"
            report = run_module(module, [*options[: arguments.quick], "--ops", *arguments.ops])
            write(path, with_other_ops(report, path, arguments.ops))
    if arguments.quick:
        summary.write(results, docs=results, readme=None)
    else:
        summary.write(results, docs=ROOT / "docs", readme=ROOT / "README.md")
    print(f"== {time.monotonic() - start:.0f} s; results in {results.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
