"""A drafted block: on the host, or so far on the device alone; and the gate, which makes one of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.errors import ModelError


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """One drafted block, cut behind its end-of-sequence token.

    Attributes
    ----------
    tokens : LongTensor[1, K]
        On the drafter's device.
    logits : Tensor[1, K, V] or None
        After temperature and filtering: what the tokens were sampled from. Only kept where the rule asks for it.
    token_ids : tuple of int
        `tokens`, on the host.
    entropy : tuple of float
        Entropy of each position, nats.
    uncertainty : float
        Of the block, nats: what the gate compares with the threshold.
    escalate : bool
        The gate's decision.
    rivals : LongTensor[1, K, R] or None
        The drafter's best tokens at each position; only kept for ``UGSDConfig(branches=...)``.
    """

    tokens: Tensor
    logits: Tensor | None
    token_ids: tuple[int, ...]
    entropy: tuple[float, ...]
    uncertainty: float
    escalate: bool
    rivals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def width(self) -> int:
        """Columns of `tokens`."""
        return len(self.token_ids)


class UnreadBlock:
    """A drafted block that only the device knows so far: what it is for the host is read with the verifier's verdict.

    Has all that a `DraftBlock` has; asking for it before `read` was given a record takes a copy to the host.

    Parameters
    ----------
    tokens : LongTensor[1, K]
        Not cut behind an end-of-sequence token.
    logits : Tensor[1, K, V] or None
        As in `DraftBlock`.
    record : Tensor[3 + 2·K], float64
        A row of `gate`.
    ends : frozenset of int
        Tokens that end a caption.
    """

    def __init__(self, tokens: Tensor, logits: Tensor | None, record: Tensor, ends: frozenset[int]):
        self.record = record
        self._whole = tokens, logits
        self._ends = ends
        self._block: DraftBlock | None = None

    @property
    def tokens(self) -> Tensor:
        """Of the block, or of all columns while nobody has read where it ends."""
        return self._whole[0] if self._block is None else self._block.tokens

    @property
    def logits(self) -> Tensor | None:
        """Of the same positions as `tokens`."""
        return self._whole[1] if self._block is None else self._block.logits

    @property
    def width(self) -> int:
        """Columns of `tokens`."""
        return self.tokens.shape[1]

    @property
    def ended(self) -> bool:
        """Whether its last token ends the caption."""
        return self.read().token_ids[-1] in self._ends

    def read(self, record: Sequence[float] | None = None) -> DraftBlock:
        """The block, given its record on the host."""
        if self._block is None:
            self._block = block_of(self.record.tolist() if record is None else record, *self._whole)
        return self._block

    def __len__(self) -> int:
        return len(self.read())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)


Block = DraftBlock | UnreadBlock

# What a verifier that decodes alone is given to judge.
EMPTY_BLOCK = DraftBlock(torch.zeros(1, 0, dtype=torch.long), None, (), (), 0.0, True)


def gate(tokens: Tensor, entropy: Tensor, config: UGSDConfig, eos: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What the host has to know of drafted blocks [B, K], a row each: what `block_of` reads.

    A block ends behind its end-of-sequence token, behind `lengths` [B] tokens where they are given, and under
    ``adaptive="entropy"`` behind its first uncertain token, though not before ``min_block`` tokens.
    """
    ends = (tokens[..., None] == eos).any(-1)  # [B, K]
    if config.adaptive == "entropy":
        uncertain = (entropy > config.entropy_threshold).cumsum(1) > 0
        ends[:, config.min_block - 1 :] |= uncertain[:, config.min_block - 1 :]
    cut = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
    lengths = cut if lengths is None else torch.minimum(cut, lengths)
    threshold = min(config.entropy_threshold, torch.finfo(torch.float32).max)  # no entropy is greater
    uncertainty, escalate = ops.gate_block(entropy, lengths, threshold=threshold, reduce=config.gate)
    # float64 holds token ids exactly.
    scalars = torch.stack([lengths.double(), uncertainty.double(), escalate.double()], 1)
    return torch.cat([scalars, tokens.double(), entropy.double()], 1)


def block_of(
    record: Sequence[float], tokens: Tensor, logits: Tensor | None, rivals: Tensor | None = None
) -> DraftBlock:
    """The block of one row that `gate` recorded; the record came to the host in the one copy that a block takes."""
    length, width = int(record[0]), (len(record) - 3) // 2
    ids = record[3 : 3 + length]
    if min(ids) < 0:
        raise ModelError("Drafter: the model's logits have no finite value, expected a next token")
    return DraftBlock(
        tokens=tokens[:, :length],
        logits=None if logits is None else logits[:, :length],
        token_ids=tuple(int(token) for token in ids),
        entropy=tuple(record[3 + width : 3 + width + length]),
        uncertainty=record[1],
        escalate=bool(record[2]),
        rivals=rivals,
    )
