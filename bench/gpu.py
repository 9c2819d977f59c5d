"""One command for a GPU: checks every op on Triton and CUDA against the float64 oracle, and times it against its floor.

``python -m bench.gpu`` needs a GPU. ``python -m bench.gpu --dry-run`` runs the same code on CPU tensors at tiny sizes,
with Triton's interpreter in place of the GPU, a CPU clock in place of CUDA events, and no graph: it proves that the
command runs, and times nothing. A whole run on a GPU writes ``bench/results/gpu.json``, of which ``python -m
bench.summary`` makes ``docs/gpu.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bench import peers
from bench.harness import SCHEMA, Row, dtype_name, machine, now, ratios, rounded, spread
from bench.interpreter import quick_calls
from bench.markdown import number, table
from bench.problems import BLOCK, COMPILED, Problem, problems
from bench.traffic import interpret
from ugsd_fast import AudioLM, Decoder, demo, ops
from ugsd_fast.ops.backend import OPS
from ugsd_fast.reference.spec import SPECS, Case, make_logits

Call = Callable[[], object]

BACKENDS = ("triton", "cuda")
HOW = """\
**How.** The *floor* of an op is the time in which the device copies the bytes that the op needs to move; the copy's
bandwidth is measured in the same run. Contenders take turns in a shuffled order, each timed by events round one call.
*Cold*: the L2 cache is overwritten before each call; *warm*: the call before was the same one. A fraction of a
millisecond of waiting keeps the GPU busy while the CPU launches: launches count only where one call makes many, or
waits for the device."""
KINDS = ("checks", "draws", "draft_step", "decoding")
RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
COPY_BYTES = 1 << 30
QUEUED_CYCLES = 500_000  # that the GPU waits before a timed call, while the CPU launches it
RELATIVE, ABSOLUTE = 1e-5, 2e-6  # of float32 results from float32 sums and a GPU's exp2 and log2
EXPECTED_DRAWS = 0.999  # the rest may be ties within rounding
WARM_UP = 0.3  # seconds, in which clocks rise
CLIPS = 4  # that the embedded pair's drafter captions, with and without a graph


class Machine(Protocol):
    """Where a run takes place: a GPU, or this process in its stead."""

    device: torch.device
    dry: bool
    warm_up: float

    def describe(self) -> Row:
        """Say what it is."""

    def watched(self) -> Any:
        """Return a context in which waiting for the device raises."""

    def time(self, call: Call, cold: bool) -> Callable[[], float]:
        """Run a call; the function returned gives its seconds once `wait` has returned."""

    def wait(self) -> None:
        """Wait for all calls."""

    def capture(self, call: Call) -> Call | None:
        """Return a replay of the call's kernels, None where nothing can be captured."""


class Gpu:
    """The current CUDA device."""

    dry = False
    warm_up = WARM_UP

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self._flush = torch.empty(
            max(4 * self.properties.L2_cache_size, 1 << 28), dtype=torch.uint8, device=self.device
        )

    def describe(self) -> Row:
        return {
            "name": self.properties.name,
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "l2": self.properties.L2_cache_size,
            "memory": self.properties.total_memory,
            "cuda": torch.version.cuda,
            "driver, clocks, power": nvidia_smi("driver_version,clocks.sm,clocks.max.sm,power.limit", self.device),
        }

    def watched(self) -> Any:
        return _SyncIsAnError()

    def time(self, call: Call, cold: bool) -> Callable[[], float]:
        if cold:
            self._flush.zero_()
        else:
            call()
        torch.cuda._sleep(QUEUED_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, call: Call) -> Call | None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class _SyncIsAnError:
    """Raises where a call waits for the device."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class DryRun:
    """This process in a GPU's stead: CPU tensors, kernels under Triton's interpreter, a CPU clock, no graphs."""

    dry = True
    warm_up = 0.0
    device = torch.device("cpu")

    def describe(self) -> Row:
        return {"name": "dry run on CPU tensors under Triton's interpreter", "cuda": None}

    def watched(self) -> Any:
        return _Nothing()

    def time(self, call: Call, cold: bool) -> Callable[[], float]:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def wait(self) -> None:
        pass

    def capture(self, call: Call) -> Call | None:
        return None


def nvidia_smi(fields: str, device: torch.device) -> str | None:
    """Return what nvidia-smi says of a device, None where it says nothing."""
    command = ["nvidia-smi", f"--id={device.index}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """Return a row with what ``work`` finds, or with its error: one that fails must not cost the others' rows."""
    try:
        return row | work()
    except Exception as error:
        return {**row, "passed": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def sizes(dry: bool) -> Iterator[dict[str, Any]]:
    """Yield the sizes of the problems."""
    if dry:
        yield {"rows": 2, "vocabulary": 1100, "dtype": torch.bfloat16, "width": 16, "slots": 16, "layers": 1}
        return
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows, vocabulary in ((1, 152064), (8, 32000)):
            yield {"rows": rows, "vocabulary": vocabulary, "dtype": dtype, "width": 2048, "slots": 2048, "layers": 28}


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with tensors of their own."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)


def on_cpu(tree: Any) -> Any:
    """Return a tree with its tensors on the CPU."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)


def why_missing(op: str, backend: str, machine: Machine) -> str | None:
    """Return why a backend cannot run an op on this machine, None if it can."""
    if machine.dry and backend == "cuda":
        return "needs a GPU"
    return ops.backends().missing[op].get(backend)


def check(problem: Problem, backend: str, machine: Machine) -> Row:
    """Compare an op's results with the float64 oracle's: a second call, which may neither wait nor see old results."""
    built = problem.make(machine.device)
    expected_arguments = on_cpu(copied(built.arguments))
    expected = SPECS[problem.op].oracle(**expected_arguments)
    with ops.use_backend(backend):
        first = problem.run(copied(built.arguments))  # compiles, and makes scratch
        arguments = copied(built.arguments)
        if problem.op != "kv_compact":
            arguments["out"] = poisoned(first)
        machine.wait()
        with machine.watched():
            got = problem.run(arguments)
        machine.wait()
    if problem.op == "kv_compact":
        got = got, *kept_slots(arguments["kv"], expected)
        expected = expected, *kept_slots(expected_arguments["kv"], expected)
    worst, wrong = compared(on_cpu(got), expected)
    return {"passed": not wrong, "worst": worst, "wrong": wrong}


def poisoned(results: Any) -> Any:
    """Return a tree of results that holds what no op returns."""
    return tree_map(lambda x: torch.full_like(x, torch.nan if x.is_floating_point() else True), results)


def kept_slots(kv: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
    """Return the slots of each sequence that a compaction kept; the others hold anything."""
    counts = kept.cpu().tolist()
    return [tensor.cpu()[b, :, :count] for tensor in kv for b, count in enumerate(counts)]


def compared(got: Any, expected: Any) -> tuple[float, int]:
    """Return the largest error over what is allowed, and how many numbers are wrong."""
    worst, wrong = 0.0, 0
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if one.shape != other.shape:
            return float("inf"), one.numel()
        if not other.is_floating_point():
            wrong += int((one.long() != other.long()).sum())
            continue
        one, other = one.double(), other.double()
        excess = (one - other).abs() / (ABSOLUTE + RELATIVE * other.abs())
        excess = torch.where(one == other, 0.0, excess.nan_to_num(nan=torch.inf))
        if excess.numel():
            worst = max(worst, float(excess.max()))
        wrong += int((excess > 1).sum())
    return worst, wrong


def draws(backend: str, machine: Machine) -> Row:
    """Return the share of draws in which a backend and the oracle agree."""
    rows, vocabulary = (16, 1100) if machine.dry else (10_000, 32_000)
    agreed = total = 0
    for seed in range(1 if machine.dry else 10):
        logits = make_logits(Case(vocabulary=vocabulary, seed=seed), rows // (1 if machine.dry else 10))
        with ops.use_backend(backend):
            tokens = ops.sample(logits.to(machine.device), seed=seed).tokens.cpu()
        agreed += int((tokens == SPECS["sample"].oracle(logits, seed=seed).tokens).sum())
        total += len(tokens)
    return {"draws": total, "agreed": agreed / total, "passed": agreed >= EXPECTED_DRAWS * total}


def _named(problem: Problem, backend: str) -> Row:
    return {
        "op": problem.op,
        "case": problem.label,
        "rows": problem.rows,
        "columns": problem.columns,
        "dtype": dtype_name(problem.dtype),
        "backend": backend,
    }


def copy_bandwidth(machine: Machine, rounds: int) -> Row:
    """Return the bytes a second, read and written, at which the device copies."""
    size = 1 << 20 if machine.dry else COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    pending = [machine.time(lambda: target.copy_(source), cold=True) for _ in range(rounds)]
    machine.wait()
    return spread([2 * size / seconds() for seconds in pending])


def contenders(problem: Problem, machine: Machine) -> tuple[dict[str, Call], dict[str, str], int]:
    """Return every call of a problem by name, why others are left out, and the bytes that it needs to move."""
    torch.compiler.reset()  # the peers of all problems are the same few functions, of which a handful compiles at most
    built = problem.make(machine.device)
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    needed = 0

    def on(backend: str, arguments: dict[str, Any]) -> Call:
        def call() -> object:
            with ops.use_backend(backend):
                return problem.run(arguments)

        return call

    for backend in BACKENDS:
        reason = why_missing(problem.op, backend, machine)
        if reason is not None:
            left_out[backend] = reason
            continue
        arguments = copied(built.arguments)
        try:
            results = on(backend, arguments)()
            machine.wait()
        except Exception as error:
            left_out[backend] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if problem.op != "kv_compact":
            arguments["out"] = results
            needed = problem.needed(built.arguments, results)
        else:
            needed = problem.floor(on_cpu(built.arguments))
        calls[backend] = on(backend, arguments)
    others = {**built.peers, **peers.peers(problem.op, built.arguments)}
    for name in built.peers:
        if name in COMPILED:
            backend = "eager" if machine.dry else "inductor"
            others[f"torch.compile of {name}"] = torch.compile(built.peers[name], dynamic=False, backend=backend)
    for name, call in others.items():
        try:
            call()
            machine.wait()
        except Exception as error:  # a peer's signature may have changed: say so and go on
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        calls[name] = call
    return calls, left_out, needed


def interleaved(calls: Mapping[str, Call], machine: Machine, rounds: int, cold: bool) -> dict[str, list[float]]:
    """Time every call once a round, in a shuffled order."""
    end = time.perf_counter() + machine.warm_up
    while True:
        for call in calls.values():
            call()
        machine.wait()
        if time.perf_counter() >= end:
            break
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            pending[name].append(machine.time(calls[name], cold))
        machine.wait()
    return {name: [seconds() for seconds in one] for name, one in pending.items()}


def timed(problem: Problem, machine: Machine, rounds: int, bandwidth: float) -> list[Row]:
    """Time a problem, cold and warm, and return a row each."""
    calls, left_out, needed = contenders(problem, machine)
    ours = [backend for backend in BACKENDS if backend in calls]
    floor = needed / bandwidth
    rows = []
    for cold in (True, False) if ours else ():
        samples = interleaved(calls, machine, rounds, cold)
        for backend in ours:
            subject = samples[backend]
            rows.append(
                {
                    **_named(problem, backend),
                    "cache": "cold" if cold else "warm",
                    "needed": needed,
                    "us": spread(subject, 1e6),
                    "floor_us": floor * 1e6,
                    "share_of_floor": spread([floor / seconds for seconds in subject]),
                    "peers": {
                        name: {"us": spread(values, 1e6), "ratio": spread(ratios(values, subject))}
                        for name, values in samples.items()
                        if name not in BACKENDS
                    },
                    "left_out": left_out,
                }
            )
    return rows


class DraftStep:
    """The ops of one drafted block: K draws and the gate, into tensors made before, seeds in device memory."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.logits = make_logits(Case(vocabulary=vocabulary, dtype=dtype, logits="peaked"), BLOCK).to(device)
        self.seed = torch.tensor(3, device=device)
        self.offsets = torch.arange(BLOCK, device=device)
        with ops.use_backend("reference"):
            self.drawn = [ops.sample(self.logits[i : i + 1], seed=self.seed) for i in range(BLOCK)]
            self.entropy = torch.zeros(1, BLOCK, device=device)
            self.verdict = ops.gate_block(self.entropy, threshold=1.5)
        for i, drawn in enumerate(self.drawn):
            stats = drawn.stats._replace(entropy=self.entropy[0, i : i + 1])
            self.drawn[i] = drawn._replace(stats=stats)

    def run(self) -> None:
        """Draw K tokens, each step's entropy straight into the row that the gate reads, and gate the block."""
        for i, drawn in enumerate(self.drawn):
            ops.sample(self.logits[i : i + 1], seed=self.seed, offset=self.offsets[i], out=drawn)
        ops.gate_block(self.entropy, threshold=1.5, out=self.verdict)

    def poison(self) -> None:
        """Write over all results."""
        for drawn in self.drawn:
            drawn.tokens.fill_(-7)
        self.entropy.fill_(torch.nan)
        self.verdict[0].fill_(torch.nan)

    def results(self) -> list[Any]:
        """Return tokens, entropies and the verdict."""
        return [
            [int(drawn.tokens) for drawn in self.drawn],
            self.entropy.tolist(),
            [one.item() for one in self.verdict],
        ]


def draft_step(backend: str, machine: Machine, rounds: int) -> Row:
    """Capture a draft step in a graph, replay it on other logits and offsets, and compare with calls one by one."""
    step = DraftStep(1100 if machine.dry else 152064, torch.bfloat16, machine.device)
    row: Row = {"captured": False}
    with ops.use_backend(backend):
        step.run()
        replay = machine.capture(step.run)
        if replay is None:
            row["reason"] = "a dry run captures nothing"
        agreed = 0
        for offset in range(4):
            step.offsets.add_(BLOCK)
            step.logits.copy_(step.logits.roll(offset + 1, -1))
            step.run()
            expected = step.results()
            if replay is not None:
                step.poison()
                replay()
                machine.wait()
            agreed += step.results() == expected
        calls: dict[str, Call] = {"calls": step.run} | ({} if replay is None else {"graph": replay})
        samples = interleaved(calls, machine, rounds, cold=False)
    return {
        **row,
        "captured": replay is not None,
        "passed": agreed == 4,
        "us": {name: spread(values, 1e6) for name, values in samples.items()},
    }


def decoding(machine: Machine) -> Row:
    """Caption clips with the embedded pair's drafter, its step captured in a graph and not: the same tokens come."""
    drafter = AudioLM.from_pretrained(demo.PAIR_FOLDER / "draft", device=machine.device)
    clips, settings = demo.clips()[: 1 if machine.dry else CLIPS], demo.pair_settings()
    tokens: dict[bool, list[Any]] = {}
    seconds: dict[str, float] = {}
    for graph in (False, True):
        decoder = Decoder(drafter, None, replace(settings.config, graph=graph))
        for _ in range(2):  # the first captures
            start = time.perf_counter()
            results = [decoder.generate(clip.path, prompt=settings.prompt, max_new_tokens=32) for clip in clips]
            elapsed = time.perf_counter() - start
        tokens[graph] = [result.tokens for result in results]
        seconds["graph" if graph else "calls"] = elapsed / sum(result.metrics.drafter_forwards for result in results)
    agreed = sum(one == other for one, other in zip(tokens[False], tokens[True], strict=True))
    captured = any(step.captured for idle in decoder._idle_graphs for step in idle.steps)
    return {
        "clips": len(clips),
        "agreed": agreed,
        "captured": captured,
        "passed": 2 * agreed > len(clips) and captured != machine.dry,  # a tie in float32 may turn one caption
        "us": {name: 1e6 * one for name, one in seconds.items()},
    }


def run(machine: Machine, wanted: Sequence[str], rounds: int, checks_only: bool, result: Row) -> None:
    """Check and time everything, print each row as it comes, and add all to the result."""
    result |= {"device": machine.describe(), "missing": {**peers.missing()}}
    for size in sizes(machine.dry):
        for problem in problems(**size):
            for backend in BACKENDS if problem.op in wanted else ():
                reason = why_missing(problem.op, backend, machine)
                if reason is not None:
                    result["missing"][f"{problem.op} on {backend}"] = reason
                    continue
                work = partial(check, problem, backend, machine)
                result["checks"].append(attempt(_named(problem, backend), work))
                print(describe_check(result["checks"][-1]), flush=True)
    for backend in BACKENDS:
        if "sample" in wanted and why_missing("sample", backend, machine) is None:
            result["draws"].append(attempt({"backend": backend}, partial(draws, backend, machine)))
            print(result["draws"][-1], flush=True)
            if why_missing("gate_block", backend, machine) is None:
                work = partial(draft_step, backend, machine, rounds)
                result["draft_step"].append(attempt({"backend": backend}, work))
                print(result["draft_step"][-1], flush=True)
    if "sample" in wanted:
        result["decoding"].append(attempt({}, partial(decoding, machine)))
        print(result["decoding"][-1], flush=True)
    if not checks_only:
        bandwidth = copy_bandwidth(machine, rounds)
        result["copy_bandwidth"] = bandwidth
        for size in sizes(machine.dry):
            for problem in problems(**size):
                if problem.op in wanted:
                    result["timings"] += timed(problem, machine, rounds, bandwidth["median"])
    return result


def describe_check(row: Row) -> str:
    """Return a check as one line of text."""
    name = f"{row['op']} {row['case']} {row['rows']} × {row['columns']} {row['dtype']} on {row['backend']}"
    if row["passed"]:
        return f"{name:90} as the oracle, at most {row['worst']:.2f} of the tolerance off"
    return f"{name:90} WRONG: {row.get('error') or '{} numbers, {:.1f} tolerances'.format(row['wrong'], row['worst'])}"


def document(result: Row) -> str:
    """Return ``docs/gpu.md``."""
    device, bandwidth = result["device"], result.get("copy_bandwidth")
    lines = [
        "# The ops on a GPU",
        "",
        f"Written by `python -m bench.gpu` ({result['date']}); the numbers are in `bench/results/gpu.json`.",
        "",
        f"- {device['name']}, CUDA {device['cuda']}, torch {result['machine']['torch']}",
    ]
    if bandwidth:
        lines.append(
            f"- copies at {bandwidth['median'] / 1e9:,.0f} GB/s (p10 – p90: {bandwidth['p10'] / 1e9:,.0f} – "
            f"{bandwidth['p90'] / 1e9:,.0f}), read and written; {result['rounds']} rounds"
        )
    lines += ["", HOW, "", "## Checks against the float64 oracle", ""]
    for op in dict.fromkeys(row["op"] for row in result["checks"]):
        for backend in BACKENDS:
            ours = [row for row in result["checks"] if (row["op"], row["backend"]) == (op, backend)]
            wrong = [row for row in ours if not row["passed"]]
            if ours:
                lines.append(f"- `{op}` on {backend}: {len(ours) - len(wrong)} of {len(ours)} agree")
                lines += [f"    - {describe_check(row)}" for row in wrong]
    for kind in KINDS[1:]:
        failed = [row for row in result[kind] if "error" in row]
        lines += [f"- {kind} {row.get('backend', '')}: **{row['error']}**" for row in failed]
    for row in _without_error(result["draws"]):
        lines.append(f"- {row['draws']} draws on {row['backend']}: {row['agreed']:.3%} are the oracle's tokens")
    for row in _without_error(result["decoding"]):
        times = ", ".join(f"{name} {number(one)} µs" for name, one in row["us"].items())
        how = "captured in a graph" if row["captured"] else "not captured"
        lines.append(
            f"- {row['agreed']} of {row['clips']} captions are the same with `graph=True` ({how}); a step: {times}"
        )
    for row in _without_error(result["draft_step"]):
        times = ", ".join(f"{name} {number(one['median'])} µs" for name, one in row["us"].items())
        how = "captured in a graph and replayed" if row["captured"] else row["reason"]
        lines.append(f"- draft step on {row['backend']} ({how}): {times}; {'right' if row['passed'] else '**wrong**'}")
    if "broken" in result:
        lines += ["", f"**Ended early**: {result['broken']}"]
    if result["timings"]:
        lines += ["", "## Times", "", *_timings_table(result["timings"])]
    lines += ["", *(f"Not measured: {name}: {reason}." for name, reason in result["missing"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _timings_table(timings: Sequence[Row]) -> list[str]:
    lines = []
    for row in timings:
        others = "; ".join(f"{number(one['ratio']['median'])}× {name}" for name, one in row["peers"].items())
        size = f"{row['rows']} × {row['columns']}"
        lines.append(
            (
                f"`{row['op']}`",
                row["case"] or "–",
                size,
                row["dtype"],
                row["backend"],
                row["cache"],
                number(row["us"]["median"]),
                f"{number(row['us']['p10'])} – {number(row['us']['p90'])}",
                f"{row['share_of_floor']['median']:.0%}",
                others or "–",
            )
        )
    header = (
        "op",
        "case",
        "rows × columns",
        "dtype",
        "backend",
        "cache",
        "µs",
        "p10 – p90",
        "share of floor",
        "peers take",
    )
    return table(header, lines, 6)


def _without_error(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def passed(result: Row) -> bool:
    """Return whether every check held."""
    return "broken" not in result and all(row["passed"] for kind in KINDS for row in result[kind])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="the same code on CPU tensors at tiny sizes")
    parser.add_argument("--checks", action="store_true", help="no timings")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--rounds", type=int, default=None, metavar="N", help="default: 50")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help=f"default of a whole run: {RESULTS.name}"
    )
    arguments = parser.parse_args()
    if arguments.dry_run:
        interpret()
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 would run the kernels on the CPU: unset it, or say --dry-run")
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False here; --dry-run runs the same code without one")
    here: Machine = DryRun() if arguments.dry_run else Gpu()
    rounds = arguments.rounds or (2 if arguments.dry_run else 50)
    result: Row = {"schema": SCHEMA, "date": now(), "machine": machine(), "rounds": rounds, "timings": []}
    result |= {kind: [] for kind in KINDS}
    with quick_calls() if here.dry else nullcontext():
        try:
            run(here, arguments.ops, rounds, arguments.checks, result)
        except Exception as error:  # what was found so far is written
            traceback.print_exc()
            result["broken"] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(document(result))
    whole = not (arguments.dry_run or arguments.checks) and set(arguments.ops) == set(OPS)
    output = arguments.json or (RESULTS if whole else None)
    if output:
        output.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n")
    if not passed(result):
        raise SystemExit(result.get("broken", "some results differ from the oracle's"))


if __name__ == "__main__":
    main()
