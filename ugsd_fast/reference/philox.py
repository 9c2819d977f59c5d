"""Counter-based uniforms: Philox4x32-10 (Salmon et al., SC 2011) over (seed, offset, row, stream).

The key is the 64-bit seed, the counter is ``(offset low, offset high, row, stream)``. One call gives one
uniform with 53 bits, made of the first two output words, so that it is exact in float64, lies in
``[0, 1)`` and is the same number in every backend.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a uniform decides: the streams are disjoint counters, so no draw can leak into another."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2

    def at(self, position: int) -> int:
        """Return the stream word of a block position: one independent uniform a position."""
        return int(self) | position << 8


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Run ten Philox4x32 rounds on four counter words and two key words, int64 tensors holding uint32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product is taken modulo 2**64: the sign bit of int64 carries the top bit of the high word.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def uniform(seed: int | Tensor, offset: int | Tensor, row: Tensor, stream: int | Tensor) -> Tensor:
    """Return float64 uniforms in ``[0, 1)``, one for each element of ``row``."""
    seed, offset, stream = (
        torch.as_tensor(_wrap(word), dtype=torch.int64, device=row.device).expand(row.shape)
        for word in (seed, offset, stream)
    )
    words = philox4x32(
        [offset & _MASK, offset >> 32 & _MASK, row & _MASK, stream & _MASK],
        [seed & _MASK, seed >> 32 & _MASK],
    )
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def _wrap(word: int | Tensor) -> int | Tensor:
    """Return a Python integer as the int64 with the same low 64 bits."""
    return (word + 2**63) % 2**64 - 2**63 if isinstance(word, int) else word
