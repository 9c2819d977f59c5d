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
MORE_REGISTERS = {("residual_kernel", "100"): 200, ("residual_kernel", "120"): 200}
"""Where 128 do not do yet: ptxas spills this kernel on these targets under that bound, and takes 191 to 196 without."""
READ_NO_LOGITS = ("gate_block_kernel",)
ONE_LOAD_A_DTYPE = 3
"""Kernels of accept_block hold the code of all three dtypes: at least one wide load each."""

nvcc = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(nvcc is None, reason="no nvcc in PATH")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[Path, str]]:
    """For each source its fat binary and what ptxas said."""
    folder = tmp_path_factory.mktemp("cuda")
    code = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS] + ["-gencode=arch=compute_75,code=compute_75"]

    def compile_one(source: Path) -> tuple[Path, str]:
        made = folder / f"{source.stem}.fatbin"
        flags = ["-std=c++17", "-O3", f"-I{ROOT}/csrc/include", "-Xptxas=-v", *code]
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
    for (kernel, target), used in zip(kernels, registers):
        more = [most for (name, where), most in MORE_REGISTERS.items() if name in kernel and where == target]
        assert used <= (more[0] if more else MOST_REGISTERS), (kernel, target)


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
                least = ONE_LOAD_A_DTYPE if source.stem == "accept_block" else 1
                assert len(re.findall(r"\bLDG\.E\.128", function)) >= least, name
