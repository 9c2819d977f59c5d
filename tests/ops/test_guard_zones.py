"""The guard zones catch what they should, on kernels made wrong on purpose, and let right ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.guard_zones import Ranges, add_view, guard_zones
from ugsd_fast import ops
from ugsd_fast.ops import backend

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
InterpreterError, InterpretedFunction = interpreter.InterpreterError, interpreter.InterpretedFunction


def copy_kernel(p_from, p_to, columns, stride, shift, BLOCK: tl.constexpr):
    """Copy ``[columns]`` of each row, ``shift`` elements off."""
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    tl.store(p_to + row * columns + offsets, tl.load(p_from + row * stride + shift + offsets, mask=inside), mask=inside)


def unmasked_kernel(p_from, p_to, columns, stride, shift, BLOCK: tl.constexpr):
    """Forget the mask of the load."""
    offsets = tl.arange(0, BLOCK)
    tl.store(p_to + offsets, tl.load(p_from + shift + offsets), mask=offsets < columns)


def writing_kernel(p_from, p_to, columns, stride, shift, BLOCK: tl.constexpr):
    """Write to the input."""
    tl.store(p_from + tl.arange(0, BLOCK), 0.0, mask=tl.arange(0, BLOCK) < columns)


def atomic_kernel(p_from, p_to, columns, stride, shift, BLOCK: tl.constexpr):
    """Count one place behind the output."""
    tl.atomic_add(p_to + columns, 1.0)


def misaligned_kernel(p_from, p_to, columns, stride, shift, BLOCK: tl.constexpr):
    """Read float32 from an odd address."""
    tl.load((p_from.to(tl.int64, bitcast=True) + 1).to(tl.pointer_type(tl.float32), bitcast=True))


def run_filter(kernel: Callable[..., None], logits: Tensor, shift: int = 0) -> Tensor:
    """Run ``ops.filter_logits`` on a Triton kernel of this file."""

    def filter_logits(logits: Tensor, *_: Any, out: Any = None) -> Tensor:
        rows, columns = logits.shape
        result = torch.empty(rows, columns) if out is None else out[0]
        launch = InterpretedFunction(kernel)[(rows,)]
        launch(logits, result, columns, logits.stride(0), shift, BLOCK=triton.next_power_of_2(columns))
        return result

    nothing = lambda *_: None  # noqa: E731
    with (
        patch.multiple(backend, _load=lambda *_: filter_logits, _why_missing=nothing, _why_not_on=nothing),
        guard_zones(),
        ops.use_backend("triton"),
    ):
        return ops.filter_logits(logits)


def test_right_accesses_pass() -> None:
    logits = cases.random_logits(3, 63)
    for layout in cases.LAYOUTS.values():
        assert torch.equal(run_filter(copy_kernel, layout(logits[None])[0]), logits)


WRONG = {
    "behind a row": (copy_kernel, 1, "load of 4 bytes at byte 272 of the storage of filter_logits's logits"),
    "before a row": (copy_kernel, -1, "load of 4 bytes at byte 16 of the storage of filter_logits's logits"),
    # 145 columns on, the storage ends; what lies farther off may be nearer to another tensor, which is then named
    "behind its storage": (copy_kernel, 145, "load of 4 bytes 0 bytes behind filter_logits's logits"),
    "no mask": (unmasked_kernel, 0, "load of 4 bytes at byte 272 of the storage"),
    "writes to its input": (writing_kernel, 0, "store of 4 bytes at byte 20 of .* logits, which is not its to touch"),
    "atomic behind its output": (
        atomic_kernel,
        0,
        "atomic of 4 bytes [0-9]+ bytes behind|atomic of 4 bytes at byte 252",
    ),
    "misaligned": (misaligned_kernel, 0, "load of 4 bytes at an address that is no multiple of it"),
}


@pytest.mark.parametrize(("kernel", "shift", "message"), WRONG.values(), ids=WRONG)
def test_wrong_accesses_are_found(kernel: Callable[..., None], shift: int, message: str) -> None:
    logits = cases.embedded(cases.random_logits(1, 63))
    with pytest.raises(InterpreterError, match=f"{kernel.__name__}, program .*: {message}"):
        run_filter(kernel, logits, shift)


def test_a_view_is_its_elements() -> None:
    ranges, buffer = Ranges(), torch.zeros(4, 6)
    add_view(ranges, buffer[::2, 1:4])
    start = buffer.data_ptr()
    assert (ranges.starts - start).tolist() == [4, 52]
    assert (ranges.ends - start).tolist() == [16, 64]
    add_view(ranges, buffer[0])
    assert (ranges.starts - start).tolist() == [0, 52]
    add_view(ranges, buffer.T)
    assert (ranges.ends - ranges.starts).tolist() == [96]
    add_view(ranges, buffer[:0])
    assert len(ranges.starts) == 1


def test_lists_of_tensors_may_be_changed_where_the_schema_says_so() -> None:
    kv = [torch.zeros(1, 1, 2, 8)]

    def kv_compact(kv: list[Tensor], keep: Tensor, align: str) -> Tensor:
        InterpretedFunction(writing_kernel)[(1,)](kv[0], keep, 16, 0, 0, BLOCK=16)
        return keep

    with guard_zones() as guard:
        guard.operation("kv_compact", kv_compact)(kv, torch.ones(1, dtype=torch.int64), "left")
    assert guard.launches == ["writing_kernel"]


def test_a_bare_launch_may_touch_what_it_is_given() -> None:
    source, target = torch.arange(7.0), torch.zeros(7)
    with guard_zones():
        InterpretedFunction(copy_kernel)[(1,)](source, target, 7, 0, 0, BLOCK=8)
        assert torch.equal(source, target)
        with pytest.raises(InterpreterError, match="load of 4 bytes 0 bytes behind a tensor of its own"):
            InterpretedFunction(copy_kernel)[(1,)](source, target, 8, 0, 0, BLOCK=8)
