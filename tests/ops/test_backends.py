"""Which implementation runs, and how a machine or a caller says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from tests.ops import cases
from ugsd_fast import ops

OPS = (
    "token_stats",
    "logprob_rank",
    "filter_logits",
    "sample",
    "gate_block",
    "accept_block",
    "kv_compact",
    "lm_head_stats",
)
needs_extension = pytest.mark.skipif(cases.extension is None, reason="the extension is not built")


def test_every_op_has_its_oracle_and_the_list_is_complete() -> None:
    available = ops.backends()
    assert set(available) == set(OPS)
    for op in OPS:
        assert "reference" in available[op]
        assert set(available[op]) | set(available.missing[op]) == {"reference", "cpp", "triton", "cuda"}
        assert not set(available[op]) & set(available.missing[op])
        assert all(available.missing[op].values()), "a missing backend says why"


@needs_extension
@pytest.mark.parametrize("op", OPS)
def test_the_extension_implements_every_op(op: str) -> None:
    assert "cpp" in ops.backends()[op]


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="use_backend: got 'fortran', expected one of 'reference', 'cpp'"),
        ops.use_backend("fortran"),
    ):
        pass


def test_a_backend_that_cannot_run_is_not_replaced() -> None:
    with ops.use_backend("cuda"), pytest.raises(ops.BackendError, match="token_stats: backend 'cuda' cannot run here"):
        ops.token_stats(torch.zeros(1, 2))


def test_use_backend_ends_with_its_block_and_nests() -> None:
    logits = cases.random_logits(1, 1000)
    default = ops.token_stats(logits).logsumexp
    with ops.use_backend("cuda"):
        with ops.use_backend("reference"):
            ops.token_stats(logits)
        with pytest.raises(ops.BackendError):
            ops.token_stats(logits)
    assert torch.equal(ops.token_stats(logits).logsumexp, default)


def test_use_backend_ends_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), ops.use_backend("cuda"):
        raise RuntimeError("mine")
    ops.token_stats(torch.zeros(1, 2))


def test_use_backend_is_of_one_thread() -> None:
    failures: list[BaseException] = []

    def other() -> None:
        try:
            ops.token_stats(torch.zeros(1, 2))
        except BaseException as error:
            failures.append(error)

    with ops.use_backend("cuda"):
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
    assert failures == []


@needs_extension
def test_ops_run_in_several_threads_at_once() -> None:
    """The extension releases the GIL: scratch memory must belong to one caller."""
    logits = [cases.random_logits(4, 9000, seed=seed) for seed in range(4)]
    expected = [ops.sample(x, top_p=0.9, seed=1).tokens for x in logits]
    wrong: list[int] = []

    def worker(i: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.sample(logits[i], top_p=0.9, seed=1).tokens, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def isa_of_a_new_process(wanted: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "UGSD_CPU_ISA"}
    if wanted is not None:
        environment["UGSD_CPU_ISA"] = wanted
    code = "from ugsd_fast import _C; print(_C.isa())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@needs_extension
@pytest.mark.parametrize("isa", cases.extension.isas() if cases.extension else [])
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    assert isa_of_a_new_process(isa).stdout.strip() == isa


@needs_extension
def test_best_instruction_set_is_the_default() -> None:
    assert isa_of_a_new_process(None).stdout.strip() == cases.extension.isas()[0]
    assert cases.extension.isas()[-1] == "scalar"


@needs_extension
def test_unknown_instruction_set_is_not_silently_ignored() -> None:
    result = isa_of_a_new_process("avx1024")
    assert "avx1024" in result.stderr


@needs_extension
def test_unknown_instruction_set_in_process() -> None:
    before = ops.isa()
    with pytest.raises(ValueError, match="avx1024"):
        cases.extension.set_isa("avx1024")
    assert ops.isa() == before
