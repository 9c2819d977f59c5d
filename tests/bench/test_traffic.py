"""What `bench.traffic` counts, on kernels and operators whose traffic is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import run, traffic
from bench.problems import DRAW, problems, reread
from ugsd_fast import ops

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
ROOT = Path(__file__).resolve().parents[2]


def copy_kernel(p_from, p_to, p_count, columns, shift, BLOCK: tl.constexpr):
    """Copy a row, read its first column once more, and count the programs."""
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    tl.store(p_to + offsets, tl.load(p_from + shift + offsets, mask=inside), mask=inside)
    tl.load(p_from + tl.arange(0, 8) * 0)  # eight lanes, one address
    tl.atomic_add(p_count, 1)


def copy(dtype: torch.dtype, columns: int, shift: int = 0, programs: int = 1) -> traffic.Counts:
    source, target = torch.zeros(1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    counter = torch.zeros(1, dtype=torch.int32)
    launch = interpreter.InterpretedFunction(copy_kernel)[(programs,)]
    return traffic.count(lambda: launch(source, target, counter, columns, shift, BLOCK=1024))[0]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.int64, 8)], ids=str)
def test_bytes_asked_for_are_those_of_the_lanes_that_are_on(dtype: torch.dtype, size: int) -> None:
    counts = copy(dtype, 100)
    assert counts.asked == 2 * 100 * size + size + 4
    assert (counts.launches, counts.programs, counts.kernels) == (1, 1, ["copy_kernel"])


def test_sectors_are_32_bytes_each() -> None:
    # Tensors start at multiples of 64 bytes: 64 float32 are 8 sectors, or 9 where they start inside one.
    assert copy(torch.float32, 64).sectors == (8 + 8 + 1 + 1) * 32
    assert copy(torch.float32, 64, shift=3).sectors == (9 + 8 + 1 + 1) * 32
    assert copy(torch.float32, 0).sectors == (1 + 1) * 32


def test_programs_add_up() -> None:
    one, three = copy(torch.float32, 100), copy(torch.float32, 100, programs=3)
    assert (three.asked, three.sectors, three.programs) == (3 * one.asked, 3 * one.sectors, 3)


MATRIX, INDEX = torch.zeros(10, 100), torch.zeros(10, 1, dtype=torch.int64)
OPERATORS = {
    "add": (lambda: MATRIX + MATRIX, 3 * 4000, 1),
    "a view": (lambda: MATRIX.T[5:, None].expand(-1, 3, -1), 0, 0),
    "an expanded tensor": (lambda: MATRIX + MATRIX[:1].expand(10, -1), 2 * 4000 + 400, 1),
    "in place": (lambda: MATRIX.clone().add_(1.0), 4 * 4000, 2),
    "gather": (lambda: MATRIX.gather(1, INDEX), 2 * 40 + 80, 1),
    "fill": (lambda: torch.empty(10, 100).fill_(1.0), 4000, 1),
    "cast": (lambda: MATRIX.bfloat16(), 6000, 1),
    "softmax, max": (lambda: MATRIX.softmax(-1).amax(-1), 3 * 4000 + 40, 2),
}


@pytest.mark.parametrize(("call", "size", "launches"), OPERATORS.values(), ids=OPERATORS)
def test_operators_are_what_they_read_and_write(call, size: int, launches: int) -> None:
    counts, _ = traffic.count(call)
    assert (counts.asked, counts.launches) == (size, launches)


def test_reads_on_the_host_are_counted() -> None:
    counts, _ = traffic.count(lambda: (MATRIX.sum().item(), bool((MATRIX > 0).any())))
    assert counts.host_reads == 2


def test_a_problem_of_every_op() -> None:
    (size,) = traffic.sizes(quick=True)
    found = list(problems(**size))
    assert {problem.op for problem in found} == set(ops.backends())
    assert len({(problem.op, problem.label) for problem in found}) == len(found)
    for problem in found:
        built = problem.make(torch.device("cpu"))
        results = problem.run(built.arguments)
        needed = problem.needed(built.arguments, results)
        assert needed >= problem.floor(built.arguments) >= 0
        for peer in built.peers.values():
            assert traffic.count(peer)[0].asked > 0
        kept = problem.label.split(" kept")[0].split(", ")[-1]
        if problem.op == "accept_block" and kept.isdigit():
            assert results.num_accepted.tolist() == [int(kept)]


@pytest.mark.parametrize(
    ("rule", "carried", "kept", "behind", "rows", "draws"),
    [
        ("exact", False, 5, 0, 0, 1),  # 6 of the verifier, 5 of the drafter
        ("exact", False, 2, 0, 2, 2),  # the residual's two again
        ("exact", True, 2, 0, 1, 2),  # the floor holds one row of the drafter
        ("exact", True, 5, 0, -1, 1),  # and none is needed here
        ("block", False, 5, 0, 0, 1),
        ("block", False, 0, 0, 2, 2),
        ("block", False, 0, 4, 10, 2),  # four sums in vain, and the residual's
        ("block", True, 3, 1, 2 * 2 - 1, 2),
    ],
)
def test_rows_read_again(rule: str, carried: bool, kept: int, behind: int, rows: int, draws: int) -> None:
    arguments = {"rule": rule, "target_logits": torch.zeros(1, 6, 8000, dtype=torch.bfloat16)}
    if carried:
        arguments["draft_logsumexp"] = torch.zeros(1, 5)
    accept_prob = torch.tensor([[1.0] * kept + [0.5] * behind + [0.0] * (5 - kept - behind)])
    verdict = ops.Acceptance(torch.tensor([kept]), torch.tensor([0]), accept_prob)
    assert reread(arguments, verdict) == 2 * (rows * 8000 + draws * DRAW)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The counts of a row of 32000 logits in bfloat16, whose records weigh most."""
    output = tmp_path_factory.mktemp("traffic") / "traffic.json"
    command = [sys.executable, "-m", "bench.traffic", "--size", "1", "32000", "bfloat16", "--json", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(output.read_text())


def test_kernels_move_what_they_need(report: dict[str, Any]) -> None:
    assert {row["op"] for row in report["rows"]} == set(ops.backends())
    assert [traffic.describe(row) for row in report["rows"] if not traffic.met(row)] == []
    assert all(row["host_reads"] == 0 for row in report["rows"])


def test_kernels_are_launched_once(report: dict[str, Any]) -> None:
    """Torch launches none beside them; a draw behind a rejection takes a second, `block` a third."""
    for row in report["rows"]:
        most = {"exact": 2, "block": 3}.get(row["case"].split(",")[0], 1)
        assert row["launches"] <= most, traffic.describe(row)
        assert not any(kernel.startswith("aten::") for kernel in row["kernels"]), traffic.describe(row)


def test_document(report: dict[str, Any]) -> None:
    text = traffic.document(report)
    assert "## `accept_block`" in text
    assert "transformers _speculative_sampling" in text
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, "a table's lines have one number of columns"


def test_reports_of_other_ops_are_kept(tmp_path: Path) -> None:
    def result(*ops: str, versions: str = "one") -> dict[str, Any]:
        rows = [{"op": op, "of": len(ops)} for op in ops]
        return {"schema": 1, "versions": versions, "rows": rows, "peers": rows}

    path = tmp_path / "traffic.json"
    run.write(path, result("sample", "token_stats"))
    merged = run.with_other_ops(result("sample"), path, ["sample"])
    assert merged["rows"] == merged["peers"] == [{"op": "token_stats", "of": 2}, {"op": "sample", "of": 1}]
    other = result("sample", versions="another")
    assert run.with_other_ops(other, path, ["sample"]) == other
