"""The shared spec of each op: its inputs suit the op, its oracle agrees, its floor counts the bytes of the inputs."""

from __future__ import annotations

import pytest
import torch

from tests.ops import cases
from tests.ops.calls import tensors
from ugsd_fast import ops
from ugsd_fast.reference.spec import SPECS, Case

CASE = Case(rows=3, vocabulary=1000, block=3, width=16, slots=12)


def test_every_op_has_a_spec() -> None:
    assert set(SPECS) == set(ops.backends())


@pytest.mark.parametrize("name", SPECS)
def test_op_agrees_with_its_oracle_on_the_shared_inputs(name: str) -> None:
    spec = SPECS[name]
    got = list(tensors(getattr(ops, name)(**spec.inputs(CASE))))
    expected = list(tensors(spec.oracle(**spec.inputs(CASE))))
    for value, exact in zip(got, expected, strict=True):
        cases.assert_close(value, exact, 1e-5, 2e-6, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["token_stats", "logprob_rank", "sample", "lm_head_stats"])
def test_floor_of_a_reading_op_is_what_it_reads(name: str, dtype: torch.dtype) -> None:
    inputs = SPECS[name].inputs(Case(rows=3, vocabulary=1000, width=16, dtype=dtype))
    floats = [tensor for tensor in tensors(inputs) if tensor.is_floating_point()]
    assert SPECS[name].floor(**inputs) == sum(tensor.numel() * dtype.itemsize for tensor in floats)
