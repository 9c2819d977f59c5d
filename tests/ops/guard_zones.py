"""No byte outside its tensors: watches every access that a Triton kernel makes under the interpreter.

What a caller hands to an op may be read, element by element of the view given: the gap between strided rows is as
forbidden as what lies behind the last one. Only what the op is to change may be written. Tensors that the op makes
itself may be read and written whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.interpreter import LOAD, watch
from ugsd_fast.ops import backend


class OutOfBounds(AssertionError):
    """A kernel touched what it may not."""


class Ranges:
    """Addresses as sorted disjoint ranges ``[start, end)``."""

    def __init__(self) -> None:
        self.starts = self.ends = np.empty(0, np.int64)

    def add(self, starts: np.ndarray, size: int) -> None:
        """Add ranges of one size."""
        starts, ends = np.concatenate([self.starts, starts]), np.concatenate([self.ends, starts + size])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        first = np.append(True, starts[1:] > ends[:-1])
        self.starts, self.ends = starts[first], ends[np.append(first[1:], True)]

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the addresses at which ``size`` bytes are not all inside one range."""
        if not len(self.starts) or not len(addresses):
            return addresses
        place = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (place >= 0) & (addresses + size <= self.ends[place])
        return addresses[~inside]


def add_view(ranges: Ranges, tensor: Tensor) -> None:
    """Add exactly the bytes of the elements of a view."""
    if tensor.numel() == 0:
        return
    run, starts = tensor.element_size(), np.array([tensor.data_ptr()], np.int64)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        step = stride * tensor.element_size()
        if step == run and len(starts) == 1:
            run *= size
        elif size > 1:
            starts = np.unique(starts[:, None] + step * np.arange(size))
    ranges.add(starts, run)


def add_storage(ranges: Ranges, tensor: Tensor) -> None:
    """Add all that a tensor's storage holds."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        ranges.add(np.array([storage.data_ptr()], np.int64), storage.nbytes())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class GuardZones:
    """Knows what kernels may touch, and raises `OutOfBounds` at the first access elsewhere.

    Attributes
    ----------
    launches
        Names of the kernels launched so far.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self._programs = (0, 0, 0)
        self._forget()

    def _forget(self) -> None:
        self._given: set[int] = set()
        self._names: list[tuple[int, int, str]] = []
        self._readable, self._writable = Ranges(), Ranges()

    def operation(self, op: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """Return an implementation of an op that declares its arguments before it runs."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            schema = getattr(torch.ops.ugsd_fast, op).default._schema.arguments
            self._forget()
            for argument, value in zip(schema, args, strict=False):
                changed = argument.alias_info is not None and argument.alias_info.is_write
                self._give(f"{op}'s {argument.name}", _tensors(value), changed)
            self._give(f"{op}'s out", _tensors(kwargs.get("out")), True)
            try:
                return implementation(*args, **kwargs)
            finally:
                self._forget()

        return guarded

    def _give(self, name: str, tensors: Sequence[Tensor], changed: bool) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._given.add(storage.data_ptr())
            self._names.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), name))
            add_view(self._readable, tensor)
            if changed:
                add_view(self._writable, tensor)

    def launch(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        self.launches.append(kernel)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._given:
                self._names.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), "a tensor of its own"))
                add_storage(self._readable, tensor)
                add_storage(self._writable, tensor)

    def grid(self, programs: tuple[int, int, int]) -> None:
        self._programs = programs

    def access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        addresses = addresses.astype(np.int64)
        outside = (self._readable if kind == LOAD else self._writable).outside(addresses, size)
        if len(outside):
            raise OutOfBounds(f"{self._where()}: {kind} of {size} bytes {self._describe(int(outside[0]), size)}")
        if (addresses % size).any():
            raise OutOfBounds(f"{self._where()}: {kind} of {size} bytes at an address that is no multiple of it")

    def _where(self) -> str:
        from triton.runtime.interpreter import interpreter_builder

        return f"{self.launches[-1]}, program {interpreter_builder.grid_idx} of {self._programs}"

    def _describe(self, address: int, size: int) -> str:
        """Return where an address lies, seen from the nearest tensor."""

        def distance(known: tuple[int, int, str]) -> int:
            return max(known[0] - address, address + size - known[1], 0)

        start, end, name = min(self._names, key=distance, default=(0, 0, "nothing"))
        if address < start:
            return f"{start - address} bytes before {name}"
        if address + size > end:
            return f"{address - end} bytes behind {name}"
        return f"at byte {address - start} of the storage of {name}, which is not its to touch"


@contextmanager
def guard_zones() -> Iterator[GuardZones]:
    """Fail at the first access of a Triton kernel outside what its op was given or made.

    Only under the interpreter. Ops called inside are guarded one by one; a kernel launched without an op may touch
    the storages of its arguments.
    """
    guard, load = GuardZones(), backend._load

    def guarded(op: str, name: str) -> Callable[..., Any]:
        implementation = load(op, name)
        return guard.operation(op, implementation) if name == "triton" else implementation

    with watch(guard), patch.object(backend, "_load", guarded):
        yield guard
