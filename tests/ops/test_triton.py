"""The Triton kernels under the interpreter, in a process of its own, and the draws that they share with the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops import cases
from tests.ops.interpreted import ROWS
from ugsd_fast import ops

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DRAWS = int(os.environ.get("UGSD_DRAWS", "1000"))
"""Draws to compare with those of C++; 10,000 take two minutes."""
HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="runs the other tests under the interpreter")
@pytest.mark.parametrize("files", [[*ROWS, "out", "triton"]], ids="-".join)
def test_under_the_interpreter(files: list[str]) -> None:
    paths = [str(HERE / f"test_{name}.py") for name in files]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    ("vocabulary", "filters"),
    [(1000, {}), (9000, {"temperature": 0.9}), (5000, {"top_k": 50, "top_p": 0.9, "min_p": 0.01})],
    ids=["one-tile", "many-tiles", "filters"],
)
@cases.on_backends("sample", native=True)
def test_draws_are_those_of_the_reference(vocabulary: int, filters: dict[str, float], backend: cases.Backend) -> None:
    """99.9% of the tokens that the fastest CPU kernels draw, the others within rounding of a column's edge."""
    draws = DRAWS // (10 if filters.get("top_k") else 2)
    logits = cases.random_logits(draws, vocabulary, seed=vocabulary)
    got = ops.sample(logits, seed=-3, offset=2**40 + 1, **filters)
    with ops.use_backend("cpp" if cases.extension else "reference"):
        expected = ops.sample(logits, seed=-3, offset=2**40 + 1, **filters)
    same = got.tokens == expected.tokens
    assert (~same).sum() <= max(1, draws // 1000)  # C++ differs from float64 there, or Triton does
    assert torch.equal(got.stats.argmax, expected.stats.argmax)
    torch.testing.assert_close(got.logprob[same], expected.logprob[same], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "size", "programs"),
    [
        (1, 32000, 4, 125),
        (1, 32000, 2, 63),
        (1, 152064, 2, 149),
        (4, 32000, 2, 128),
        (4, 32000, 4, 128),
        (8, 152064, 2, 304),
    ],
)
def test_few_rows_fill_the_multiprocessors(rows: int, vocabulary: int, size: int, programs: int) -> None:
    """As far as records leave it: those of a row in tiles of less than 1 KiB would weigh more than 5%."""
    from ugsd_fast.kernels.rows import plan

    assert plan(rows, vocabulary, 132, size, 32).grid == (programs,)


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("narrow", [False, True])
def test_each_thread_has_a_whole_vector_to_load(lanes: int, size: int, narrow: bool) -> None:
    from ugsd_fast.kernels.rows import plan

    for rows in (1, 2, 4, 8, 64, 1000):
        launch = plan(rows, 152064, 132, size, lanes, narrow)
        assert launch.tile * size >= 16 * lanes * launch.warps
        assert launch.tile * launch.tiles >= 152064


@pytest.mark.skipif(INTERPRETED, reason="asks the compile target")
def test_options_are_those_of_the_compile_target() -> None:
    """Torch may be a CPU build while kernels are compiled for any GPU."""
    from bench.compile_report import recording
    from ugsd_fast.kernels import rows

    with recording("gfx942", []):
        assert (rows.target().warp_size, rows.registers(96)) == (64, {})
    with recording("sm_90", []):
        assert (rows.target().warp_size, rows.registers(96)) == (32, {"maxnreg": 96})
