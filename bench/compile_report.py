"""Compiles every Triton and CUDA kernel ahead of time and reads the machine code. No GPU is needed.

Run as ``python -m bench.compile_report``. For Triton, the ops run on CPU tensors with a stand-in for the driver: each
launch gets as far as the compiler, with the signature, constants and alignments of a real one, and stops there. What
is then compiled, in several processes, is kept in ``build/compile-report`` by its source, target and compiler: an
interrupted run goes on where it was, and after a change only what changed is compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import assembly, inputs, nvcc
from bench.assembly import WIDE
from bench.harness import SCHEMA, Row, dtype_name, now
from bench.markdown import table
from bench.problems import Problem, problems
from ugsd_fast import ops
from ugsd_fast.ops import backend
from ugsd_fast.ops.backend import OPS
from ugsd_fast.reference import spec

ROOT = Path(__file__).resolve().parents[1]
CUDA_TARGETS = {f"sm_{capability}": capability for capability in assembly.MULTIPROCESSORS}
AMD_TARGETS = ("gfx90a", "gfx942")
TARGETS = (*CUDA_TARGETS, *AMD_TARGETS)
LANGUAGES = ("Triton", "CUDA")
CACHE = ROOT / "build" / "compile-report"
FEW, MANY = (1, 152064), (64, 32000)
"""Rows and columns."""
STREAMED = ("logits", "target_logits", "draft_logits", "weight")
"""Arguments that are read in tiles, whose loads must be wide."""

MOST_REGISTERS = 128
REDUCTIONS = ("token_stats", "logprob_rank", "filter_logits", "sample", "accept_block", "lm_head_stats")
"""Ops whose kernels must keep to `MOST_REGISTERS`."""


@dataclass(frozen=True)
class Launch:
    """What one launch asks the compiler for.

    Attributes
    ----------
    op, label, dtype
        Of the problem it was first seen in.
    function
        The ``triton.jit`` function.
    signature, constants, attributes, options
        As the launch gives them.
    streamed
        Numbers of the kernel's parameters that point into a tensor of `STREAMED`.
    """

    op: str
    label: str
    dtype: torch.dtype
    function: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    streamed: tuple[int, ...]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        parts = (self.function._fn_name, self.signature, self.constants, self.attributes, self.options)
        return "; ".join(map(str, parts))


class Driver:
    """Stands in for a GPU's driver as far as the launch needs one."""

    def __init__(self, target: Any, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def gpu_target(name: str) -> Any:
    """Return triton's object for a target's name."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", CUDA_TARGETS[name], 32) if name in CUDA_TARGETS else GPUTarget("hip", name, 64)


@contextmanager
def recording(target: str, launches: list[tuple[Any, ...]]) -> Iterator[None]:
    """Let Triton's launches run up to the compiler, as for ``target``, and note what they ask of it."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    bound: dict[str, Any] = {}
    pack = JITFunction._pack_args

    def pack_args(self: Any, backend: Any, kwargs: Any, bound_args: Any, *rest: Any) -> Any:
        bound.clear()
        bound.update(bound_args)
        return pack(self, backend, kwargs, bound_args, *rest)

    def compile_nothing(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> None:
        launches.append((self, dict(bound), signature, constants, attributes, options))

    before = driver._active
    driver.set_active(Driver(gpu_target(target), TARGETS.index(target)))  # type: ignore[arg-type]
    try:
        with (
            patch.object(JITFunction, "_pack_args", pack_args),
            patch.object(JITFunction, "_do_compile", compile_nothing),
            patch.object(backend, "_why_not_on", lambda backend, device: None),
            patch.object(torch.version, "hip", "stand-in" if target in AMD_TARGETS else None),
            ops.use_backend("triton"),
        ):
            yield
    finally:
        driver._active = before


def launches_of(problem: Problem, arguments: dict[str, Any], target: str) -> list[Launch]:
    """Return what a call of the op asks the compiler for."""
    recorded: list[tuple[Any, ...]] = []
    with recording(target, recorded):
        problem.run(arguments)
    streamed = {_address(arguments[name]) for name in STREAMED if name in arguments}
    found = []
    for function, bound, signature, constants, attributes, options in recorded:
        values = [value for name, value in bound.items() if signature[name] != "constexpr"]
        parameters = [leaf for leaf in tree_leaves(values) if leaf is not None]
        numbers = [i for i, leaf in enumerate(parameters) if isinstance(leaf, Tensor) and _address(leaf) in streamed]
        found.append(
            Launch(
                problem.op,
                problem.label,
                problem.dtype,
                function,
                signature,
                constants,
                attributes,
                options,
                tuple(numbers),
            )
        )
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def triton_figures(launch: Launch, target: str) -> Row:
    """Compile a launch for a target and read the machine code."""
    from triton import compile
    from triton.compiler import ASTSource

    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    kernel = compile(source, target=gpu_target(target), options=launch.options.__dict__)
    text = "ptx" if target in CUDA_TARGETS else "llir"
    found = assembly.loads(assembly.READERS[text](kernel.asm[text]))
    widths = assembly.widths(found, launch.streamed)
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if target in CUDA_TARGETS:
        figures = _cuda_figures(kernel.asm["cubin"], kernel.metadata.name, CUDA_TARGETS[target], shared, warps)
    else:
        assembled = kernel.asm["amdgcn"]
        figures = {**assembly.amd_figures(assembled, shared, warps), "loads": assembly.amd_loads(assembled)}
    return {
        "target": target,
        "warps": warps,
        "shared": shared,
        **figures,
        "streamed": dict(widths.streamed),
        "chosen": dict(widths.chosen),
        "single": dict(widths.single),
        "wide_share": widths.wide_share(),
    }


class Job(Protocol):
    """Something to compile for a target."""

    @property
    def key(self) -> str:
        """Equal for jobs whose machine code and figures are equal."""

    def rows(self) -> list[Row]:
        """Compile, and return the figures of each kernel."""

    def described(self, rows: list[Row]) -> list[Row]:
        """Return the same with the names of what was compiled."""


@dataclass(frozen=True)
class TritonJob:
    """A launch on a target."""

    launch: Launch
    target: str

    @property
    def key(self) -> str:
        import triton

        parts = ("triton", triton.__version__, self.target, self.launch.function.cache_key, self.launch.key)
        return "; ".join((*parts, str(self.launch.streamed), *_code(assembly, triton_figures, _cuda_figures)))

    def rows(self) -> list[Row]:
        return [triton_figures(self.launch, self.target)]

    def described(self, rows: list[Row]) -> list[Row]:
        launch = self.launch
        names = {"language": "Triton", "op": launch.op, "case": launch.label, "dtype": dtype_name(launch.dtype)}
        return [names | {"kernel": launch.function.__name__, "constants": _constants(launch)} | row for row in rows]


@dataclass(frozen=True)
class CudaJob:
    """A source of the CUDA kernels on a target."""

    source: Path
    target: str

    @property
    def key(self) -> str:
        return "; ".join((self.source.name, self.target, nvcc.fingerprint(self.source), *_code(assembly, nvcc)))

    def rows(self) -> list[Row]:
        return nvcc.compiled(self.source, CUDA_TARGETS[self.target])

    def described(self, rows: list[Row]) -> list[Row]:
        return rows


def _code(*parts: Any) -> list[str]:
    """Return the source of what makes figures of machine code."""
    return [inspect.getsource(part) for part in parts]


def cached(job: Job) -> Path:
    """Return where a job's rows are kept."""
    return CACHE / f"{hashlib.sha256(job.key.encode()).hexdigest()[:32]}.json"


def compile_all(jobs: Sequence[Job], processes: int) -> list[list[Row]]:
    """Return the rows of every job; those that no earlier run has left are compiled in this many processes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    files = [cached(job) for job in jobs]
    missing = list({path: job for path, job in zip(files, jobs, strict=True) if not path.exists()}.items())
    print(f"== {len(jobs)} to compile, {len(jobs) - len(missing)} of them known", flush=True)
    start = time.monotonic()

    def compile_some(first: int) -> None:
        for i in range(first, len(missing), max(1, processes)):
            path, job = missing[i]
            rows = job.rows()
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(rows))
            part.rename(path)
            seconds = time.monotonic() - start
            print(
                f"[{i + 1}/{len(missing)}, {seconds:.0f} s]", *map(describe, job.described(rows)), sep="\n", flush=True
            )

    if processes:
        # Forked: a launch holds a kernel's function. Their results come back as files.
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=compile_some, args=(first,)) for first in range(processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("some kernels do not compile")
    else:
        compile_some(0)
    return [job.described(json.loads(path.read_text())) for path, job in zip(files, jobs, strict=True)]


def _constants(launch: Launch) -> Row:
    """Return the constants a launch compiles in, by the names of the kernel's parameters."""
    names = list(launch.signature)
    return {
        ".".join(map(str, (names[path[0]], *path[1:]))): value if isinstance(value, (int, float, bool)) else str(value)
        for path, value in launch.constants.items()
    }


def _cuda_figures(cubin: bytes, name: str, capability: int, shared: int, warps: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = assembly.resource_usage(assembly.cuobjdump("-res-usage", path))[name]
        sass = assembly.cuobjdump("-sass", path)
    return {
        "registers": usage["REG"],
        "spills": assembly.sass_spills(sass),
        "stack": usage["STACK"],
        "occupancy": assembly.occupancy(capability, usage["REG"], shared, warps),
        "loads": assembly.sass_loads(sass),
    }


def faults(row: Row) -> list[str]:
    """Return what is wrong with a row: spills everywhere, registers of reductions and narrow loads from sm_80 on."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["target"] in AMD_TARGETS:
        return found
    if row["op"] in REDUCTIONS and row["registers"] > MOST_REGISTERS:
        found.append(f"{row['registers']} registers")
    if CUDA_TARGETS[row["target"]] < 80:
        return found
    if row["wide_share"] not in (None, 1.0):
        found.append(f"{row['wide_share']:.0%} of the streamed logits by loads of 128 bits")
    # A CUDA kernel has a scalar loop for tails and unaligned rows beside its vectors, if it has vectors.
    if row["language"] == "CUDA" and row["dtype"] and not _by_width(row).get(WIDE):
        found.append("no load of 128 bits")
    return found


def _by_width(row: Row) -> dict[int, int]:
    return {int(bits): count for bits, count in row["loads"].items()}  # JSON has made text of the bits


def sizes(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the sizes whose launches are compiled: the one row of a decode step, and rows enough to fill a GPU."""
    cache = {"slots": 64, "layers": 2}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield {"rows": FEW[0], "vocabulary": FEW[1], "dtype": dtype, "width": 64, **cache}
        if not quick and dtype is not torch.float16:  # compiles to what bfloat16 does but for one conversion
            yield {"rows": MANY[0], "vocabulary": MANY[1], "dtype": dtype, "width": 2048, **cache}


@contextmanager
def constant_logits() -> Iterator[None]:
    """Make logits of zeros: no kernel reads them."""

    def zeros(case: spec.Case, *shape: int, generator: object = None) -> Tensor:
        return torch.zeros(*shape, case.vocabulary, dtype=case.dtype)

    def block(kind: str, length: int, vocabulary: int, dtype: torch.dtype, *_: object) -> inputs.Block:
        draft, target = (torch.zeros(1, rows, vocabulary, dtype=dtype) for rows in (length, length + 1))
        return inputs.Block(torch.zeros(1, length, dtype=torch.int64), draft, target, torch.zeros(1, length))

    with (
        patch.object(spec, "make_logits", zeros),
        patch.object(inputs, "make_logits", zeros),
        patch.object(inputs, "drafted_block", block),
    ):
        yield


def launches(targets: Sequence[str], wanted: Sequence[str], quick: bool) -> list[TritonJob]:
    """Return the distinct launches of the ops on each target."""
    found: dict[str, dict[str, Launch]] = {target: {} for target in targets}
    available = ops.backends()
    for size in sizes(quick):
        for problem in problems(**size):
            if problem.op in wanted and "triton" in available[problem.op]:
                with constant_logits():
                    arguments = problem.make(torch.device("cpu")).arguments
                for target in targets:
                    for launch in launches_of(problem, arguments, target):
                        found[target].setdefault(launch.key, launch)
    return [TritonJob(launch, target) for target, ours in found.items() for launch in ours.values()]


def run(
    targets: Sequence[str], wanted: Sequence[str], languages: Sequence[str], quick: bool, processes: int
) -> list[Row]:
    """Compile the distinct launches of the ops and the CUDA sources of their names on each target, and print them."""
    jobs: list[Job] = []
    if "CUDA" in languages and nvcc.missing() is None:
        sources = [source for source in sorted(nvcc.SOURCES.glob("*.cu")) if source.stem in wanted]
        jobs += [CudaJob(source, target) for target in targets if target in CUDA_TARGETS for source in sources]
    if "Triton" in languages:
        jobs += launches(targets, wanted, quick)
    rows = [row for found in compile_all(jobs, processes) for row in found]
    return sorted(rows, key=lambda row: (LANGUAGES.index(row["language"]), targets.index(row["target"])))


def describe(row: Row) -> str:
    """Return a row as one line of text."""
    share = "   –" if row["wide_share"] is None else f"{row['wide_share']:4.0%}"
    occupancy = "   –" if row["occupancy"] is None else f"{row['occupancy']:4.0%}"
    name = f"{row['kernel']} {row['dtype'] or ''} ({row['op']}{row['case'] and ', '}{row['case']})"
    parts = [
        f"{row['target']:7} {name:88} {row['registers']:3} registers {row['spills']} spills "
        f"{row['shared']:6} shared {occupancy} occupancy {share} wide",
        *(f"WRONG: {fault}" for fault in faults(row)),
    ]
    return "  ".join(parts)


HOW = """\
**How.** Triton: each distinct launch of each op ({sizes}) is compiled with
the signature, constants, alignments and options that the launch itself gives. CUDA: `nvcc -O3` of `csrc/cuda`, where
one code serves all launches.
Registers a thread, spills and shared memory are those of the machine code (`cuobjdump`; for AMD vector registers, as
the assembly says). *Occupancy* is the share of a multiprocessor's warps that registers and shared memory allow to
be resident, by NVIDIA's formula; how many a launch has is another matter. *128-bit*: of all loads in a Triton kernel's
PTX (LLVM IR for AMD) whose address depends on the thread and on the logits' (or the weight's) pointer, and on no value
loaded before (in kernels with none of these: on one, as in the residual's row), the share by bits; a load of one
element is none of them. CUDA kernels have a scalar loop for tails and
unaligned rows beside the vectors: there the figure counts instructions. A cell is the worst of all launches; `/`
separates {dtypes} (of the verifier's logits, where a CUDA kernel has a drafter's of any dtype too)."""
DTYPES = ("float32", "bfloat16", "float16")


def described_sizes(quick: bool) -> str:
    """Return the sizes of `sizes` in words."""
    return f"{FEW[0]} row of {FEW[1]} columns" + (
        "" if quick else f", {MANY[0]} of {MANY[1]}; the latter not in float16"
    )


def document(result: Row) -> str:
    """Return ``docs/compile.md``."""
    rows, quick = result["rows"], result["quick"]
    targets = [target for target in TARGETS if any(row["target"] == target for row in rows)]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    wrong = [row for row in rows if faults(row)]
    lines = [
        "# The GPU kernels, compiled without a GPU",
        "",
        f"Written by `make bench` ({result['date']}, {versions}); the numbers are in `bench/results/compile.json`.",
        "",
        HOW.format(dtypes=", ".join(DTYPES), sizes=described_sizes(quick)),
        "",
        f"{len(rows)} kernels for {', '.join(targets)}. Promised: no spills, at most {MOST_REGISTERS} registers in "
        f"{', '.join(f'`{op}`' for op in REDUCTIONS)}, from sm_80 on logits by 128-bit loads alone: "
        + ("**kept by all**." if not wrong else f"**missed by {len(wrong)}**:"),
        "",
        *(f"- {row['target']} `{row['kernel']}` {row['dtype'] or ''}: {'; '.join(faults(row))}" for row in wrong),
        *([""] if wrong else []),
    ]
    for language in LANGUAGES:
        chosen = [row for row in rows if row["language"] == language]
        if chosen:
            lines += [f"## {language}", "", *_kernels_table(chosen, targets), ""]
    for name, reason in result["missing"].items():
        lines.append(f"Not compiled: {name}: {reason}.")
    return "\n".join(lines).rstrip() + "\n"


def _kernels_table(rows: Sequence[Row], targets: Sequence[str]) -> list[str]:
    """Return a line a kernel: registers and occupancy on each target, then spills, shared memory and wide loads."""
    targets = [target for target in targets if any(row["target"] == target for row in rows)]
    lines = []
    for op, kernel in dict.fromkeys((row["op"], nvcc.without_types(row["kernel"])) for row in rows):
        ours = [row for row in rows if (row["op"], nvcc.without_types(row["kernel"])) == (op, kernel)]
        nvidia = [row for row in ours if row["target"] in CUDA_TARGETS and CUDA_TARGETS[row["target"]] >= 80]
        amd = [row for row in ours if row["target"] in AMD_TARGETS]
        cells = [_by_dtype([row for row in ours if row["target"] == target], _registers) for target in targets]
        wide = [_by_dtype(nvidia, _wide), *([_by_dtype(amd, _wide)] if rows[0]["language"] == "Triton" else [])]
        spilled, shared = max(row["spills"] for row in ours), max(row["shared"] for row in ours)
        lines.append((f"`{op}`", f"`{kernel}`", *cells, str(spilled), str(shared), *wide))
    header = ["op", "kernel", *(f"{target}: registers, occupancy" for target in targets), "spills", "shared bytes"]
    header += ["128-bit from sm_80"] + (["128-bit on AMD"] if rows[0]["language"] == "Triton" else [])
    return table(header, lines, 2)


def _by_dtype(rows: Sequence[Row], cell: Callable[[Sequence[Row]], str]) -> str:
    """Return a cell of all dtypes, once where they agree."""
    found = [cell(one) for dtype in (*DTYPES, None) if (one := [row for row in rows if row["dtype"] == dtype])]
    return " / ".join(found if len(set(found)) > 1 else found[:1]) or "–"


def _registers(rows: Sequence[Row]) -> str:
    bounds = [row["occupancy"] for row in rows if row["occupancy"] is not None]
    return f"{max(row['registers'] for row in rows)}, {min(bounds):.0%}" if bounds else str(rows[0]["registers"])


def _wide(rows: Sequence[Row]) -> str:
    if rows[0]["language"] == "CUDA":
        counts = [(_by_width(row).get(WIDE, 0), sum(_by_width(row).values())) for row in rows]
        return "{} of {} loads".format(*min(counts))
    shares = [row["wide_share"] for row in rows if row["wide_share"] is not None]
    return f"{min(shares):.0%}" if shares else "–"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one row only")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, metavar="LANGUAGE")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes; 0: this one")
    parser.add_argument(
        "--check", action="store_true", help="fail where a kernel spills, is too large or loads narrowly"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results here as well")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":  # read as triton was imported
        os.execv(sys.executable, [sys.executable, "-m", "bench.compile_report", *sys.argv[1:]])

    start = time.monotonic()
    rows = run(arguments.targets, arguments.ops, arguments.languages, arguments.quick, arguments.jobs)
    wrong = [row for row in rows if faults(row)]
    print(f"== {len(rows)} kernels, {len(wrong)} wrong; {time.monotonic() - start:.0f} s")
    if arguments.json:
        result = {
            "schema": SCHEMA,
            "date": now(),
            "versions": versions(),
            "quick": arguments.quick,
            "rows": rows,
            "missing": missing(arguments.ops),
        }
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.check and wrong:
        raise SystemExit("\n".join(map(describe, wrong)))


def missing(wanted: Iterable[str]) -> dict[str, str]:
    """Return why kernels are not compiled here."""
    found = {f"{op} in Triton": ops.backends().missing[op].get("triton") for op in wanted}
    return {name: reason for name, reason in {**found, "the CUDA kernels": nvcc.missing()}.items() if reason}


def versions() -> Row:
    """Return what the machine code depends on."""
    import triton

    return {"triton": triton.__version__, **nvcc.version()}


if __name__ == "__main__":
    main()
