"""The problems on which GPU kernels are judged: op, inputs, the bytes that must move, and what one writes without it.

`bench.traffic` counts on them, `bench.gpu` checks and times on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.utils import _speculative_sampling

from bench import inputs
from bench.baselines import FILTERS, warp, warp_and_sample, warpers
from bench.kernels.accept_block import GREEDY, TRANSFORMERS, TRANSFORMERS_FLOAT32, greedy_match
from bench.kernels.logprob_rank import eager_logprob_rank
from bench.kernels.token_stats import eager_statistics
from ugsd_fast import ops
from ugsd_fast.reference.spec import SPECS, Case

BLOCK = 5  # K
DRAW = 4096  # columns that a draw, or a filter's cut, reads again once the row's masses are known
TAIL, SHORT = 8, 64  # slots of a cache: those that a rejected block may empty, and those of a short one
EAGER = "torch eager"
MATMUL = "torch matmul + statistics"
COMPILED = (EAGER, MATMUL, GREEDY)
"""Peers that are plain torch functions, which torch.compile can take whole."""
SAMPLING_RULES, COMPARING_RULES = ("exact", "block"), ("greedy", "rank", "typical", "relaxed")
LAUNCHES = dict.fromkeys(COMPARING_RULES, 1) | {"exact": 2, "block": 3}

Call = Callable[[], object]


class Built(NamedTuple):
    """The tensors of a problem.

    Attributes
    ----------
    arguments
        Keyword arguments of the op.
    peers
        What a user would write without the op, by the name that reports print.
    """

    arguments: dict[str, Any]
    peers: Mapping[str, Call] = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """One op on one input.

    Attributes
    ----------
    op, label
        Name of the op, and what sets the problem apart from its others.
    rows, columns, dtype
        Rows of logits, or sequences; vocabulary, or tokens of a block or slots of a cache; element type.
    make
        Makes the inputs on a device.
    extra
        ``extra(arguments, results)``: bytes beside the spec's floor that the op's definition reads again: the block of
        a draw, as much where a filter's cut is looked for, the rows of a residual.
    launches
        The most kernels that a call may launch, None where nothing is promised.
    """

    op: str
    label: str
    rows: int
    columns: int
    dtype: torch.dtype
    make: Callable[[torch.device], Built]
    extra: Callable[[dict[str, Any], Any], int] = field(default=lambda arguments, results: 0)
    launches: int | None = 1

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call the op."""
        return getattr(ops, self.op)(**arguments)

    def floor(self, arguments: dict[str, Any]) -> int:
        """Return the bytes that any implementation moves: each one that matters once."""
        return SPECS[self.op].floor(**arguments)

    def needed(self, arguments: dict[str, Any], results: Any) -> int:
        """Return the bytes that the op's definition moves, once the result is known."""
        return self.floor(arguments) + self.extra(arguments, results)


def problems(rows: int, vocabulary: int, dtype: torch.dtype, width: int, slots: int, layers: int) -> Iterator[Problem]:
    """Yield every op's problems of one size.

    Parameters
    ----------
    rows
        Rows of logits; sequences of ``accept_block``, ``gate_block`` and ``kv_compact``.
    vocabulary, dtype
        Columns and element type.
    width
        Hidden size of ``lm_head_stats``.
    slots, layers
        Of the cache of ``kv_compact``.
    """
    case = Case(rows=rows, vocabulary=vocabulary, dtype=dtype, block=BLOCK, logits="peaked", slots=slots, layers=layers)
    drawn = min(DRAW, vocabulary) * dtype.itemsize

    def problem(op: str, label: str, make: Callable[[torch.device], Built], **more: Any) -> Problem:
        sized: dict[str, Any] = {"rows": rows, "columns": vocabulary, "dtype": dtype} | more
        return Problem(op, label, make=make, **sized)

    def make_stats(device: torch.device) -> Built:
        z = _moved(SPECS["token_stats"].inputs(case), device)["logits"]
        return Built({"logits": z}, {EAGER: lambda: eager_statistics(z)})

    def make_rank(carried: bool, device: torch.device) -> Built:
        arguments = _moved(SPECS["logprob_rank"].inputs(case), device)
        z, tokens = arguments["logits"], arguments["tokens"]
        if carried:
            arguments["logsumexp"] = z.float().logsumexp(-1)
        return Built(arguments, {EAGER: lambda: eager_logprob_rank(z, tokens)})

    def make_filter(filters: dict[str, Any], device: torch.device) -> Built:
        z = _moved(SPECS["token_stats"].inputs(case), device)["logits"]
        chain = warpers(filters)
        return Built({"logits": z, **filters}, {"transformers warpers": lambda: warp(chain, z)})

    def make_sample(filters: dict[str, Any], device: torch.device) -> Built:
        z = _moved(SPECS["token_stats"].inputs(case), device)["logits"]
        chain = warpers(filters)
        peers = {"transformers warpers + multinomial": lambda: warp_and_sample(chain, z)}
        return Built({"logits": z, **filters, "seed": case.seed, "offset": 7}, peers)

    def make_gate(device: torch.device) -> Built:
        arguments = _moved(SPECS["gate_block"].inputs(case), device)
        entropy, lengths = arguments["entropy"], arguments["lengths"]

        def eager() -> object:
            valid = torch.arange(BLOCK, device=device) < lengths[:, None]
            uncertainty = torch.where(valid, entropy, 0.0).amax(-1)
            return uncertainty, uncertainty > 1.5

        return Built(arguments, {EAGER: eager})

    def make_head(device: torch.device) -> Built:
        sized = Case(rows=rows, vocabulary=vocabulary, dtype=dtype, width=width)
        arguments = _moved(SPECS["lm_head_stats"].inputs(sized), device)
        hidden, weight = arguments["hidden"], arguments["weight"]
        return Built(arguments, {MATMUL: lambda: eager_statistics(hidden @ weight.T)})

    def make_cache(every_other: bool, device: torch.device) -> Built:
        arguments = _moved(SPECS["kv_compact"].inputs(replace(case, slots=SHORT if every_other else slots)), device)
        kv = arguments["kv"]
        keep = arguments["keep"] = torch.ones_like(arguments["keep"])
        if every_other:
            keep[:, ::2] = False
        else:
            for row in range(rows):  # of the last 8 slots, the first 4 to 7 are dropped
                keep[row, -TAIL : -1 - row % 4] = False
        order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)

        def gather() -> None:
            for tensor in kv:
                _, heads, _, size = tensor.shape
                tensor.copy_(tensor.gather(2, order[:, None, :, None].expand(-1, heads, -1, size)))

        return Built(arguments, {"torch gather, a layer": gather})

    yield problem("token_stats", "", make_stats)
    for carried in (False, True):
        label = "logsumexp given" if carried else "from logits"
        yield problem("logprob_rank", label, partial(make_rank, carried))
    for label, filters in FILTERS.items():
        if filters:
            # Where to cut is known when the whole row has been read: what may be cut is then read again.
            yield problem("filter_logits", label, partial(make_filter, filters), extra=lambda *_: rows * drawn)
    for label, filters in FILTERS.items():
        yield problem("sample", label, partial(make_sample, filters), extra=lambda *_: rows * drawn)
    yield problem("gate_block", "", make_gate, columns=BLOCK, dtype=torch.float32)
    for rule in COMPARING_RULES:
        make = partial(_compared, rule, rows, vocabulary, dtype)
        yield problem("accept_block", rule, make, launches=LAUNCHES[rule])
    for rule in SAMPLING_RULES:
        for carried in (True, False):
            for accepted in (0, 2, BLOCK):
                label = f"{rule}, {accepted} kept, {'draft logsumexp given' if carried else 'from logits'}"
                make = partial(_drafted, rule, rows, vocabulary, dtype, accepted, carried)
                yield problem("accept_block", label, make, extra=reread, launches=LAUNCHES[rule])
    for every_other in (False, True):
        label = f"{2 * layers} tensors, {'every other slot' if every_other else f'the last {TAIL} slots'}"
        yield problem("kv_compact", label, partial(make_cache, every_other), columns=SHORT if every_other else slots)
    yield problem("lm_head_stats", f"width {width}", make_head)


def _moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return arguments with their tensors on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in arguments.items()}


def _compared(rule: str, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Built:
    """Make blocks of the verifier's own argmax, of which the last token is wrong."""
    target = inputs.logits("peaked", (rows, BLOCK + 1, vocabulary), dtype, seed=0)
    tokens = target[:, :BLOCK].argmax(-1)
    tokens[:, -1] = target[:, BLOCK - 1].argmin(-1)
    tokens, target = tokens.to(device), target.to(device)
    arguments = {"draft_tokens": tokens, "target_logits": target, "rule": rule}
    return Built(arguments, {GREEDY: lambda: greedy_match(tokens, target)} if rule == "greedy" else {})


def _drafted(
    rule: str, rows: int, vocabulary: int, dtype: torch.dtype, accepted: int, carried: bool, device: torch.device
) -> Built:
    """Make blocks of which exactly ``accepted`` tokens stand."""
    blocks = [inputs.drafted_block("peaked", BLOCK, vocabulary, dtype, accepted, 97 * row) for row in range(rows)]
    tokens, draft, target, logsumexp = (torch.cat(parts).to(device) for parts in zip(*blocks, strict=True))
    arguments = {"draft_tokens": tokens, "target_logits": target, "draft_logits": draft, "rule": rule}
    if carried:
        arguments["draft_logsumexp"] = logsumexp
    if rows > 1 or rule != "exact":
        return Built(arguments)
    peers: dict[str, Call] = {TRANSFORMERS: lambda: _speculative_sampling(tokens, draft, BLOCK, target)}
    if dtype is not torch.float32:
        peers[TRANSFORMERS_FLOAT32] = lambda: _speculative_sampling(tokens, draft.float(), BLOCK, target.float())
    return Built(arguments, peers)


def reread(arguments: dict[str, Any], verdict: ops.Acceptance) -> int:
    """Count what a sampling rule reads beside the floor of its spec.

    ``exact`` reads both rows of the residual, again where it had to read them for their logsumexp. ``block`` does so
    at the last position that it keeps, or for the first token if it keeps none, and at each one behind that u did not
    rule out (`ugsd_fast.reference.Acceptance.accept_prob` is 0 there). A draw then reads 4096 columns again. With the
    draft's logsumexp given, the spec's floor holds one row of the drafter's already.
    """
    kept = verdict.num_accepted.cpu()
    vocabulary = arguments["target_logits"].shape[-1]
    size = arguments["target_logits"].element_size()
    rejected = (kept < BLOCK).long()
    pairs = int(rejected.sum())
    if arguments["rule"] == "block":
        position = torch.arange(1, BLOCK)  # the last one needs no residual
        tried = verdict.accept_prob.cpu()[:, :-1] > 0
        pairs += int((tried & (position > kept[:, None])).sum())
    rows = 2 * pairs - (len(kept) if "draft_logsumexp" in arguments else 0)
    return size * (rows * vocabulary + min(DRAW, vocabulary) * int((1 + rejected).sum()))
