"""Watches what Triton kernels read and write while its interpreter runs them on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

LOAD, STORE, ATOMIC = "load", "store", "atomic"


class Watcher(Protocol):
    """What `watch` tells of."""

    def launch(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        """A kernel is about to run; ``tensors`` are those among its arguments."""

    def grid(self, programs: tuple[int, int, int]) -> None:
        """The launched kernel runs this many programs."""

    def access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        """One instruction of one program touches ``size`` bytes at each address; lanes masked off are left out."""


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of every launch and every access to memory before it happens."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    run, set_grid_dim = GridExecutor.__call__, InterpreterBuilder.set_grid_dim

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        watcher.launch(self.fn.__name__, tensors)
        with _disable_current_modes():  # the interpreter copies its arguments about
            return run(self, *args, **kwargs)

    def grid(self: Any, *sizes: int) -> None:
        watcher.grid(sizes)  # type: ignore[arg-type]
        set_grid_dim(self, *sizes)

    def watched(method: str, kind: str, pointers: int, mask: int | None) -> Any:
        original = getattr(InterpreterBuilder, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            addresses = args[pointers].data
            if mask is not None:
                on = np.broadcast_to(args[mask].data, addresses.shape).astype(bool)
                addresses = addresses[on]
            width = args[pointers].get_element_ty().primitive_bitwidth
            watcher.access(kind, addresses.reshape(-1), max(1, width // 8))
            return original(self, *args, **kwargs)

        return call

    with ExitStack() as patches:
        patches.enter_context(patch.object(GridExecutor, "__call__", launch))
        patches.enter_context(patch.object(InterpreterBuilder, "set_grid_dim", grid))
        for method, call in (
            ("create_masked_load", watched("create_masked_load", LOAD, 0, 1)),
            ("create_masked_store", watched("create_masked_store", STORE, 0, 2)),
            ("create_atomic_rmw", watched("create_atomic_rmw", ATOMIC, 1, 3)),
            ("create_atomic_cas", watched("create_atomic_cas", ATOMIC, 0, None)),
        ):
            patches.enter_context(patch.object(InterpreterBuilder, method, call))
        yield


@contextmanager
def quick_calls() -> Iterator[None]:
    """Let kernels cost what they compute: triton patches its language anew at each call of a device function, and
    checks each sum of integers for overflow in three more operations."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    run, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages = interpreter.tl, interpreter.tl.core
    seen: dict[str, frozenset[int]] = {}
    patched: set[int] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        module = function.__module__
        if module not in seen:
            values = function.__globals__.values()
            seen[module] = frozenset(i for i, one in enumerate(languages) if any(one is value for value in values))
        if seen[module] <= patched:
            return None
        patched.update(seen[module])
        return patch_language(function)

    with (
        patch.object(interpreter.GridExecutor, "__call__", launch),
        patch.object(interpreter, "_patch_lang", patch_once),
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None),
    ):
        yield
