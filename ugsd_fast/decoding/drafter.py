"""The edge model's side of the loop: draft a block, hear the gate, take back what was rejected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.errors import ModelError
from ugsd_fast.models.sequence import CachedSequence

# Rules whose acceptance needs the distribution that the draft was sampled from.
RULES_WITH_DRAFT_LOGITS = frozenset({"exact", "block"})


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
    """

    tokens: Tensor
    logits: Tensor | None
    token_ids: tuple[int, ...]
    entropy: tuple[float, ...]
    uncertainty: float
    escalate: bool

    def __len__(self) -> int:
        return len(self.token_ids)


# What a verifier that decodes alone is given to judge.
EMPTY_BLOCK = DraftBlock(torch.zeros(1, 0, dtype=torch.long), None, (), (), 0.0, True)


class Drafter:
    """Drafts the continuation of one request.

    The steps of a block follow each other without a look at their results: tokens, entropies and the gate's decision
    come to the host together, in one read a block.

    Parameters
    ----------
    sequence : CachedSequence
        A sequence of the edge model, on its own prompt and audio.
    config : UGSDConfig
        Sampling, gate and threshold.
    eos_token_ids : frozenset of int
        Tokens that end a caption.
    vocab_size : int
        Columns of the edge model's logits; a verifier's token beyond them cannot be fed to it.
    """

    def __init__(
        self,
        sequence: CachedSequence,
        config: UGSDConfig,
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
    ):
        self._sequence = sequence
        self._config = config
        self._device = device
        self._last_token = vocab_size - 1
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._pending = torch.zeros(1, 0, dtype=torch.long, device=device)  # final, but not in the cache yet
        self._drafted = 0  # length of the block in flight; all but its last token are in the cache
        self._draws = 0

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self._sequence.forwards

    @torch.inference_mode()
    def draft(self, length: int) -> DraftBlock:
        """Draft `length` tokens in as many forward passes.

        Parameters
        ----------
        length : int
            K, at least 1.
        """
        config = self._config
        tokens, entropies, logits = [], [], []
        for _ in range(length):
            z = self._sequence.forward(self._pending, keep=1)[:, 0]  # [1, V]
            token, entropy = draw(z, config, self._draws)
            self._draws += 1
            self._pending = token[:, None].clamp(min=0)  # a row with nothing finite draws -1
            tokens.append(token)
            entropies.append(entropy)
            if config.rule in RULES_WITH_DRAFT_LOGITS:
                logits.append(filter_logits(z, config))
        self._drafted = length
        drafted, entropy = torch.stack(tokens, 1), torch.stack(entropies, 1)
        record = gate(drafted, entropy, config, self._eos)
        return block_of(record, drafted, torch.stack(logits, 1) if logits else None)

    def commit(self, num_accepted: int, next_token: int) -> None:
        """Keep `num_accepted` tokens of the last block and append `next_token` (-1: none)."""
        cached = self._drafted - 1
        if num_accepted < cached:
            self._sequence.rollback(cached - num_accepted)
        kept = self._pending[:, : num_accepted - cached] if num_accepted > cached else self._pending[:, :0]
        if next_token >= 0:
            fed = torch.full((1, 1), min(next_token, self._last_token), dtype=torch.long, device=self._device)
            kept = torch.cat([kept, fed], dim=1)
        self._pending = kept


def draw(z: Tensor, config: UGSDConfig, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    """One token [1] of the logits `z` [1, V], and their entropy [1]; `offset` counts the draws."""
    if not config.temperature:
        stats = ops.token_stats(z)
        return stats.argmax, stats.entropy
    drawn = ops.sample(
        z,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=config.seed,
        offset=offset,
    )
    return drawn.tokens, drawn.stats.entropy


def gate(tokens: Tensor, entropy: Tensor, config: UGSDConfig, eos: Tensor) -> Tensor:
    """What the host has to know of a drafted block [1, K], in one tensor: the argument of `block_of`."""
    is_end = (tokens[..., None] == eos).any(-1)  # [1, K]
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    uncertainty, escalate = ops.gate_block(entropy, lengths, threshold=config.entropy_threshold, reduce=config.gate)
    # float64 holds token ids exactly.
    scalars = torch.stack([lengths.double(), uncertainty.double(), escalate.double()], 1)
    return torch.cat([scalars, tokens.double(), entropy.double()], 1)


def block_of(record: Tensor, tokens: Tensor, logits: Tensor | None) -> DraftBlock:
    """The block that `gate` recorded: the one copy to the host that a block takes."""
    host = record[0].tolist()
    length, width = int(host[0]), tokens.shape[1]
    if min(host[3 : 3 + length]) < 0:
        raise ModelError("Drafter: the model's logits have no finite value, expected a next token")
    return DraftBlock(
        tokens=tokens[:, :length],
        logits=None if logits is None else logits[:, :length],
        token_ids=tuple(int(token) for token in host[3 : 3 + length]),
        entropy=tuple(host[3 + width : 3 + width + length]),
        uncertainty=host[1],
        escalate=bool(host[2]),
    )


def filter_logits(logits: Tensor, config: UGSDConfig) -> Tensor:
    """Logits of the distribution that `config` samples from."""
    return ops.filter_logits(
        logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
    )
