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


MODULES = ("token_stats", "logprob_rank", "filter_logits", "sample", "gate_block", "kv_compact", "accept_block", "out")
LEFT_OUT = (
    "test_draws_are_the_inverse_cdf_of_the_published_uniforms",  # 50,000 rows; test_same_tokens draws its own
    "test_tokens_follow_the_law",
    "test_thread_count_changes_no_bit",  # there are no threads
    "V1519",  # a row takes seconds
    "V1520",
)


@pytest.mark.parametrize("module", MODULES)
def test_the_ops_own_tests(module: str) -> None:
    """All kinds of rows, dtypes, layouts, ids, filters, rules, limits, poisoned results; equal bits anywhere."""
    left_out = " and ".join(f"not {name}" for name in LEFT_OUT)
    run("pytest", "-q", "-x", "-p", "tests.cuda.emulated", f"tests/ops/test_{module}.py", "-k", left_out)


def test_launches_memory_and_graphs() -> None:
    run("pytest", "-q", "-x", "-p", "tests.cuda.emulated", "tests/cuda/kernels")


def test_same_tokens_as_the_cpp_backend() -> None:
    run("tests.cuda.same_tokens")
