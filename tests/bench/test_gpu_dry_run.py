"""`bench.gpu` runs as it would on a GPU, and finds wrong results wrong. The clock is a CPU's and means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, summary
from ugsd_fast import ops

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the dry run of some ops writes: each kind of check, a peer, torch.compile and the draft step."""
    pytest.importorskip("triton", reason="triton is not installed")
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    chosen = ["token_stats", "sample", "gate_block", "kv_compact"]
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--rounds", "1", "--json", str(output), "--ops", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def test_every_check_passes(results: dict[str, Any]) -> None:
    assert {(row["op"], row["backend"]) for row in results["checks"]} == {
        (op, "triton") for op in ("token_stats", "sample", "gate_block", "kv_compact")
    }
    assert gpu.passed(results)


def test_what_is_left_out_has_a_reason(results: dict[str, Any]) -> None:
    assert results["missing"]["sample on cuda"] == "needs a GPU"
    assert all(results["missing"].values())
    (step,) = results["draft_step"]
    assert (step["captured"], step["reason"]) == (False, "a dry run captures nothing")


def test_drafter_is_run_with_a_graph_and_without(results: dict[str, Any]) -> None:
    (row,) = results["decoding"]
    assert (row["agreed"], row["clips"], row["captured"]) == (1, 1, False)
    assert row["us"].keys() == {"calls", "graph"}


def test_an_error_costs_one_row_and_fails_the_run() -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA error: out of luck\nat a place")

    named = {"op": "sample", "case": "", "rows": 1, "columns": 9, "dtype": "float32", "backend": "cuda"}
    row = gpu.attempt(named, fail)
    assert row == {**named, "passed": False, "error": "RuntimeError: CUDA error: out of luck"}
    empty: dict[str, Any] = {kind: [] for kind in gpu.KINDS}
    assert gpu.passed(empty)
    assert not gpu.passed({**empty, "broken": "at once"})
    for kind in gpu.KINDS:
        result = {**empty, kind: [row], "device": {"name": "a GPU", "cuda": "13"}, "machine": {"torch": "2"}}
        assert not gpu.passed(result)
        assert "out of luck" in gpu.document({**result, "date": "today", "timings": [], "missing": {}})


def test_ops_are_timed_with_their_peers(results: dict[str, Any]) -> None:
    rows = [row for row in results["timings"] if row["op"] == "token_stats"]
    assert {row["cache"] for row in rows} == {"cold", "warm"}
    for row in rows:
        assert {"torch eager", "torch.compile of torch eager"} <= row["peers"].keys(), row["left_out"]
        assert row["us"]["median"] > 0
        assert row["floor_us"] > 0


def test_document(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    summary.write(tmp_path, docs=tmp_path, readme=None)
    text = (tmp_path / "gpu.md").read_text()
    assert "`token_stats` on triton: 1 of 1 agree" in text
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, "a table's lines have one number of columns"


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU: torch.cuda.is_available() is False here" in done.stderr


def test_comparison_finds_what_differs() -> None:
    expected = ops.token_stats(torch.tensor([[2.0, 1.0]]))
    assert gpu.compared(expected, expected) == (0.0, 0)
    assert gpu.compared(expected._replace(argmax=torch.tensor([1])), expected)[1] == 1
    worst, wrong = gpu.compared(expected._replace(entropy=expected.entropy + 1e-3), expected)
    assert worst > 1
    assert wrong == 1
    assert gpu.compared(gpu.poisoned(expected), expected)[1] == 5
    infinite = torch.tensor([-torch.inf])
    assert gpu.compared(infinite, infinite) == (0.0, 0)
    assert gpu.compared(torch.zeros(1), infinite)[1] == 1
