"""What the tests of the ops share: backends, sizes with their reasons, tolerances, and builders of awkward inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from ugsd_fast import ops, reference

try:
    from ugsd_fast import _C as extension
except ImportError:
    extension = None

SIZES = {
    1: "a vocabulary of one token has no second logit",
    63: "odd, and under two vectors of any instruction set",
    1000: "ends inside a vector of 16",
    4095: "one column short of a block",
    4096: "exactly one block",
    4097: "a second block of one column",
    32000: "Llama's vocabulary: 7.8 blocks",
    151936: "Qwen2.5-Omni's token columns",
    152064: "Qwen2.5-Omni's padded head: 37.1 blocks, where threads split a row",
}
SMALL_SIZES = {v: why for v, why in SIZES.items() if v <= 4097}
LARGEST = max(SIZES)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCE = {
    # The inputs are exact in every dtype and results are float32: one row would do, the table says so.
    # rtol is the proof asked for; atol is for logarithms that pass through 0, where only the error of the
    # sum inside counts.
    torch.float32: (2e-6, 5e-7),
    torch.bfloat16: (2e-6, 5e-7),
    torch.float16: (2e-6, 5e-7),
}
ENTROPY_FLOOR = 1e-12
"""Absolute error, in nats, under which an entropy counts as exact: no threshold tells it from 0."""


@dataclass(frozen=True)
class Backend:
    """One implementation to test: a backend, and for ``cpp`` one of its instruction sets."""

    name: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def native(self) -> bool:
        """Whether it is a kernel of ours, which must meet the op's floor, rather than the oracle."""
        return self.name != "reference"

    @property
    def law_size(self) -> tuple[int, int]:
        """Vocabulary and draws of a chi-square test: V = 32000 for kernels, which the oracle is too slow for."""
        if not self.native:
            return 1000, 1000
        return 32_000, 600 if self.isa == "scalar" else 2500

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run every op on this implementation."""
        before = ops.isa()
        if self.isa is not None:
            extension.set_isa(self.isa)
        try:
            with ops.use_backend(self.name):
                yield
        finally:
            if self.isa is not None:
                extension.set_isa(before)


def isas(op: str) -> list[str]:
    """The instruction sets of the extension, on this machine, that differ in ``op``; best first."""
    return [isa for isa in extension.isas() if isa != "avx512bf16" or op == "lm_head_stats"]


def backends_of(op: str) -> list[Backend]:
    """What can run ``op`` on CPU tensors here."""
    found: list[Backend] = []
    for name in ops.backends()[op]:
        if name == "cpp":
            found += [Backend(name, isa) for isa in isas(op)]
        elif name == "reference" or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            found.append(Backend(name))
    return found


def on_backends(op: str, *, native: bool = False, only: str | None = None) -> pytest.MarkDecorator:
    """Run a test, or a module of them, once on every implementation of ``op``: on the kernels alone, or one backend."""
    chosen = [backend for backend in backends_of(op) if backend.native or not native]
    chosen = [backend for backend in chosen if only is None or backend.name == only]
    return pytest.mark.parametrize("backend", chosen, ids=str, indirect=True)


def by_size(sizes: dict[int, str] = SIZES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vocabulary", list(sizes), ids=lambda v: f"V{v}")


def by_dtype() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed)) * scale).to(dtype)


def _masked(z: Tensor) -> Tensor:
    return z.masked_fill(torch.rand(z.shape, generator=generator(1)) < 0.5, -torch.inf)


def _with_nan(z: Tensor) -> Tensor:
    return z.masked_fill(torch.rand(z.shape, generator=generator(2)) < 0.3, torch.nan)


def _one_left(z: Tensor) -> Tensor:
    out = torch.full_like(z, -torch.inf)
    out[..., z.shape[-1] // 2] = -3.0
    return out


def _language(z: Tensor) -> Tensor:
    """A Zipf-like tail under one clear favourite, as a language model gives."""
    order = torch.randperm(z.shape[-1], generator=generator(3))
    return 14.0 - 1.7 * (order + 1.0).log() + 0.1 * z


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda z: z,
    "language": _language,
    "masked": _masked,
    "nan": _with_nan,
    "ties": lambda z: z.round(),
    "equal": lambda z: torch.full_like(z, 2.5),
    "huge": lambda z: (z * 1e4 / 3).clamp(-1e4, 1e4),
    "tiny": lambda z: z * 1e-4,
    "nearly-certain": lambda z: torch.where(torch.arange(z.shape[-1]) == z.shape[-1] // 3, 30.0, z),
    "one-left": _one_left,
    "empty": lambda z: torch.where(z > 0, torch.nan, -torch.inf),
    "float16-range": lambda z: z.sign() * 65504.0,
    "shifted": lambda z: z + 1000.0,
}


@cache
def rows_of_every_kind(vocabulary: int, dtype: torch.dtype) -> Tensor:
    """``[len(KINDS), V]``: one row of each kind in `KINDS`, in its order. Do not write to it."""
    z = random_logits(len(KINDS), vocabulary, seed=vocabulary)
    return torch.stack([kind(row) for kind, row in zip(KINDS.values(), z, strict=True)]).to(dtype)


def embedded(tensor: Tensor, poison: float = torch.inf, before: int = 5, after: int = 7) -> Tensor:
    """The same values as a window of a larger buffer, every other row of it, with poison all around.

    The window starts off every alignment. +inf as poison wins any maximum that looks at it.
    """
    *rows, columns = tensor.shape
    buffer = torch.full((*rows[:-1], 2 * rows[-1], before + columns + after), poison, dtype=tensor.dtype)
    window = buffer[..., ::2, before : before + columns]
    window.copy_(tensor)
    return window


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "window": embedded,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
"""Layouts of ``[A, B, V]`` with a contiguous last dimension."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: what `torch.equal` on floats cannot compare where there are NaNs."""
    return tensor.contiguous().flatten().view(torch.uint8)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def assert_close(got: Tensor, expected: Tensor, rtol: float, atol: float, what: str = "") -> None:
    """Compare with a float64 expectation; infinities must be equal."""
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def assert_stats(got: reference.TokenStats, expected: reference.TokenStats, dtype: torch.dtype) -> None:
    """Compare float32 statistics with the float64 oracle's by the table above."""
    rtol, atol = TOLERANCE[dtype]
    assert got.argmax.dtype == torch.int64
    assert torch.equal(got.argmax, expected.argmax), (got.argmax, expected.argmax)
    for name in ("logsumexp", "entropy", "max_logit", "margin"):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        floor = {"entropy": ENTROPY_FLOOR, "margin": 0.0}.get(name, atol)
        assert_close(value, getattr(expected, name), rtol, floor, name)


def chi_square(observed: Tensor, probability: Tensor, expected_at_least: float = 10.0) -> float:
    """The p-value of counts under a law; categories are merged, in order, up to this expected count.

    A count where the law has no mass gives 0.
    """
    observed, probability = observed.double(), probability.double()
    if observed[probability == 0].any():
        return 0.0
    expected = probability * observed.sum()
    group = (expected.cumsum(0) / expected_at_least).floor().long()
    # The last group may be short of its share: it joins the one before.
    group = group.clamp(max=max(int(group[-1]) - 1, 0)).unique(return_inverse=True)[1]
    size = int(group[-1]) + 1
    o = torch.zeros(size, dtype=torch.float64).index_add_(0, group, observed)
    e = torch.zeros(size, dtype=torch.float64).index_add_(0, group, expected)
    if size == 1:
        return 1.0
    statistic = ((o - e) ** 2 / e).sum()
    return float(torch.special.gammaincc(torch.tensor((size - 1) / 2, dtype=torch.float64), statistic / 2))


def token_law_p_values(tokens: Tensor, law: Tensor) -> dict[str, float]:
    """P-values of drawn tokens: by frequent tokens one by one, and by stretches of neighbouring columns."""
    counts = torch.bincount(tokens, minlength=len(law))
    order = law.argsort(descending=True)
    return {"by probability": chi_square(counts[order], law[order]), "by column": chi_square(counts, law)}
