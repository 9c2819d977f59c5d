"""Reads compiled GPU code: how wide the loads of an argument are, registers, spills, and the occupancy these allow.

Widths come from PTX, or LLVM IR for AMD, where each load's address can be followed back to the kernel's argument; the
machine code is then counted as well, because that is what runs.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

THREAD, LOADED = "thread", "loaded"
WIDE = 128  # bits


@dataclass(frozen=True)
class Instruction:
    """One instruction of PTX or LLVM IR, as far as addresses go.

    Attributes
    ----------
    writes, reads
        Names of registers.
    origins
        What its result is made of beside the registers read: ``"arg3"``, `THREAD`, `LOADED`.
    bits
        Of a load from global memory, a thread; 0 for anything else.
    """

    writes: tuple[str, ...]
    reads: tuple[str, ...]
    origins: frozenset[str] = frozenset()
    bits: int = 0


class Load(NamedTuple):
    """A load from global memory.

    Attributes
    ----------
    bits
        Bits that a thread loads.
    origins
        What its address is made of.
    """

    bits: int
    origins: frozenset[str]


def loads(instructions: Iterable[Instruction]) -> list[Load]:
    """Return all loads from global memory with what their addresses are made of."""
    program = list(instructions)
    made: dict[str, frozenset[str]] = {}
    changed = True
    while changed:  # loops carry registers backwards
        changed = False
        for one in program:
            origins = (
                frozenset({LOADED}) if one.bits else one.origins.union(*(made.get(r, frozenset()) for r in one.reads))
            )
            for register in one.writes:
                if not origins <= made.get(register, frozenset()):
                    made[register] = origins | made.get(register, frozenset())
                    changed = True
    return [
        Load(one.bits, one.origins.union(*(made.get(register, frozenset()) for register in one.reads)))
        for one in program
        if one.bits
    ]


_PTX = re.compile(r"^\s*(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s+(.*?);", re.MULTILINE)
_PTX_REGISTER = re.compile(r"%[a-z]+\d+")
_PTX_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfsu](\d+)$")


def ptx_instructions(text: str) -> Iterator[Instruction]:
    """Read the instructions of one PTX kernel."""
    for _, name, operands in _PTX.findall(text):
        kind = name.split(".")
        if kind[0] in ("st", "bra", "bar", "ret", "red", "fence", "membar"):
            continue
        if kind[0] == "cp" and "async" in kind:
            if "global" in kind:  # cp.async.cg.shared.global [to], [from], bytes
                _, source, size = operands.split(",")[:3]
                yield Instruction((), tuple(_PTX_REGISTER.findall(source)), bits=8 * int(size, 0))
            continue
        target, source = _split_target(operands)
        writes, reads = tuple(_PTX_REGISTER.findall(target)), tuple(_PTX_REGISTER.findall(source))
        if kind[:2] == ["ld", "param"]:
            parameter = re.search(r"_param_(\d+)", source)
            yield Instruction(writes, (), frozenset({f"arg{parameter[1]}"} if parameter else ()))
        elif kind[:2] in (["ld", "shared"], ["ld", "local"]) or kind[0] in ("atom", "ldmatrix"):
            yield Instruction(writes, (), frozenset({LOADED}))
        elif kind[0] == "ld":
            vector, bits = _PTX_WIDTH.search(name).groups()  # type: ignore[union-attr]
            yield Instruction(writes, reads, bits=int(vector or 1) * int(bits))
        else:
            yield Instruction(writes, reads, frozenset({THREAD} if "%tid" in source or "%laneid" in source else ()))


def _split_target(operands: str) -> tuple[str, str]:
    """Return an instruction's target and its other operands; a vector in braces is one operand."""
    match = re.match(r"\s*(\{[^}]*\}|[^,]*),?(.*)", operands, re.DOTALL)
    assert match is not None
    return match[1], match[2]


_LLVM = re.compile(r"^\s*(?:(%[\w.]+) = )?(.*)$", re.MULTILINE)
_LLVM_NAME = re.compile(r"%[\w.]+")
_LLVM_TYPE = re.compile(
    r"(?:load |masked\.load\.|buffer\.load\.)(?:volatile )?"
    r"(?:<(\d+) x (\w+)>|v?(\d*)([if]\d+|bfloat|float|half|double))"
)
_LLVM_BITS = {"float": 32, "bfloat": 16, "half": 16, "double": 64}


def llvm_instructions(text: str) -> Iterator[Instruction]:
    """Read the instructions of the AMD kernel in LLVM IR."""
    header = re.search(r"^define amdgpu_kernel void @[^\s(]+\((.*)\) [^()]*\{$", text, re.MULTILINE)
    assert header is not None
    for i, name in enumerate(re.findall(r"(%[\w.]+)(?:,|$)", header[1])):
        yield Instruction((name,), (), frozenset({f"arg{i}"}))
    body = text[header.end() : text.index("\n}", header.end())]
    for target, source in _LLVM.findall(body):
        if not target:
            continue
        source = source.partition(", !")[0]
        reads = tuple(_LLVM_NAME.findall(source))
        if "workitem.id" in source:
            yield Instruction((target,), (), frozenset({THREAD}))
        elif "addrspace(3)" in source and source.startswith("load"):
            yield Instruction((target,), (), frozenset({LOADED}))
        elif re.match(r"load |.*(masked\.load|buffer\.load)", source):
            yield Instruction((target,), reads, bits=_llvm_bits(source))
        elif source.startswith("atomicrmw"):
            yield Instruction((target,), (), frozenset({LOADED}))
        else:
            yield Instruction((target,), reads)


def _llvm_bits(source: str) -> int:
    match = _LLVM_TYPE.search(source)
    assert match is not None, source
    count, kind = match[1] or match[3] or "1", match[2] or match[4]
    return int(count) * (_LLVM_BITS.get(kind) or int(kind[1:]))


@dataclass
class Widths:
    """How the tiles of an argument are loaded, instructions by bits a thread.

    Attributes
    ----------
    streamed
        Loads whose address depends on the thread and on nothing read before: tiles of a stream.
    chosen
        Loads whose address depends on the thread and on values read before: a block that was chosen, a gather.
    single
        Loads of one element for all threads.
    """

    streamed: Counter[int] = field(default_factory=Counter)
    chosen: Counter[int] = field(default_factory=Counter)
    single: Counter[int] = field(default_factory=Counter)

    def wide_share(self) -> float | None:
        """Return the share of the tiles' bits that loads of 128 or more bring, None if no tiles are loaded.

        Tiles are what is streamed. Where nothing is, they are what is chosen, unless all of that is narrow: a gather
        of single elements looks no different.
        """
        tiles = self.streamed or (self.chosen if max(self.chosen, default=0) >= WIDE else Counter())
        bits = sum(width * count for width, count in tiles.items())
        wide = sum(width * count for width, count in tiles.items() if width >= WIDE)
        return wide / bits if bits else None


def widths(found: Iterable[Load], arguments: Iterable[int]) -> Widths:
    """Sort the loads through any of these arguments of the kernel."""
    wanted = {f"arg{i}" for i in arguments}
    result = Widths()
    for load in found:
        if wanted & load.origins:
            kind = result.single
            if THREAD in load.origins:
                kind = result.chosen if LOADED in load.origins else result.streamed
            kind[load.bits] += 1
    return result


_SASS_LOAD = re.compile(r"\bLDG\.E([.\w]*)")
_SASS_WIDTH = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def sass_loads(sass: str) -> dict[int, int]:
    """Count the loads from global memory in machine code, by bits a thread."""
    found: Counter[int] = Counter()
    for suffixes in _SASS_LOAD.findall(sass):
        sizes = [_SASS_WIDTH[one] for one in suffixes.split(".") if one in _SASS_WIDTH]
        found[sizes[0] if sizes else 32] += 1
    return dict(found)


def sass_spills(sass: str) -> int:
    """Count loads from and stores to local memory."""
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def resource_usage(text: str) -> dict[str, dict[str, int]]:
    """Read ``cuobjdump -res-usage``: ``{function: {"REG": 40, "STACK": 0, …}}``."""
    functions = {}
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.*)", text):
        functions[name] = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", usage)}
    return functions


def cuobjdump(option: str, cubin: Path) -> str:
    """Run the cuobjdump that triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


class Multiprocessor(NamedTuple):
    """What one multiprocessor holds at once; of NVIDIA's cuda_occupancy.h and the technical specifications there."""

    warps: int
    blocks: int
    shared: int  # KiB
    reserved: int  # bytes of shared memory that each block loses
    granularity: int  # bytes in which shared memory is handed out


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64, 0, 256),
    80: Multiprocessor(64, 32, 164, 1024, 128),
    86: Multiprocessor(48, 16, 100, 1024, 128),
    89: Multiprocessor(48, 24, 100, 1024, 128),
    90: Multiprocessor(64, 32, 228, 1024, 128),
    100: Multiprocessor(64, 32, 228, 1024, 128),
    120: Multiprocessor(48, 24, 100, 1024, 128),
}
_REGISTERS, _SUBPARTITIONS, _REGISTER_UNIT = 65536, 4, 256


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Return the share of a multiprocessor's warps that can be resident, by registers and shared memory of a block."""
    limits = MULTIPROCESSORS[capability]
    by_warps = limits.warps // warps
    per_warp = _rounded(max(registers, 1) * 32, _REGISTER_UNIT)
    by_registers = _REGISTERS // _SUBPARTITIONS // per_warp * _SUBPARTITIONS // warps
    if per_warp * _rounded(warps, _SUBPARTITIONS) > _REGISTERS:  # the hardware's check before a launch
        by_registers = 0
    block = _rounded(shared + limits.reserved, limits.granularity)
    by_shared = (limits.shared << 10) // block if block else limits.blocks
    return min(limits.blocks, by_warps, by_registers, by_shared) * warps / limits.warps


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


AMD_WAVES, AMD_SIMDS, AMD_LDS = 8, 4, 64 << 10  # of a compute unit of gfx90a and gfx942


def amd_figures(text: str, shared: int, warps: int) -> dict[str, float]:
    """Read registers, spills and occupancy from AMD assembly; LDS is given at launch and bounds the waves as well."""

    def number(pattern: str) -> int:
        match = re.search(pattern, text)
        assert match is not None, pattern
        return int(match[1])

    blocks = AMD_LDS // shared if shared else AMD_WAVES * AMD_SIMDS
    waves = min(number(r"; Occupancy: (\d+)"), blocks * warps / AMD_SIMDS)
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.vgpr_spill_count:\s+(\d+)"),
        "scalar_spills": number(r"\.sgpr_spill_count:\s+(\d+)"),  # into lanes of vector registers, not to memory
        "stack": number(r"; ScratchSize: (\d+)"),
        "occupancy": waves / AMD_WAVES,
    }


_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_WIDTH = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}


def amd_loads(text: str) -> dict[int, int]:
    """Count the loads from global memory in AMD assembly, by bits a thread."""
    found: Counter[int] = Counter()
    for name in _AMD_LOAD.findall(text):
        found[next((bits for key, bits in _AMD_WIDTH.items() if name.startswith(key)), 8)] += 1
    return dict(found)


READERS: Mapping[str, Callable[[str], Iterator[Instruction]]] = {"ptx": ptx_instructions, "llir": llvm_instructions}
