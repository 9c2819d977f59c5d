"""The CUDA kernels on the host emulator, against the float64 oracles and the C++ backend."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import pytest

from tests.ops import cases

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 alone"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the emulator"),
    pytest.mark.skipif(cases.extension is None, reason="the extension is not built"),
]


def run(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def test_every_op_but_the_filters() -> None:
    """The ops' own tests: all kinds of rows, dtypes, layouts, ids, rules and limits; equal bits wherever rows lie."""
    names = ("token_stats", "logprob_rank", "gate_block", "kv_compact", "accept_block")
    modules = [f"tests/ops/test_{name}.py" for name in names]
    run("pytest", "-q", "-x", "-p", "tests.cuda.emulated", *modules, "-k", "not V1519 and not V1520")


def test_filters() -> None:
    """Selected ones: a block of 512 fibres a row takes its time."""
    chosen = "test_matches_the_definition and V63 or tied or top_p_ or temperature_zero or nothing_finite"
    run("pytest", "-q", "-x", "-p", "tests.cuda.emulated", "tests/ops/test_filter_logits.py", "-k", chosen)


def test_same_tokens_as_the_cpp_backend() -> None:
    run("tests.cuda.same_tokens")
