"""Every CUDA kernel for every target: registers, spills and the width of its loads, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = ("75", "80", "86", "89", "90", "100", "120")
READ_SASS_OF = ("75", "90")
MOST_REGISTERS = 128
READ_NO_LOGITS = ("gate_block_kernel",)
OPCODES = re.compile(
    "abs|add|and|atom|bar|bfi|bfind|bra|brev|clz|cvt|cvta|div|ex2|fma|ld|mad|max|membar|min|mov|mul|neg|not|or|prmt|"
    "rcp|rem|ret|selp|setp|shf|shfl|shl|shr|st|sub|vote|xor"
)
"""All that a simulator of the generic path has to know."""
NEWER = r"\.(?:bf16|bf16x2|f16x2|f32x2|tf32|e4m3|e5m2|v8|b128|xorsign|async|bulk|cluster|L2::cache_hint|NaN)\b"
"""Types and modifiers that need more than compute capability 7.5."""

nvcc = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(nvcc is None, reason="no nvcc in PATH")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[Path, str]]:
    """For each source its fat binary and what ptxas said."""
    folder = tmp_path_factory.mktemp("cuda")
    code = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS] + ["-gencode=arch=compute_75,code=compute_75"]

    def compile_one(source: Path) -> tuple[Path, str]:
        made = folder / f"{source.stem}.fatbin"
        flags = ["-std=c++17", "-O3", f"-I{ROOT}/csrc/include", "-Xptxas=-v", "--threads=2", *code]
        command = [str(nvcc), *flags, "-fatbin", str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return made, result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_registers_and_spills(compiled: dict[Path, tuple[Path, str]], source: Path) -> None:
    log = compiled[source][1]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", log)]
    assert {target for _, target in kernels} == set(TARGETS)
    assert len(kernels) == len(registers) == len(stacks)
    assert [kernel for kernel, stack in zip(kernels, stacks) if any(map(int, stack))] == []
    assert [one for one, used in zip(kernels, registers) if used > MOST_REGISTERS] == []


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with triton or CUDA")
        path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(path) if path.exists() else None
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_assembly(compiled: dict[Path, tuple[Path, str]], source: Path) -> None:
    """No access to local memory, and 16-byte loads of the logits at every dtype."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in PATH nor in triton")
    for target in READ_SASS_OF:
        command = [tool, "-sass", "-arch", f"sm_{target}", str(compiled[source][0])]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = text.split("Function : ")[1:]
        assert functions
        for function in functions:
            name = function.split(maxsplit=1)[0]
            assert re.findall(r"\b(?:STL|LDL)\b", function) == [], name
            if not any(kernel in name for kernel in READ_NO_LOGITS):
                assert re.findall(r"\bLDG\.E\.128", function), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_ptx_is_of_compute_capability_75(compiled: dict[Path, tuple[Path, str]], source: Path) -> None:
    """The one PTX in the binary runs on whatever has 7.5, a simulator too: no newer instruction is in it."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in PATH nor in triton")
    command = [tool, "-ptx", str(compiled[source][0])]
    _, *modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n.version ")
    (text,) = modules
    assert re.findall(r"^\.target (.*)$", text, re.MULTILINE) == ["sm_75"]
    code = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*)([.\w:]*)(?:\s[^;]*)?;", text, re.MULTILINE)
    assert code
    assert {name for name, _ in code if not OPCODES.fullmatch(name)} == set()
    assert [name + rest for name, rest in code if re.search(NEWER, rest)] == []
