"""What every op promises as a citizen of torch: schema, tracing, no host reads, no hidden copies, no aliasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops import cases
from tests.ops.calls import CALLS, VOCABULARY, Call, default_backend, on_every_call, same, tensors
from ugsd_fast import ops
from ugsd_fast.ops.backend import select

HOST_READS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Notes the registered ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "ugsd_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Runs implementations in its own sight and notes host reads and tensors of a vocabulary's size."""

    def __init__(self) -> None:
        super().__init__()
        self.host_reads: list[str] = []
        self.large: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "ugsd_fast":
            name = func.overloadpacket.__name__
            with self:
                return select(name, "cpu")(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in HOST_READS:
            self.host_reads.append(name)
        out = func(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        for tensor in tensors(out):
            if tensor.numel() >= VOCABULARY and tensor.untyped_storage().data_ptr() not in storages:
                self.large.append(f"{name} {tuple(tensor.shape)}")
        return out


@on_every_call()
def test_no_host_read(call: Call) -> None:
    inputs = call.build()
    with Watch() as watch:
        call.run(inputs)
    assert watch.host_reads == []


@on_every_call(lambda call, backend: backend.native)
def test_no_intermediate_of_a_vocabularys_size(call: Call) -> None:
    """Beside the result of `filter_logits`, kernels allocate nothing that grows with V, and copy no input."""
    inputs = call.build()
    with Watch() as watch:
        call.run(inputs)
    assert len(watch.large) == int(call.logits_out), watch.large


def test_the_watch_sees_what_it_forbids() -> None:
    with Watch() as watch:
        logits = torch.zeros(VOCABULARY)
        assert logits.add(1).sum().item() == VOCABULARY
    assert "_local_scalar_dense" in watch.host_reads
    assert len(watch.large) == 2


@on_every_call()
def test_through_the_dispatcher_is_the_direct_call(call: Call) -> None:
    direct_inputs, inputs = call.build(), call.build()
    direct = call.run(direct_inputs)
    with Recorder() as recorder:
        dispatched = call.run(inputs)
    assert [func.overloadpacket.__name__ for func, _ in recorder.calls] == [call.op]
    assert same(dispatched, direct)
    assert same(inputs, direct_inputs)


@on_every_call()
def test_inputs_stay_and_outputs_are_new(call: Call) -> None:
    inputs, untouched = call.build(), call.build()
    out = call.run(inputs)
    for name in inputs:
        if name not in call.writes:
            assert same(inputs[name], untouched[name]), name
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors(inputs) if tensor.numel()}
    made = [tensor.untyped_storage().data_ptr() for tensor in tensors(out) if tensor.numel()]
    assert not given & set(made), "a result shares memory with an input"
    assert len(set(made)) == len(made), "two results share memory"


@on_every_call()
def test_same_call_gives_the_same_bits(call: Call) -> None:
    assert same(call.run(), call.run())


@on_every_call(lambda call, backend: not call.writes)
def test_requires_grad_changes_nothing(call: Call) -> None:
    """A tensor with a gradient takes the way through the dispatcher; in-place ops may not have one."""
    inputs = call.build()
    first = next(name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
    inputs[first].requires_grad_()
    assert same(call.run(inputs), call.run())


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_opcheck(call: Call) -> None:
    with default_backend(call.op).use():
        with Recorder() as recorder:
            call.run()
        ((func, args),) = recorder.calls
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(call: Call) -> None:
    real = call.run()
    with FakeTensorMode() as mode:
        inputs = {name: _to_fake(mode, value) for name, value in call.build().items()}
        fake = call.run(inputs)
    for a, b in zip(tensors(fake), tensors(real), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def _to_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    return [mode.from_tensor(x) for x in value] if isinstance(value, list) else value


def round_of_every_op(
    hidden: Tensor, weight: Tensor, logits: Tensor, kv: list[Tensor], seed: Tensor
) -> tuple[Any, ...]:
    """One step of decoding that uses all ops, temperature and seeds as tensors."""
    head = ops.lm_head_stats(hidden, weight)
    stats = ops.token_stats(logits, temperature=0.5, vocab_size=logits.shape[-1] - 1)
    filtered = ops.filter_logits(logits, top_k=20, top_p=0.9)
    drawn = ops.sample(logits, top_k=20, top_p=0.9, seed=seed[:, None], offset=1)
    logprob, rank = ops.logprob_rank(logits, drawn.tokens, logsumexp=stats.logsumexp)
    uncertainty, escalate = ops.gate_block(stats.entropy, threshold=1.5)
    verdict = ops.accept_block(
        drawn.tokens, torch.cat([logits, logits[:, :1]], 1), filtered, rule="block", seed=seed, offset=2
    )
    kept = ops.kv_compact(kv, verdict.num_accepted)
    return (*head, *stats, filtered, drawn.tokens, logprob, rank, uncertainty, escalate, *verdict, kept, *kv)


def _round_inputs(batch: int) -> tuple[Any, ...]:
    return (
        cases.random_logits(batch, 8),
        cases.random_logits(50, 8),
        cases.random_logits(batch, 3, 50),
        [cases.random_logits(batch, 2, 6, 4, seed=seed) for seed in range(2)],
        torch.arange(batch),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled: Callable[..., tuple[Any, ...]] = torch.compile(
        round_of_every_op, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for batch in (2, 3):
        expected = round_of_every_op(*_round_inputs(batch))
        assert same(compiled(*_round_inputs(batch)), expected)


def test_vocabulary_as_symbol() -> None:
    """One graph serves every vocabulary size."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.sample(x, seed=1).tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    for vocabulary in (50, 60, 4097):
        logits = cases.random_logits(2, vocabulary)
        assert torch.equal(compiled(logits), ops.sample(logits, seed=1).tokens)
