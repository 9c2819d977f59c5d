"""The CUDA C++ kernels of ``csrc/cuda/``: results, streams and workspaces around ``ugsd_fast._cuda``.

Calls enqueue kernels on the current stream and return. A workspace holds what the kernels of one call hand to each
other; each stream has its own, which grows when it has to, so that a call with results given allocates nothing once
one of its size has been made. While a CUDA graph is captured, every call takes one from the graph's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ugsd_fast.ops.backend import extension
from ugsd_fast.ops.gate_block import REDUCTIONS
from ugsd_fast.ops.kv_compact import launch, layouts_of
from ugsd_fast.ops.token_stats import empty_stats
from ugsd_fast.reference.accept_block import RULES

Results = tuple[Tensor, ...]


def _load() -> Any:
    if extension is None:
        raise ImportError("the extension ugsd_fast._C is not built")
    try:
        compiled = extension.cuda()
    except ModuleNotFoundError:
        raise ImportError("ugsd_fast._cuda is not built (it needs nvcc; UGSD_BUILD_CUDA=1 insists on it)") from None
    compiled.use_tensors_of(Tensor)
    return compiled


_compiled: Any = _load()
_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
_outgrown: list[tuple[Tensor, Tensor]] = []  # kernels in flight may still use them


def architectures() -> str:
    """Return what the kernels were compiled for: ``"sm_90 compute_75"``, PTX being the ``compute`` ones."""
    return _compiled.archs


def _launch(tensor: Tensor) -> tuple[Callable[[int, int], tuple[int, int]], int]:
    """Return the workspace function and the stream handle of a call on the device of ``tensor``."""
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return partial(_reserve, tensor.device, stream), stream


def _reserve(device: torch.device, stream: int, counters: int, size: int) -> tuple[int, int]:
    """Return the addresses of zeroed counters (int32) and of ``size`` bytes."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Freed on return, which is when the kernels are enqueued: what the capture allocates next runs after them.
        captured = _make(device, counters, size)
        return captured[0].data_ptr(), captured[1].data_ptr()
    kept = _workspaces.get((device.index or 0, stream))
    if kept is None or len(kept[0]) < counters or len(kept[1]) < size:
        if kept is not None:
            _outgrown.append(kept)
            counters, size = max(counters, 2 * len(kept[0])), max(size, 2 * len(kept[1]))
        kept = _make(device, max(counters, 1 << 12), max(size, 1 << 20))
        _workspaces[device.index or 0, stream] = kept
    return kept[0].data_ptr(), kept[1].data_ptr()


def _make(device: torch.device, counters: int, size: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )


def token_stats(
    logits: Tensor, temperature: float, temperatures: Tensor | None, *, out: Results | None = None
) -> Results:
    """Compute the statistics of every row: one launch."""
    if out is None:
        out = empty_stats(logits, logits.shape[:-1])
    return _compiled.token_stats(logits, temperature, temperatures, *_launch(logits), out)


def logprob_rank(
    logits: Tensor,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    logsumexp: Tensor | None,
    *,
    out: Results | None = None,
) -> Results:
    """Score one token a row: one launch."""
    if out is None:
        rows = logits.shape[:-1]
        out = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)
    return _compiled.logprob_rank(logits, tokens, temperature, temperatures, logsumexp, *_launch(logits), out)


def filter_logits(logits: Tensor, *settings: Any, out: Results | None = None) -> Any:
    """Temper and cut: two launches, one where nothing can be cut."""
    results = (torch.empty(logits.shape, dtype=torch.float32, device=logits.device),) if out is None else out
    _compiled.filter_logits(logits, *settings, *_launch(logits), results)
    return results[0] if out is None else out


def sample(logits: Tensor, *settings: Any, out: Results | None = None) -> Results:
    """Draw a token a row: one launch."""
    if out is None:
        rows = logits.shape[:-1]
        tokens, logprob = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
        out = tokens, logprob, *empty_stats(logits, rows)
    return _compiled.sample(logits, *settings, *_launch(logits), out)


def gate_block(
    entropy: Tensor,
    lengths: Tensor | None,
    threshold: float,
    thresholds: Tensor | None,
    reduce: str,
    *,
    out: Results | None = None,
) -> Results:
    """Reduce a block's entropies to one uncertainty and a decision: one launch."""
    if out is None:
        out = entropy.new_empty(entropy.shape[:1]), entropy.new_empty(entropy.shape[:1], dtype=torch.bool)
    return _compiled.gate_block(
        entropy, lengths, threshold, thresholds, REDUCTIONS.index(reduce), *_launch(entropy), out
    )


def accept_block(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    rule: str,
    draft_lengths: Tensor | None,
    limit: float,
    limits: Tensor | None,
    slack: float,
    slacks: Tensor | None,
    draft_logsumexp: Tensor | None,
    bonus: bool,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
    uniforms: Tensor | None = None,
    *,
    out: Results | None = None,
) -> Results:
    """Judge a drafted block: one launch, two for ``exact``, three for ``block``."""
    if out is None:
        batch, block = draft_tokens.shape
        accepted = target_logits.new_empty(batch, dtype=torch.int64)
        out = accepted, torch.empty_like(accepted), target_logits.new_empty((batch, block), dtype=torch.float32)
    return _compiled.accept_block(
        target_logits,
        draft_logits,
        draft_tokens,
        RULES.index(rule),
        draft_lengths,
        limit,
        limits,
        slack,
        slacks,
        draft_logsumexp,
        bonus,
        seed,
        seeds,
        offset,
        offsets,
        uniforms,
        *_launch(target_logits),
        out,
    )


def kv_compact(kv: Sequence[Tensor], keep: Tensor, align: str) -> Tensor:
    """Move the kept slots of all layers together: one launch."""

    def compact(*arguments: Any, kept: Tensor) -> None:
        _compiled.kv_compact(*arguments, *_launch(keep), kept)

    return launch(kv, layouts_of(kv), keep, align, compact)
