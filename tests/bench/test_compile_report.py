"""The compile report reads assembly right, and every Triton kernel keeps what is promised of its machine code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import assembly, compile_report, nvcc
from bench.assembly import LOADED, THREAD, Load

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{
	.reg .b32 	%r<111>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd2, %r2, 16;
	add.s64 	%rd3, %rd1, %rd2;
$L__BB0_2:
	@%p2 ld.global.v4.b32 { %r6, %r7, %r8, %r9 }, [ %rd3 + 0 ];
	ld.global.L1::evict_last.b16 { %rs1 }, [ %rd3 + 32 ];
	cp.async.cg.shared.global [ %r30 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;
	add.s64 	%rd3, %rd3, 4096;
	ld.global.b32 	%r10, [%rd1];
	st.shared.b32 	[%r59], %r6;
	ld.shared.b32 	%r11, [%r59];
	mad.wide.s32 	%rd4, %r11, 4, %rd3;
	ld.global.v2.b64 { %rd5, %rd6 }, [ %rd4 + 0 ];
	ld.global.nc.b32 	%r12, [%r1];
	@%p1 bra 	$L__BB0_2;
	st.global.b32 [ %rd3 + 0 ], { %r45 };
	ret;
}
"""
LLVM = """
define amdgpu_kernel void @kernel(ptr addrspace(1) inreg readonly captures(none) %0, i32 inreg %1) #0 !dbg !4 {
  %3 = tail call i32 @llvm.amdgcn.workitem.id.x(), !dbg !12
  %4 = zext i32 %3 to i64
  br label %5
5:
  %6 = phi i64 [ 0, %2 ], [ %9, %5 ]
  %7 = getelementptr half, ptr addrspace(1) %0, i64 %6
  %8 = getelementptr half, ptr addrspace(1) %7, i64 %4
  %9 = add i64 %6, 1024
  %10 = load <8 x i16>, ptr addrspace(1) %8, align 16, !dbg !20
  %11 = load half, ptr addrspace(1) %7, align 2
  %12 = load <1 x float>, ptr addrspace(3) %70, align 4
  %13 = getelementptr half, ptr addrspace(1) %8, i32 %12
  %14 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %13, i16 0, i64 9, i32 15)
  %15 = tail call <2 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v2i32(ptr addrspace(8) %14, i32 %3, i32 0, i32 0), !dbg !33
  br i1 %16, label %5, label %17
}
"""


def test_loads_of_ptx_are_traced_to_their_argument() -> None:
    found = assembly.loads(assembly.ptx_instructions(PTX))
    stream, block = frozenset({"arg0", THREAD}), frozenset({"arg0", THREAD, LOADED})
    assert found == [
        Load(128, stream),
        Load(16, stream),
        Load(128, stream),
        Load(32, frozenset({"arg0"})),
        Load(128, block),
        Load(32, frozenset({"arg1"})),
    ]
    widths = assembly.widths(found, [0])
    assert widths.streamed == Counter({128: 2, 16: 1})
    assert widths.chosen == Counter({128: 1})
    assert widths.single == Counter({32: 1})
    assert widths.wide_share() == pytest.approx(256 / 272)
    assert assembly.widths(found, [1]).wide_share() is None
    assert assembly.Widths(chosen=Counter({128: 3, 32: 4})).wide_share() == pytest.approx(0.75)
    assert assembly.Widths(chosen=Counter({32: 4})).wide_share() is None


def test_loads_of_llvm_are_traced_to_their_argument() -> None:
    widths = assembly.widths(assembly.loads(assembly.llvm_instructions(LLVM)), [0])
    assert widths.streamed == Counter({128: 1})
    assert widths.single == Counter({16: 1})
    assert widths.chosen == Counter({64: 1})


def test_machine_code_is_counted() -> None:
    sass = """
        /*01f0*/              @!P0 LDG.E.128 R4, [R16.64] ;
        /*0810*/                   LDG.E.128.CONSTANT R4, desc[UR4][R4.64] ;
        /*0850*/                   LDG.E R4, [R4.64] ;
        /*0b20*/                   LDG.E.U16 R0, [R10.64] ;
        /*0b30*/                   LDG.E.STRONG.GPU R0, [R10.64] ;
        /*0b40*/                   LDL R0, [R1] ;
        /*0b60*/                   STL.64 [R1], R7 ;
    """
    assert assembly.sass_loads(sass) == {128: 2, 32: 2, 16: 1}
    assert assembly.sass_spills(sass) == 2
    usage = " Function toy:\n  REG:26 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0\n"
    assert assembly.resource_usage(usage)["toy"]["STACK"] == 8
    assert assembly.amd_loads("global_load_dwordx4 v[0:3]\n buffer_load_ushort v1\n s_load_dwordx2") == {128: 1, 16: 1}


CALCULATOR = """
#include <cstdio>
#include <cstddef>
#include "cuda_occupancy.h"
int main() {
  int capability, registers, shared, warps, threads, per_sm, reserved;
  while (std::scanf("%d %d %d %d", &capability, &registers, &shared, &warps) == 4 &&
         std::scanf("%d %d %d", &threads, &per_sm, &reserved) == 3) {
    cudaOccDeviceProp prop;
    prop.computeMajor = capability / 10, prop.computeMinor = capability % 10;
    prop.maxThreadsPerBlock = 1024, prop.maxThreadsPerMultiprocessor = threads;
    prop.regsPerBlock = prop.regsPerMultiprocessor = 65536, prop.warpSize = 32;
    prop.sharedMemPerBlock = prop.sharedMemPerBlockOptin = prop.sharedMemPerMultiprocessor = per_sm;
    prop.reservedSharedMemPerBlock = reserved, prop.numSms = 100;
    cudaOccFuncAttributes attributes;
    attributes.maxThreadsPerBlock = 1024, attributes.numRegs = registers, attributes.sharedSizeBytes = 0;
    attributes.maxDynamicSharedSizeBytes = per_sm - reserved, attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.carveoutConfig = 100;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &prop, &attributes, &state, warps * 32, shared)) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_occupancy_is_what_nvidias_calculator_says(tmp_path: Path) -> None:
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    command = ["g++", "-w", "-I", include, tmp_path / "calculator.cpp", "-o", tmp_path / "calculator"]
    subprocess.run(command, check=True)
    cases = [
        (capability, registers, shared, warps)
        for capability in assembly.MULTIPROCESSORS
        for registers in (16, 40, 64, 65, 95, 128, 200)
        for shared in (0, 32, 1024, 17000, 48000)
        for warps in (1, 4, 6, 8, 32)
        if registers * warps * 32 <= 65536
    ]
    lines = []
    for case in cases:
        limits = assembly.MULTIPROCESSORS[case[0]]
        lines.append(" ".join(map(str, (*case, limits.warps * 32, limits.shared << 10, limits.reserved))))
    done = subprocess.run([tmp_path / "calculator"], input="\n".join(lines), capture_output=True, text=True, check=True)
    blocks = [int(line) for line in done.stdout.split()]
    assert len(blocks) == len(cases)
    for case, count in zip(cases, blocks, strict=True):
        expected = count * case[3] / assembly.MULTIPROCESSORS[case[0]].warps
        assert assembly.occupancy(*case) == pytest.approx(expected), case


def test_nvcc_output_is_read() -> None:
    log = """ptxas info    : Function properties for _Z1kPf
    24 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
"""
    assert nvcc.spills(log) == {"_Z1kPf": 44}
    sass = "\n\tFunction : _Z1kPf\n\tLDG.E.128 R0\n\n\tFunction : _Z1mPf\n\tLDG.E R0\n"
    assert {name: assembly.sass_loads(text) for name, text in nvcc.by_function(sass).items()} == {
        "_Z1kPf": {128: 1},
        "_Z1mPf": {32: 1},
    }
    names = ("k<float>", "k<float16, bfloat16>", "k<float, (Sums)1, true>", "float_k")
    assert [nvcc.without_types(name) for name in names] == ["k", "k", "k<(Sums)1, true>", "float_k"]
    assert [nvcc.dtype_of(name) for name in ("k<float>", "k<float16, (Sums)1>", "k<bfloat16>", "k")] == [
        "float32",
        "float16",
        "bfloat16",
        None,
    ]


def compiled(output: Path, *options: str) -> dict[str, Any]:
    """A report, made in a process where triton compiles, whatever it does in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_report", "--quick", "--jobs", "0", "--languages", "Triton"]
    subprocess.run([*command, "--json", str(output), *options], cwd=ROOT, env=environment, check=True)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kernel on one NVIDIA target, in all dtypes, and one kernel for AMD."""
    folder = tmp_path_factory.mktemp("compile")
    nvidia = compiled(folder / "nvidia.json", "--targets", "sm_80")
    amd = compiled(folder / "amd.json", "--targets", "gfx942", "--ops", "token_stats")
    return {**nvidia, "rows": nvidia["rows"] + amd["rows"]}


def test_kernels_keep_what_is_promised(report: dict[str, Any]) -> None:
    assert {row["target"] for row in report["rows"]} == {"sm_80", "gfx942"}
    assert [compile_report.describe(row) for row in report["rows"] if compile_report.faults(row)] == []


def test_every_triton_kernel_is_compiled(report: dict[str, Any]) -> None:
    compiled = {row["op"] for row in report["rows"] if row["language"] == "Triton"}
    assert compiled == set(compile_report.OPS) - {name.split()[0] for name in report["missing"]}


def test_streams_are_found(report: dict[str, Any]) -> None:
    """A kernel that reads logits and of which no load is traced to them would pass any check of their width."""
    for row in report["rows"]:
        if row["language"] == "Triton" and row["op"] in ("token_stats", "sample", "logprob_rank", "lm_head_stats"):
            assert row["streamed"], compile_report.describe(row)


def test_document(report: dict[str, Any]) -> None:
    text = compile_report.document(report)
    assert "| `token_stats` | `token_stats_kernel` |" in text
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, "a table's lines have one number of columns"


def test_faults_are_named() -> None:
    row = {
        "target": "sm_80",
        "op": "sample",
        "language": "Triton",
        "dtype": "float32",
        "loads": {"128": 1},
        "spills": 0,
    }
    fine = {**row, "case": "plain", "stack": 0, "registers": 128, "wide_share": 1.0}
    assert compile_report.faults(fine) == []
    assert compile_report.faults({**fine, "registers": 129}) == ["129 registers"]
    assert compile_report.faults({**fine, "case": "top-k 50, top-p 0.9", "registers": 129}) == ["129 registers"]
    assert compile_report.faults({**fine, "spills": 2}) == ["2 spills, 0 bytes of stack"]
    assert compile_report.faults({**fine, "wide_share": 0.5}) == ["50% of the streamed logits by loads of 128 bits"]
    assert compile_report.faults({**fine, "wide_share": 0.5, "target": "sm_75"}) == []
    scalar = {**fine, "language": "CUDA", "wide_share": None, "loads": {"32": 4}}
    assert compile_report.faults(scalar) == ["no load of 128 bits"]


@dataclass(frozen=True)
class FakeJob:
    key: str
    notes: Path

    def rows(self) -> list[dict[str, Any]]:
        with self.notes.open("a") as notes:
            notes.write(f"{self.key}\n")
        return [{"registers": len(self.key)}]

    def described(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"kernel": self.key} for row in rows]


@pytest.mark.parametrize("processes", [0, 2])
def test_nothing_is_compiled_twice(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in one run nor in the next, unless its key is another."""
    monkeypatch.setattr(compile_report, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(compile_report, "describe", str)
    notes = tmp_path / "notes"
    a, bc, d = (FakeJob(key, notes) for key in ("a", "bc", "d"))
    expected = [[{"registers": 1, "kernel": "a"}], [{"registers": 2, "kernel": "bc"}]]
    assert compile_report.compile_all([a, bc, a], processes) == [*expected, expected[0]]
    assert compile_report.compile_all([a, bc], processes) == expected
    compile_report.compile_all([d, a], processes)
    assert sorted(notes.read_text().split()) == ["a", "bc", "d"]
