"""A verifier in the same process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ugsd_fast import ops
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.drafter import RULES_WITH_DRAFT_LOGITS, DraftBlock, filter_logits
from ugsd_fast.decoding.trace import Traffic
from ugsd_fast.models import AudioLM
from ugsd_fast.models.sequence import CachedSequence
from ugsd_fast.verifier.base import Verdict


class LocalVerifier:
    """Verifies blocks with a model in this process.

    Parameters
    ----------
    model : AudioLM
        The stronger model.

    Examples
    --------
    >>> from ugsd_fast import Decoder
    >>> from ugsd_fast.demo import clips, load_pair
    >>> pair = load_pair()
    >>> verifier = LocalVerifier(pair.verifier.model)
    >>> Decoder(pair.draft, verifier, pair.config).generate(clips()[0].path).metrics.verifier_forwards < 10
    True
    """

    def __init__(self, model: AudioLM):
        self.model = model
        self.eos_token_ids = model.eos_token_ids
        self.max_audio_seconds = model.max_audio_seconds
        self.tokenizer = model.tokenizer

    def open(
        self,
        config: UGSDConfig,
        *,
        audio: Any = None,
        prompt: str | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> LocalSession:
        """Start a session on audio and prompt, or on prepared inputs; see `Verifier.open`."""

        def prepare() -> dict[str, Tensor]:
            return dict(inputs) if inputs is not None else self.model.prepare(audio, prompt)

        return LocalSession(self.model, prepare, config)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return self.model.decode(tokens)


class LocalSession:
    """One request at a `LocalVerifier`; see `VerifierSession`.

    The prompt is prepared with the first block that is escalated: a request that the drafter settles alone costs the
    verifier nothing.
    """

    def __init__(self, model: AudioLM, prepare: Callable[[], dict[str, Tensor]], config: UGSDConfig):
        self.traffic = Traffic()
        self._model = model
        self._prepare: Callable[[], dict[str, Tensor]] | None = prepare
        self._sequence: CachedSequence | None = None
        self._config = config
        self._device = model.device
        self._vocab_size = model.vocab_size
        self._pending: list[int] = []  # final, but not in the cache yet
        self._next_logits: Tensor | None = None  # [1, 1, V], while the cache is ahead of every final token's successor
        self._verifications = 0
        self.forwards = 0

    @torch.inference_mode()
    def verify(self, committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Verdict:
        """Judge a block in one forward pass; see `VerifierSession.verify`."""
        pending = [*self._pending, *committed]
        draft_tokens = block.tokens.to(self._device)
        target = self._target_logits(pending, draft_tokens)
        accepted = self._accept(draft_tokens, target, block, bonus=bonus)
        num_accepted, next_token = (int(x) for x in torch.cat([accepted.num_accepted, accepted.next_token]).tolist())
        assert self._sequence is not None
        self._sequence.rollback(len(block) - num_accepted)
        self._pending = [next_token] if next_token >= 0 else []
        self._next_logits = None if next_token >= 0 else target[:, -1:]
        return Verdict(num_accepted, next_token)

    def close(self) -> None:
        """Free the cache."""
        self._prepare = self._sequence = None
        self._next_logits = None

    def _target_logits(self, pending: list[int], draft_tokens: Tensor) -> Tensor:
        """Logits [1, K + 1, V] of the block's K positions and the one behind it."""
        if self._prepare is None:
            raise RuntimeError("verify: the session is closed, expected an open one")
        if self._sequence is None:
            self._sequence = self._model.open(self._prepare())
        known = self._next_logits if not pending else None
        fed = draft_tokens
        if pending:
            fed = torch.cat([torch.tensor([pending], dtype=torch.long, device=self._device), draft_tokens], dim=1)
        if known is not None and not fed.shape[1]:
            return known
        # Ids beyond the vocabulary cannot be embedded; `accept_block` rejects them, and the rollback forgets them.
        logits = self._sequence.forward(
            fed.clamp(max=self._vocab_size - 1), keep=draft_tokens.shape[1] + (known is None)
        )
        self.forwards = self._sequence.forwards
        return logits if known is None else torch.cat([known, logits], dim=1)

    def _accept(self, draft_tokens: Tensor, target: Tensor, block: DraftBlock, *, bonus: bool) -> ops.Acceptance:
        config = self._config
        sampled = config.temperature > 0
        # Without a draft every rule comes down to the verifier's own next token.
        rule = config.rule if len(block) else "exact" if sampled else "greedy"
        if rule in RULES_WITH_DRAFT_LOGITS or (sampled and rule in ("typical", "relaxed")):
            target = filter_logits(target, config)
        draft_logits = draft_logsumexp = None
        if rule in RULES_WITH_DRAFT_LOGITS:
            if block.logits is None:
                draft_logits = target.new_zeros(1, 0, self._vocab_size)
            else:
                draft_logits, draft_logsumexp = _in_vocabulary(block.logits.to(target), self._vocab_size)
        self._verifications += 1
        return ops.accept_block(
            draft_tokens,
            target,
            draft_logits,
            rule=rule,
            rank=config.rank,
            epsilon=config.epsilon,
            delta=config.delta,
            top_n=config.top_n,
            relax_delta=config.relax_delta,
            draft_logsumexp=draft_logsumexp,
            bonus=bonus,
            seed=config.seed,
            offset=self._verifications - 1,
        )


def _in_vocabulary(draft_logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """The drafter's logits [1, K, V'] over the verifier's V columns, and their logsumexp where columns were cut."""
    missing = vocab_size - draft_logits.shape[-1]
    if missing >= 0:
        return nn.functional.pad(draft_logits, (0, missing), value=-torch.inf), None
    return draft_logits[..., :vocab_size], ops.token_stats(draft_logits).logsumexp
