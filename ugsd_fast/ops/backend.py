"""Which implementation runs an op: the registry behind every public function of ``ugsd_fast.ops``.

An op has one *schema*, registered with ``torch.library`` as ``ugsd_fast::<op>``, and up to four
*implementations* of it, one a backend. All of them take the schema's arguments in order and return its
results. Public functions check their arguments and then either call the implementation directly (plain
eager tensors: the dispatcher would cost more than the kernel on small vocabularies) or go through the
registered op (tracing, fake tensors, subclasses, dispatch or function modes, functorch transforms).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch, _is_torch_function_mode_enabled, _len_torch_dispatch_stack
from torch.compiler import is_compiling

extension: Any = None
try:
    extension = importlib.import_module("ugsd_fast._C")
    extension.use_tensors_of(Tensor)
except (ImportError, AttributeError) as error:
    extension = None
    _extension_missing = f"the extension ugsd_fast._C is not built or does not load ({error})"

BACKENDS = ("reference", "cpp", "triton", "cuda")
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

Implementation = Callable[..., Any]

_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_implementations: dict[tuple[str, str], Implementation] = {}
_chosen: dict[tuple[str, str], Implementation] = {}
_requested: ContextVar[str | None] = ContextVar("ugsd_fast.backend", default=None)
_out_overloads: dict[str, Callable[..., None]] = {}
_library = torch.library.Library("ugsd_fast", "DEF")


class BackendError(RuntimeError):
    """The backend asked for cannot run this op on this machine or device."""


class Backends(Mapping[str, tuple[str, ...]]):
    """The backends that each op can run on here, fastest first, and why the others cannot.

    A mapping from op name to backend names. ``missing[op][backend]`` is the reason of an absent one.
    """

    def __init__(self, available: dict[str, tuple[str, ...]], missing: dict[str, dict[str, str]]) -> None:
        self._available = available
        self.missing = missing

    def __getitem__(self, op: str) -> tuple[str, ...]:
        return self._available[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._available)

    def __len__(self) -> int:
        return len(self._available)

    def __repr__(self) -> str:
        return f"Backends({self._available})"


def backends() -> Backends:
    """Return what this machine can run: ``backends()["token_stats"] == ("cpp", "reference")``.

    Returns
    -------
    Backends
        Mapping from op to backend names, with ``missing`` holding the reasons of absent ones.

    Examples
    --------
    >>> import ugsd_fast.ops
    >>> "reference" in ugsd_fast.ops.backends()["token_stats"]
    True
    """
    available: dict[str, tuple[str, ...]] = {}
    missing: dict[str, dict[str, str]] = {}
    for op in OPS:
        reasons = {backend: _why_missing(op, backend) for backend in ("cuda", "triton", "cpp", "reference")}
        available[op] = tuple(backend for backend, reason in reasons.items() if reason is None)
        missing[op] = {backend: reason for backend, reason in reasons.items() if reason is not None}
    return Backends(available, missing)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on one backend, and fail where it cannot run.

    Parameters
    ----------
    name
        ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises
    ------
    ValueError
        For an unknown name. An op that the backend cannot run raises `BackendError` when called: there is no
        silent replacement.

    Examples
    --------
    >>> import torch, ugsd_fast.ops as ops
    >>> with ops.use_backend("reference"):
    ...     ops.token_stats(torch.tensor([[0.0, 0.0]])).entropy
    tensor([0.6931])
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def register(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    reference: Implementation,
    cpp: Implementation | None = None,
) -> Callable[..., Any]:
    """Define ``ugsd_fast::<op>`` and return its registered overload.

    Beside it, ``ugsd_fast::<op>_out`` takes the tensors to write after the arguments and returns nothing; an op
    that changes an argument in place has none.

    Parameters
    ----------
    op
        Name of the op.
    schema
        Arguments and results, in the ``torch.library`` schema language.
    fake
        Result shapes and dtypes, for tracing.
    reference, cpp
        Implementations: the schema's arguments in order and the keyword ``out``, a tuple of tensors to write and
        return in place of new ones, or None. ``reference`` has no ``out``: its results are copied there. ``triton``
        and ``cuda`` ones are functions of the op's name in ``ugsd_fast.kernels.<op>`` and ``ugsd_fast.kernels.cuda``,
        imported when first used.
    """
    in_place = "!" in schema
    _implementations[op, "reference"] = reference if in_place else _copying(reference)
    if cpp is not None and hasattr(extension, op):
        _implementations[op, "cpp"] = cpp
    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, lambda *args: select(op, _device_of(args[0]))(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ugsd_fast::{op}", fake, lib=_library)
    if not in_place:
        _register_out(op, schema)
    return getattr(torch.ops.ugsd_fast, op).default


def _copying(reference: Implementation) -> Implementation:
    """Return ``reference`` with the keyword ``out``."""

    def implementation(*args: Any, out: tuple[Tensor, ...] | None = None) -> Any:
        results = reference(*args)
        if out is None:
            return results
        for given, result in zip(out, (results,) if isinstance(results, Tensor) else results, strict=True):
            given.copy_(result)
        return out

    return implementation


def _register_out(op: str, schema: str) -> None:
    """Define ``ugsd_fast::<op>_out`` after the op's schema."""
    arguments, _, results = schema.rpartition(" -> ")
    count = results.count("Tensor")
    outputs = ", ".join(f"Tensor({chr(ord('a') + i)}!) out_{i}" for i in range(count))
    _library.define(f"{op}_out{arguments[:-1]}, {outputs}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args: Any) -> None:
        select(op, _device_of(args[0]))(*args[:-count], out=args[-count:])

    _library.impl(f"{op}_out", implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ugsd_fast::{op}_out", lambda *args: None, lib=_library)
    _out_overloads[op] = getattr(torch.ops.ugsd_fast, f"{op}_out").default


def is_eager(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a plain tensor that nothing traces, transforms or watches."""
    return (
        not is_compiling()
        and type(tensor) is Tensor
        and not tensor.requires_grad
        and _len_torch_dispatch_stack() == 0
        and not _is_torch_function_mode_enabled()
        and _functorch.peek_interpreter_stack() is None
    )


def run(op: str, overload: Callable[..., Any], first: Tensor, *args: Any, out: tuple[Tensor, ...] | None = None) -> Any:
    """Call ``op`` on checked arguments: directly for plain eager tensors, else through its registered overload.

    With ``out``, results are written there and ``out`` is returned.
    """
    if is_eager(first):
        return select(op, "cpu" if first.is_cpu else first.device.type)(first, *args, out=out)
    if out is None:
        return overload(first, *args)
    _out_overloads[op](first, *args, *out)
    return out


def select(op: str, device: str) -> Implementation:
    """Return the implementation of ``op`` for tensors on a device type, as `use_backend` and the machine allow."""
    requested = _requested.get()
    if requested is None:
        found = _chosen.get((op, device))
        if found is not None:
            return found
        for backend in _PREFERENCE.get(device, ("reference",)):
            if _why_missing(op, backend) is None:
                _chosen[op, device] = _load(op, backend)
                return _chosen[op, device]
        raise BackendError(f"{op}: no backend for tensors on {device}")
    reason = _why_missing(op, requested) or _why_not_on(requested, device)
    if reason is not None:
        raise BackendError(f"{op}: backend {requested!r} cannot run here: {reason}")
    return _load(op, requested)


def isa() -> str | None:
    """Return the instruction set that the ``cpp`` backend chose (``UGSD_CPU_ISA`` overrides), None without it."""
    return None if extension is None else extension.isa()


def _device_of(first: Tensor | list[Tensor]) -> str:
    return (first if isinstance(first, Tensor) else first[0]).device.type


def _kernel_module(backend: str, op: str) -> str:
    return f"ugsd_fast.kernels.{op if backend == 'triton' else 'cuda'}"


@cache
def _load(op: str, backend: str) -> Implementation:
    if (op, backend) not in _implementations:
        _implementations[op, backend] = getattr(importlib.import_module(_kernel_module(backend, op)), op)
    return _implementations[op, backend]


@cache
def _why_missing(op: str, backend: str) -> str | None:
    """Return why ``backend`` has no implementation of ``op`` here, None if it has one."""
    if (op, backend) in _implementations:
        return None
    if backend == "cpp":
        return _extension_missing if extension is None else f"ugsd_fast._C does not implement {op}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        _load(op, backend)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("ugsd_fast.kernels"):
            return f"its kernel does not load: {error}"
        return f"this version has no {backend} kernel for {op}"
    except ImportError as error:
        return f"its kernel does not load: {error}"
    except AttributeError:
        return f"this version has no {backend} kernel for {op}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _why_not_on(backend: str, device: str) -> str | None:
    """Return why ``backend`` cannot take tensors on ``device``, None if it can."""
    if backend == "cpp" and device != "cpu":
        return f"it takes CPU tensors, got one on {device}"
    if backend == "cuda" and device != "cuda":
        return f"it takes CUDA tensors, got one on {device}"
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it takes CPU tensors only under TRITON_INTERPRET=1"
    return None
