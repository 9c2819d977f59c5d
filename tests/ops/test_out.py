"""``out=``: results in given tensors, checked, traced, and without an allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.ops import cases
from tests.ops.calls import CALLS, Call, default_backend, on_every_call, same, tensors
from tests.ops.test_registration import Recorder
from ugsd_fast import ops
from ugsd_fast.ops.backend import select


def poisoned(result: Any) -> Any:
    """The same tree of tensors, holding what no op returns."""
    return tree_map(lambda x: torch.full_like(x, torch.nan if x.is_floating_point() else True), result)


def addresses(tree: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors(tree)]


class Allocations(TorchDispatchMode):
    """Runs implementations in its own sight and notes every op that makes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "ugsd_fast":
            count = len(_OUTPUTS[name])
            with self:
                select(name.removesuffix("_out"), "cpu")(*args[:-count], out=args[-count:])
            return None
        self.made.append(name)
        return func(*args, **(kwargs or {}))


_OUTPUTS = {
    f"{op}_out": [a for a in getattr(torch.ops.ugsd_fast, f"{op}_out").default._schema.arguments if a.alias_info]
    for op in ops.backends()
    if op != "kv_compact"
}


@on_every_call(lambda call, backend: not call.writes)
def test_writes_what_it_would_return(call: Call) -> None:
    expected = call.run()
    out = poisoned(expected)
    returned = call.run({**call.build(), "out": out})
    assert type(returned) is type(expected)
    assert same(returned, expected)
    assert addresses(returned) == addresses(out)


@on_every_call(lambda call, backend: not call.writes)
def test_through_the_dispatcher(call: Call) -> None:
    expected = call.run()
    out = poisoned(expected)
    with Recorder() as recorder:
        returned = call.run({**call.build(), "out": out})
    assert [func.overloadpacket.__name__ for func, _ in recorder.calls] == [f"{call.op}_out"]
    assert same(returned, expected)
    assert addresses(returned) == addresses(out)


@on_every_call(lambda call, backend: backend.native and call.name not in ("tensors", "limits") and not call.writes)
def test_allocates_nothing(call: Call) -> None:
    """Beside a conversion of row tensors, which `tensors` and `limits` have."""
    inputs = {**call.build(), "out": poisoned(call.run())}
    with Allocations() as allocations:
        call.run(inputs)
    assert [name for name in allocations.made if name not in ("slice", "view")] == []


@pytest.mark.parametrize("call", [call for call in CALLS if not call.writes], ids=str)
def test_opcheck(call: Call) -> None:
    with default_backend(call.op).use():
        out = poisoned(call.run())
        with Recorder() as recorder:
            call.run({**call.build(), "out": out})
        ((func, args),) = recorder.calls
        torch.library.opcheck(func, args)


def _round(logits: Tensor, tokens: Tensor, stats: ops.TokenStats, scores: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    entropy = ops.token_stats(logits, out=stats).entropy * 2
    return entropy, *ops.logprob_rank(logits, tokens, logsumexp=stats.logsumexp, out=scores)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(_round, fullgraph=True, backend="aot_eager")
    logits, tokens = cases.random_logits(2, 50), torch.tensor([1, 2])
    stats, scores = ops.token_stats(logits), ops.logprob_rank(logits, tokens)
    expected = _round(logits, tokens, stats, scores)
    given = poisoned(stats), poisoned(scores)
    assert same(compiled(logits, tokens, *given), expected)
    assert same(given[0], stats)


WRONG: list[tuple[Callable[[ops.TokenStats], Any], str]] = [
    (lambda out: out[:4], r"out has 4 tensors, expected 5 \(logsumexp, entropy, max_logit, argmax, margin\)"),
    (lambda out: out._replace(argmax=1), r"out.argmax is a int, expected a tensor"),
    (lambda out: out._replace(argmax=out.entropy), r"out.argmax has dtype torch.float32, expected torch.int64"),
    (lambda out: out._replace(entropy=torch.empty(3)), r"out.entropy has shape \(3,\), expected \(2,\)"),
    (lambda out: out._replace(margin=torch.empty(4)[::2]), r"out.margin has strides \(2,\), expected a contiguous"),
    (lambda out: out._replace(margin=torch.empty(2, device="meta")), r"out.margin is on meta, expected cpu"),
    (lambda out: out._replace(margin=torch.empty(2, requires_grad=True)), r"out.margin requires a gradient"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_out_is_refused(change: Callable[[ops.TokenStats], Any], message: str) -> None:
    logits = cases.random_logits(2, 50)
    with pytest.raises(ValueError, match=f"token_stats: {message}"):
        ops.token_stats(logits, out=change(ops.token_stats(logits)))


def test_wrong_out_of_sample_is_refused() -> None:
    logits = cases.random_logits(2, 50)
    drawn = ops.sample(logits, seed=1)
    with pytest.raises(ValueError, match="sample: out has 2 elements, expected 3"):
        ops.sample(logits, seed=1, out=drawn[:2])
    with pytest.raises(ValueError, match="sample: out has 1 tensors, expected 7|sample: out has 3 tensors, expected 7"):
        ops.sample(logits, seed=1, out=(drawn.tokens, drawn.logprob, (drawn.tokens,)))


def test_results_outlive_each_other() -> None:
    """Results of one call share an allocation, which goes with the last of them."""
    logits = cases.random_logits(1000, 50)
    kept = [ops.token_stats(logits).entropy for _ in range(20)]
    assert all(torch.equal(entropy, kept[0]) for entropy in kept)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (2, 1, 3), (1, 2, 1, 2, 1, 2, 1, 2, 1)], ids=str)
def test_results_of_any_rank(shape: tuple[int, ...]) -> None:
    stats = ops.token_stats(cases.random_logits(*shape, 7))
    assert all(result.shape == shape and result.is_contiguous() for result in stats)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 1, 0, 3), (0, 2, 1, 3)], ids=str)
def test_leading_dimensions_that_do_not_collapse(order: tuple[int, ...]) -> None:
    logits = cases.random_logits(2, 3, 4, 7).permute(*order)
    assert same(ops.token_stats(logits), ops.token_stats(logits.contiguous()))


def test_vocab_size_is_an_integer() -> None:
    with pytest.raises(ValueError, match=r"token_stats: vocab_size is 2.5, expected 1 to 3 \(an integer"):
        ops.token_stats(torch.zeros(1, 3), vocab_size=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [1 << 63, 10**30], ids=["2**63", "10**30"])
def test_top_k_beyond_int64_cuts_nothing(top_k: int) -> None:
    logits = cases.random_logits(2, 50)
    assert same(ops.filter_logits(logits, top_k=top_k), ops.filter_logits(logits))
    assert same(ops.sample(logits, top_k=top_k, seed=1), ops.sample(logits, seed=1))
