"""How many kernels a call launches, counted by the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.problems import LAUNCHES, Problem, problems
from tests.cuda import emulated
from tests.ops import cases
from ugsd_fast import ops

MOST = {"filter_logits": 2, "typical": 1, "relaxed": 1, **LAUNCHES}
"""Launches of an op or of a rule that may need more than one, or whose problem promises nothing."""
SIZES = {
    "one long row": {"rows": 1, "vocabulary": 152064},
    "rows in few blocks": {"rows": 3, "vocabulary": 1000},
    "rows in many blocks": {"rows": 40, "vocabulary": 4097},
}
LAYERS = 96


def sized() -> Iterator[tuple[str, Problem]]:
    for name, size in SIZES.items():
        for problem in problems(**size, dtype=torch.bfloat16, width=16, slots=16, layers=2):  # type: ignore[arg-type]
            if problem.op != "lm_head_stats":
                yield name, problem


@pytest.mark.parametrize("problem", [pytest.param(one, id=f"{name}-{one.op}-{one.label}") for name, one in sized()])
def test_no_more_launches_than_promised(problem: Problem) -> None:
    arguments = problem.make(torch.device("cpu")).arguments
    before = emulated.launches()
    with ops.use_backend("cuda"):
        problem.run(arguments)
    most = MOST.get(arguments.get("rule", problem.op), 1)
    assert 1 <= emulated.launches() - before <= most


def test_one_launch_moves_the_slots_of_all_layers() -> None:
    kv = [cases.random_logits(2, 3, 9, 8, seed=i) for i in range(2 * LAYERS)]
    before = emulated.launches()
    with ops.use_backend("cuda"):
        ops.kv_compact(kv, torch.tensor([4, 9]), align="right")
    assert emulated.launches() - before == 1
