"""A pytest plugin: the tests of the ops run on the CUDA kernels, compiled for the emulator, and on nothing else.

``pytest -p tests.cuda.emulated tests/ops/test_token_stats.py``. It changes the process it is loaded into, so that
`test_numerics` loads it into processes of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from tests.ops import cases
from ugsd_fast.ops import backend

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/cuda/emulator"
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wno-unknown-pragmas", "-DUGSD_MODULE=_cuda_emulated", "-DUGSD_DEVICE_TYPE=dlpack::kCpu"]
FLAGS += ['-DUGSD_ARCHS="emulated"']


def compile_kernels() -> Path:
    """Compile csrc/cuda as plain C++, or find what was made of the same sources."""
    sources = sorted(path for folder in ("csrc", "tests/cuda") for path in (ROOT / folder).rglob("*.[ch]*"))
    sources += sorted((ROOT / "csrc/cuda").glob("*.cu"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    made = ROOT / "build/cuda-emulator" / key / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        folders = [
            ROOT / "csrc",
            EMULATOR,
            ROOT / "csrc/include",
            sysconfig.get_path("include"),
            pybind11.get_include(),
        ]
        units = [EMULATOR / "kernels.cpp", ROOT / "csrc/cuda/bindings.cpp"]
        part = made.with_suffix(".part")
        subprocess.run(["g++", *FLAGS, *(f"-I{f}" for f in folders), *map(str, units), "-o", str(part)], check=True)
        part.rename(made)
    return made


def load() -> ModuleType:
    """Import ``ugsd_fast.kernels.cuda`` over the emulated extension and make it the ``cuda`` backend of CPU tensors."""
    spec = importlib.util.spec_from_file_location("_cuda_emulated", compile_kernels())
    assert spec is not None
    assert spec.loader is not None
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    sys.modules["ugsd_fast._cuda"] = compiled
    kernels: Any = importlib.import_module("ugsd_fast.kernels.cuda")
    kernels._launch = lambda tensor: (partial(kernels._reserve, tensor.device, 0), 0)
    for op in backend.OPS:
        if hasattr(kernels, op):
            backend._implementations[op, "cuda"] = getattr(kernels, op)
    refuse = backend._why_not_on
    backend._why_not_on = lambda name, device: None if name == "cuda" else refuse(name, device)
    return kernels


def launches() -> int:
    """Return how many kernels have run so far."""
    return emulator.emulator_launches()


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """Keep the launches of a call, none of which runs, and return their replay: what a CUDA graph does with them."""
    emulator.emulator_capture(True)
    try:
        results = call()
    finally:
        emulator.emulator_capture(False)

    def replay() -> object:
        emulator.emulator_replay()
        return results  # whose memory is the graph's

    return replay


torch.set_num_threads(1)
kernels: Any = load()
emulator = ctypes.CDLL(str(compile_kernels()))
emulator.emulator_launches.restype = ctypes.c_int64
emulator.emulator_capture.argtypes = [ctypes.c_bool]
emulator.emulator_replay.restype = None
cases.backends_of = lambda op: [cases.Backend("reference" if op == "lm_head_stats" else "cuda")]
