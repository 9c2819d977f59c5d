"""Runs every kernel on memory that ends, or begins, at a page that may not be touched.

A read or write of one byte outside a tensor ends the process with a signal; the last line printed names the call.
Run as ``python -m tests.ops.guard_pages``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_forbidden: list[mmap.mmap] = []


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy of ``tensor`` between two forbidden pages, touching the second one or the first."""
    size = tensor.numel() * tensor.element_size()
    inner = max(PAGE, -(-size // PAGE) * PAGE)
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = PAGE + (inner - size if at_end else 0)
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    out = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    out.copy_(tensor)
    for page in (0, PAGE + inner):
        if _libc.mprotect(address + page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    _forbidden.append(memory)
    return out


def calls(at_end: bool, dtype: torch.dtype, vocabulary: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Every op on guarded inputs."""

    def put(tensor: Tensor) -> Tensor:
        return guarded(tensor, at_end)

    logits = put(cases.random_logits(2, vocabulary, dtype=dtype))
    filters = {"top_k": 10, "top_p": 0.9, "min_p": 0.01}
    yield "token_stats", {"logits": logits, "temperature": put(torch.tensor([0.5, 2.0]))}
    yield "logprob_rank", {"logits": logits, "tokens": put(torch.tensor([vocabulary - 1, 2**40]))}
    yield "filter_logits", {"logits": logits, **filters}
    yield "sample", {"logits": logits, "seed": put(torch.tensor([1, 2]))}
    yield "sample", {"logits": logits, "seed": 1, **filters}
    yield "lm_head_stats", {"hidden": logits, "weight": put(cases.random_logits(5, vocabulary, dtype=dtype))}
    yield (
        "lm_head_stats",
        {
            "hidden": put(cases.random_logits(3, 7, dtype=dtype)),
            "weight": put(cases.random_logits(vocabulary, 7, dtype=dtype)),
            "bias": put(cases.random_logits(vocabulary, dtype=dtype)),
        },
    )
    for rule in ("greedy", "rank", "exact", "block", "typical", "relaxed"):
        for token in (0, vocabulary - 1, vocabulary, -1):
            for draft in (None, put(cases.random_logits(1, 2, vocabulary, dtype=dtype, seed=1))):
                yield (
                    "accept_block",
                    {
                        "draft_tokens": put(torch.full((1, 2), token)),
                        "target_logits": put(cases.random_logits(1, 3, vocabulary, dtype=dtype)),
                        "draft_logits": draft,
                        "draft_lengths": put(torch.tensor([9])),
                        "rule": rule,
                    },
                )
    yield (
        "gate_block",
        {"entropy": put(cases.random_logits(2, 3)), "lengths": put(torch.tensor([-9, 9])), "threshold": 1.0},
    )
    for align in ("left", "right"):
        for keep in (torch.tensor([-5, 2**40]), torch.arange(14).view(2, 7) % 3 > 0):
            kv = [put(cases.random_logits(2, 3, 7, width, dtype=dtype)) for width in (1, 5)]
            yield "kv_compact", {"kv": kv, "keep": put(keep), "align": align}


def main() -> None:
    for at_end in (True, False):
        for dtype in cases.DTYPES.values():
            for vocabulary in (1, 7, 63, 4097):
                for op, inputs in calls(at_end, dtype, vocabulary):
                    for backend in cases.backends_of(op):
                        if not backend.native:
                            continue
                        side = "end" if at_end else "start"
                        print(f"{op} {backend} {dtype} V={vocabulary} at the {side} of a page", flush=True)
                        with backend.use():
                            getattr(ops, op)(**inputs)
    print("finished", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
