"""Compiles the CUDA C++ kernels for one architecture and reads the machine code. Needs nvcc, and no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from bench import assembly
from bench.harness import Row

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc' / 'include'}")


def missing() -> str | None:
    """Return why CUDA kernels cannot be compiled here, None if they can."""
    if not list(SOURCES.glob("*.cu")):
        return "this version has no CUDA sources"
    return None if shutil.which("nvcc") else "nvcc is not installed"


def version() -> dict[str, str]:
    """Return nvcc's version, nothing without one."""
    if shutil.which("nvcc") is None:
        return {}
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"nvcc": re.search(r"release ([\d.]+)", text)[1]}  # type: ignore[index]


def compiled(source: Path, capability: int) -> list[Row]:
    """Compile one source for one architecture and return a row for each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / f"{source.stem}.ptx"
        keep = ("--keep", "--keep-dir", folder)  # the PTX on the way
        log = _nvcc(source, "-cubin", f"-arch=sm_{capability}", "-Xptxas", "-v", *keep, "-o", cubin)
        usage = assembly.resource_usage(assembly.cuobjdump("-res-usage", cubin))
        sass = by_function(assembly.cuobjdump("-sass", cubin))
        threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
    spilled = spills(log)
    rows = []
    for symbol, one in usage.items():
        if symbol not in sass:
            continue
        name, shared = name_of(symbol), one["SHARED"]
        warps = int(threads[symbol]) // 32 if symbol in threads else None
        rows.append(
            {
                "language": "CUDA",
                "op": source.stem,
                "case": "",
                "dtype": dtype_of(name),
                "kernel": name,
                "target": f"sm_{capability}",
                "registers": one["REG"],
                "spills": spilled[symbol],
                "stack": one["STACK"],
                "shared": shared,
                "warps": warps,
                "occupancy": warps and assembly.occupancy(capability, one["REG"], shared, warps),
                "loads": assembly.sass_loads(sass[symbol]),
                "wide_share": None,
            }
        )
    return rows


@cache
def fingerprint(source: Path) -> str:
    """Return what the machine code of a source depends on beside the target: it, the headers and the compiler."""
    headers = ROOT / "csrc" / "include" / "ugsd"
    files = [source, *sorted(headers.glob("*.h")), *sorted(headers.glob("cuda/*.h"))]
    return "; ".join([str(version()), *FLAGS[:2], *(path.read_text() for path in files)])


def _nvcc(source: Path, *options: str | Path) -> str:
    done = subprocess.run(["nvcc", *FLAGS, *options, source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc fails on {source.name}: {done.stderr}")
    return done.stdout + done.stderr


def spills(log: str) -> dict[str, int]:
    """Read bytes spilled by each function from what ``-Xptxas -v`` prints."""
    pattern = (
        r"Function properties for (\w+)\n\s*\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    return {symbol: int(stores) + int(loads) for symbol, stores, loads in re.findall(pattern, log)}


def by_function(sass: str) -> dict[str, str]:
    """Split machine code by function."""
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def dtype_of(name: str) -> str | None:
    """Return the dtype among a kernel's template arguments, None where it has none."""
    match = re.search(r"[<, ](float16|bfloat16|float)[>,]", name)
    return match and ("float32" if match[1] == "float" else match[1])


def without_types(name: str) -> str:
    """Return a kernel's name without the element types among its template arguments."""
    return re.sub(r"(<|, )(?:b?float(?:16)?(?:, )?)+", r"\1", name).replace("<>", "").replace(", >", ">")


def name_of(symbol: str) -> str:
    """Return a kernel's name and template arguments, without the names it lives in."""
    filter_names = shutil.which("c++filt")
    if filter_names is None:
        return symbol
    full = subprocess.run([filter_names, symbol], capture_output=True, text=True, check=True).stdout.strip()
    full = re.sub(r"\(anonymous namespace\)::|ugsd::cuda::|ugsd::|^void ", "", full)
    depth = 0
    for i, character in enumerate(full):  # the arguments begin at the first parenthesis outside <>
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return full[:i]
    return full
