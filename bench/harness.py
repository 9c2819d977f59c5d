"""Measures an op against its baselines and against a bare read of the same bytes, in one process, in turns.

A *case* is one op on one input. Every round of a case times each contender once, in a shuffled order: some
milliseconds of back-to-back calls after one call that does not count. Ratios and shares are taken within a
round, so that a slow moment of the machine falls on both sides; what is reported is their median over rounds.

*Warm*: one set of inputs, in the last-level cache or nearer. *Cold*: contenders walk through copies of the
inputs that together are several times the last-level cache, so that every call reads from memory.

malloc's thresholds are raised first: with glibc's defaults each large temporary of a baseline is mapped anew
and page-faults, which would flatter whatever allocates none.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import transformers
from torch import Tensor

import ugsd_fast
from ugsd_fast import ops

Call = Callable[[], object]
Row = dict[str, Any]

SCHEMA = 1
SUBJECT = "ugsd_fast"
FLOOR = "floor"
MALLOC_THRESHOLD = 1 << 30  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER_IN_DATA = 0x7FC01234  # as float32, and its upper half as bfloat16, a NaN


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are."""

    vocabulary: int = 152064  # Qwen2.5-Omni and Qwen3-Omni, padding included
    width: int = 2048  # D of the language-model head
    layers: int = 28
    slots: int = 2048  # T of the KV cache


FULL = Sizes()
QUICK = Sizes(vocabulary=1000, width=64, layers=2, slots=64)


class Calls(NamedTuple):
    """The contenders of a case, each a call without arguments on inputs that it holds.

    Attributes
    ----------
    subject
        The public op.
    floor
        Bare reads (or copies) of the bytes that the result depends on; the fastest of a round is the round's floor.
    baselines
        What a user would write without the op, by the name that reports print.
    """

    subject: Call
    floor: Mapping[str, Call]
    baselines: Mapping[str, Call] = {}


@dataclass(frozen=True)
class Target:
    """A ratio to reach at one thread with a warm cache.

    Attributes
    ----------
    of
        Name of a baseline, or ``"floor"``.
    at_least
        Least time of ``of`` / time of the op.
    at_most
        Most time of the op / time of ``of``.
    """

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, ratio: float) -> Row:
        """Compare with ``ratio``, the time of ``of`` over the op's."""
        if self.at_least is not None:
            return {"of": self.of, "at_least": self.at_least, "measured": ratio, "met": ratio >= self.at_least}
        assert self.at_most is not None
        return {"of": self.of, "at_most": self.at_most, "measured": 1 / ratio, "met": 1 / ratio <= self.at_most}


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes
    ----------
    label
        What sets the case apart from the op's others, dtype and logits aside.
    shape, dtype
        Of the main input, as reports print them.
    bytes
        What the result depends on, each byte counted once.
    build
        Makes inputs from a seed and returns the contenders on them.
    logits
        Kind of the logits, None where the op takes none.
    targets
        Judged at one thread and warm.
    cold
        Whether each call finds its inputs in memory only.
    """

    label: str
    shape: str
    dtype: str
    bytes: int
    build: Callable[[int], Calls]
    logits: str | None = None
    targets: tuple[Target, ...] = ()
    cold: bool = False


@dataclass(frozen=True)
class Settings:
    """How a case is measured."""

    threads: int = 1
    rounds: int = 21
    sample_seconds: float = 4e-3
    cold_bytes: int = 0  # what the copies of a cold case's inputs add up to at least
    judged: bool = True  # whether targets mean something at these sizes
    seed: int = 0


def shape_of(*sizes: int) -> str:
    """Return sizes as reports print them: ``"5 × 152064"``."""
    return " × ".join(map(str, sizes))


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def raise_malloc_thresholds() -> bool:
    """Have glibc keep large freed blocks instead of unmapping them; return whether it agreed."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, MALLOC_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, MALLOC_THRESHOLD))
    return False


def bare_reads(*tensors: Tensor) -> dict[str, Call]:
    """Return calls that read every byte of contiguous tensors and do next to nothing with it.

    ``wmemchr`` is glibc's vectorised search, for a value that does not occur (one thread only); ``int64 sum`` is
    torch's over the bytes taken as 64-bit integers, with as many threads as torch has.
    """
    words = [tensor.detach().view(-1).view(torch.int64) for tensor in tensors]

    def integer_sum() -> None:
        for word in words:
            word.sum()

    reads: dict[str, Call] = {"int64 sum": integer_sum}
    if torch.get_num_threads() == 1:
        with suppress(AttributeError, OSError):
            search = ctypes.CDLL(None).wmemchr
            search.restype, search.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
            ranges = [(word.data_ptr(), _NEVER_IN_DATA, word.numel() * 2) for word in words]

            def scan() -> None:
                for arguments in ranges:
                    search(*arguments)

            if all(search(*arguments) is None for arguments in ranges):
                reads["wmemchr"] = scan
    return reads


def in_turns(calls: Sequence[Call]) -> Call:
    """Return a call that makes the next of ``calls`` each time, over and over."""
    turns = cycle(calls)
    return calls[0] if len(calls) == 1 else lambda: next(turns)()


def contenders(case: Case, settings: Settings) -> dict[str, Call]:
    """Build a case's inputs and return its calls by name; floors are named ``floor: …``."""
    copies = max(1, ceil(settings.cold_bytes / case.bytes)) if case.cold else 1
    built = [case.build(seed) for seed in range(copies)]
    calls = {SUBJECT: in_turns([one.subject for one in built])}
    for name in built[0].floor:
        calls[f"{FLOOR}: {name}"] = in_turns([one.floor[name] for one in built])
    for name in built[0].baselines:
        calls[name] = in_turns([one.baselines[name] for one in built])
    return calls


def time_calls(call: Call, repetitions: int) -> float:
    """Return the seconds of one call, of ``repetitions`` made back to back."""
    start = time.perf_counter_ns()
    for _ in range(repetitions):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repetitions


def page_faults(call: Call, repetitions: int) -> float:
    """Return minor page faults a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    time_calls(call, repetitions)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / repetitions


def interleave(calls: Mapping[str, Call], settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time every call once a round.

    Returns
    -------
    samples
        Seconds a call, one number a round.
    repetitions
        Calls behind each of these numbers.
    """
    repetitions = {}
    for name, call in calls.items():
        call()  # the first call of all may compile, start threads or fault its outputs in
        quickest = min(time_calls(call, 1) for _ in range(3))
        repetitions[name] = max(1, round(settings.sample_seconds / quickest))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(settings.seed).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(settings.rounds):
            shuffle(order)
            for name in order:
                calls[name]()  # brings back what the contender before has pushed out of the caches
                samples[name].append(time_calls(calls[name], repetitions[name]))
    finally:
        if collecting:
            gc.enable()
    return samples, repetitions


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the sorted ``values`` lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float], scale: float = 1.0) -> Row:
    """Return median, 10th and 90th percentile, times ``scale``."""
    return {
        "median": statistics.median(values) * scale,
        "p10": quantile(values, 0.1) * scale,
        "p90": quantile(values, 0.9) * scale,
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio within each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def floor_of_rounds(samples: Mapping[str, Sequence[float]]) -> list[float]:
    """Return each round's fastest floor."""
    floors = [values for name, values in samples.items() if name.startswith(f"{FLOOR}: ")]
    return [min(values) for values in zip(*floors, strict=True)]


def measure(case: Case, settings: Settings) -> Row:
    """Run a case and return its row of results; times in microseconds."""
    calls = contenders(case, settings)
    samples, repetitions = interleave(calls, settings)
    subject, floor = samples[SUBJECT], floor_of_rounds(samples)
    baselines = {
        name: {
            **spread(values, 1e6),
            "ratio": spread(ratios(values, subject)),
            "faults": page_faults(calls[name], repetitions[name]),
        }
        for name, values in samples.items()
        if name != SUBJECT and not name.startswith(f"{FLOOR}: ")
    }
    share = spread(ratios(floor, subject))
    against = {FLOOR: share["median"], **{name: result["ratio"]["median"] for name, result in baselines.items()}}
    judged = case.targets if settings.judged and settings.threads == 1 and not case.cold else ()
    return {
        "case": case.label,
        "shape": case.shape,
        "dtype": case.dtype,
        "logits": case.logits,
        "cache": "cold" if case.cold else "warm",
        "threads": settings.threads,
        "bytes": case.bytes,
        "subject": {
            **spread(subject, 1e6),
            "calls": repetitions[SUBJECT] * settings.rounds,
            "faults": page_faults(calls[SUBJECT], repetitions[SUBJECT]),
        },
        "floor": {
            **spread(floor, 1e6),
            "share": share,
            "by": {
                name.removeprefix(f"{FLOOR}: "): statistics.median(values) * 1e6
                for name, values in samples.items()
                if name.startswith(f"{FLOOR}: ")
            },
        },
        "baselines": baselines,
        "targets": [target.judge(against[target.of]) for target in judged if target.of in against],
    }


def _first_line(path: str, key: str = "") -> str:
    """Return what follows ``key`` in the first line of a file that starts with it; empty if there is none."""
    with suppress(OSError):
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.startswith(key):
                return line[len(key) :].strip(" \t:")
    return ""


def cache_sizes() -> dict[str, int]:
    """Return bytes of each data or unified cache level as one core sees it: ``{"L1": 32768, …}``."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = _first_line(f"{folder}/size")
        if size and _first_line(f"{folder}/type") != "Instruction":
            sizes["L" + _first_line(f"{folder}/level")] = int(size[:-1]) * units[size[-1]]
    return sizes


def machine() -> Row:
    """Describe the machine and the versions, with nothing that names it."""
    cpuinfo = "/proc/cpuinfo"
    flags = (_first_line(cpuinfo, "flags") or _first_line(cpuinfo, "Features")).split()
    return {
        "cpu": _first_line(cpuinfo, "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "simd": [flag for flag in ("avx2", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve") if flag in flags],
        "caches": cache_sizes(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "ugsd_fast": ugsd_fast.__version__,
        "isa": ops.isa(),
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run_cases(cases: Iterable[Case], settings: Settings) -> list[Row]:
    """Measure every case, print it and return the rows."""
    rows = []
    for case in cases:
        rows.append(measure(case, settings))
        print(describe(rows[-1]), flush=True)
    return rows


def describe(row: Row) -> str:
    """Return a row as one line of text."""
    name = " ".join(filter(None, (row["case"], row["dtype"], row["logits"], row["cache"])))
    subject, share = row["subject"], row["floor"]["share"]["median"]
    parts = [f"{name:58} {subject['median']:9.1f} µs [{subject['p10']:.1f}, {subject['p90']:.1f}]  floor {share:4.0%}"]
    parts += [f"{result['ratio']['median']:.1f}× {baseline}" for baseline, result in row["baselines"].items()]
    parts += [f"{'met' if target['met'] else 'MISSED'}: {target_text(target)}" for target in row["targets"]]
    return "  ".join(parts)


def target_text(target: Row) -> str:
    """Return a judged target in words: ``≥ 20× torch eager``."""
    if "at_least" in target:
        if target["of"] == FLOOR:
            return f"≥ {target['at_least']:.0%} of the floor"
        return f"≥ {target['at_least']:g}× {target['of']}"
    return f"≤ {target['at_most']:g}× {'the floor' if target['of'] == FLOOR else target['of']}"


class Session(NamedTuple):
    """What the command line asks for, and under which conditions it runs."""

    sizes: Sizes
    settings: Settings
    conditions: Row
    output: Path | None

    def write(self, result: Row) -> None:
        """Write the result, if a file was named, with the conditions and how much other processes got in the way."""
        if self.output:
            preemptions = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            after = {"preemptions": preemptions, "load_after": os.getloadavg()[0]}
            result = {**result, "conditions": {**self.conditions, **after}}
            self.output.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n")


def rounded(value: Any) -> Any:
    """Return JSON data with every float cut to four significant digits, more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def begin(module: str, description: str) -> Session:
    """Read a benchmark's command line and set malloc and threads accordingly."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, few rounds: whether it runs, not how fast")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=None, metavar="N")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results here as well")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    last_level = max(cache_sizes().values(), default=1 << 25)
    settings = Settings(
        threads=arguments.threads,
        rounds=arguments.rounds or (3 if arguments.quick else Settings.rounds),
        sample_seconds=1e-4 if arguments.quick else Settings.sample_seconds,
        cold_bytes=0 if arguments.quick else 4 * last_level,
        judged=not arguments.quick,
    )
    conditions = {
        "date": now(),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "quick": arguments.quick,
        "malloc_thresholds_raised": raise_malloc_thresholds(),
        "load_before": os.getloadavg()[0],
    }
    return Session(QUICK if arguments.quick else FULL, settings, conditions, arguments.json)


def main(op: str, cases: Callable[[Sizes, bool], Iterable[Case]]) -> None:
    """Run an op's benchmark from the command line.

    Parameters
    ----------
    op
        Name of the op.
    cases
        Makes the cases from the sizes and whether ``torch.compile`` baselines are wanted.
    """
    session = begin(f"bench.kernels.{op}", f"Benchmark of ops.{op}.")
    rows = run_cases(cases(session.sizes, session.sizes is FULL), session.settings)
    session.write({"op": op, "backend": ops.backends()[op][0], "rows": rows})
