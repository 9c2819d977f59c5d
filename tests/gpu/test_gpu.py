"""On a GPU, every op on Triton and CUDA agrees with the float64 oracle, waits for nothing, and replays from a graph.

All in one process of its own, because this one may have chosen Triton's interpreter: `bench.gpu` without its timings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import BACKENDS, describe_check
from ugsd_fast import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU and a torch built for it: torch.cuda.is_available() is False",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``python -m bench.gpu --checks`` writes."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", "--checks", "--json", str(output)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert output.exists(), done.stdout + done.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", list(ops.backends()))
def test_agrees_with_the_oracle(results: dict[str, Any], op: str, backend: str) -> None:
    missing = results["missing"].get(f"{op} on {backend}")
    if missing is not None:
        pytest.skip(missing)
    rows = [row for row in results["checks"] if (row["op"], row["backend"]) == (op, backend)]
    assert rows
    assert [describe_check(row) for row in rows if not row["passed"]] == []


def test_draws_the_oracles_tokens(results: dict[str, Any]) -> None:
    assert results["draws"]
    assert [row for row in results["draws"] if not row["passed"]] == []


def test_draft_step_replays_from_a_graph(results: dict[str, Any]) -> None:
    assert results["draft_step"]
    assert all(row["captured"] and row["passed"] for row in results["draft_step"])


def test_drafter_captions_the_same_from_a_graph(results: dict[str, Any]) -> None:
    assert [row["captured"] and row["passed"] for row in results["decoding"]] == [True]
