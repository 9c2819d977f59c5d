"""A verifier in the same process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from ugsd_fast import ops
from ugsd_fast.decoding.block import Block, UnreadBlock
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.processors import Processed
from ugsd_fast.decoding.sampling import RULES_WITH_DRAFT_LOGITS, filter_logits
from ugsd_fast.decoding.trace import Traffic
from ugsd_fast.decoding.unread import PendingVerdict, read_together
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.device import on_device
from ugsd_fast.errors import attempt
from ugsd_fast.models import AudioLM
from ugsd_fast.models.packed import forward_packed
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

    reads_blocks = True  # takes an `UnreadBlock`, and reads it with its verdict

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
        logits_processor: Sequence[LogitsProcessor] | None = None,
    ) -> LocalSession:
        """Start a session on audio and prompt, or on prepared inputs; see `Verifier.open`."""

        def prepare() -> dict[str, Tensor]:
            return dict(inputs) if inputs is not None else self.model.prepare(audio, prompt)

        processed = None
        if logits_processor is not None:
            inputs = prepare()
            ids = self.model.prompt_ids(inputs).to(self.model.device)
            processed = Processed(logits_processor, ids, vocab_size=self.model.vocab_size)
        return LocalSession(self.model, prepare, config, processed)

    @torch.inference_mode()
    def verify_batch(self, calls: Sequence[VerifyCall]) -> list[Verdict | Exception]:
        """Judge blocks of several sessions of this verifier in one forward pass.

        Parameters
        ----------
        calls : sequence of VerifyCall
            ``(session, committed, block, bonus)`` as `VerifierSession.verify` takes them; a session at most once.

        Returns
        -------
        list of Verdict or Exception
            In the order of the calls; an exception where a prompt cannot be prepared, or has no room for the block.
            Sessions at their first block share a forward where their audio has one shape, all others share another, and
            the verdicts come to the host in one copy.
        """
        return read_together(self.launch(calls), [])[0]

    def can_launch(self, calls: Sequence[VerifyCall]) -> bool:
        """Whether `launch` can stand for `verify` and `verify_batch`: nobody has put methods in their place."""
        own = type(self).verify_batch is LocalVerifier.verify_batch
        sessions = [call.session for call in calls]
        return own and all(type(one).verify is LocalSession.verify and "verify" not in vars(one) for one in sessions)

    @torch.inference_mode()
    def launch(self, calls: Sequence[VerifyCall]) -> list[PendingVerdict | Exception]:
        """What `verify_batch` does, without a look at the verdicts: the host goes on, and reads them when it likes.

        A session whose verdict is pending can do nothing else before it was read.

        Parameters
        ----------
        calls : sequence of VerifyCall
            As for `verify_batch`, of blocks that were read.

        Returns
        -------
        list of PendingVerdict or Exception
            To be read with `PendingVerdict.read`, or several with `ugsd_fast.decoding.unread.read_together`.
        """
        ready = [attempt(call.session.check_room, call.committed, call.block) for call in calls]
        able = [call for call, error in zip(calls, ready, strict=True) if error is None]
        pending = iter(self._launch(able) if able else [])
        return [next(pending) if error is None else error for error in ready]

    def _launch(self, calls: Sequence[VerifyCall]) -> list[PendingVerdict]:
        sessions: list[LocalSession] = [call.session for call in calls]
        feeds = [session.feed(call.committed, call.block) for session, call in zip(sessions, calls, strict=True)]
        asked = [index for index, feed in enumerate(feeds) if feed.keep]
        sequences = [sessions[index].sequence for index in asked]
        keep = [feeds[index].keep for index in asked]
        logits: dict[int, Tensor] = {}
        if asked:
            rows = forward_packed(sequences, [feeds[index].tokens for index in asked], keep)
            logits = dict(zip(asked, rows[None].split(keep, 1), strict=True))
        accepted = [
            session.accept(call.block, feed, logits.get(index), bonus=call.bonus)
            for index, (session, call, feed) in enumerate(zip(sessions, calls, feeds, strict=True))
        ]
        return [
            PendingVerdict(session, call.block, one)
            for session, call, one in zip(sessions, calls, accepted, strict=True)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return self.model.decode(tokens)


class Feed(NamedTuple):
    """What a session's forward appends, and the positions [keep] whose logits it wants (0: none, they are known)."""

    tokens: Tensor
    keep: int


@dataclass(slots=True)
class Judgements:
    """At each emitted token, the verifier's logits and the scores that the rule judged by: [n, V] a block."""

    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class LocalSession:
    """One request at a `LocalVerifier`; see `VerifierSession`.

    The prompt is prepared with the first block that is escalated: a request that the drafter settles alone costs the
    verifier nothing.

    Attributes
    ----------
    judgements : Judgements or None
        Where one is set, logits and scores are kept in it.
    keeps_cache : bool
        Whether `close` leaves the cache to whoever has the session.
    """

    def __init__(
        self,
        model: AudioLM,
        prepare: Callable[[], dict[str, Tensor]],
        config: UGSDConfig,
        processed: Processed | None = None,
    ):
        self.traffic = Traffic()
        self._model = model
        self._prepare: Callable[[], dict[str, Tensor]] | None = prepare
        self._sequence: CachedSequence | None = None
        self._config = config
        self._device = model.device
        self._vocab_size = model.vocab_size
        self._pending: list[int] = []  # final, but not in the cache yet
        self._next_logits: Tensor | None = None  # [1, 1, V], while the cache is ahead of every final token's successor
        self._last_logits: Tensor | None = None  # [1, 1, V], behind the block in flight
        self._processed = processed
        self._verifications = 0
        self.judgements: Judgements | None = None
        self.keeps_cache = False

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self._sequence.forwards if self._sequence is not None else 0

    @property
    def sequence(self) -> CachedSequence:
        """The request's cache; prompt and audio are prepared when it is first asked for."""
        if self._prepare is None:
            raise RuntimeError("verify: the session is closed, expected an open one")
        if self._sequence is None:
            self._sequence = self._model.open(self._prepare())
        return self._sequence

    @torch.inference_mode()
    def verify(self, committed: Sequence[int], block: Block, *, bonus: bool) -> Verdict:
        """Judge a block in one forward pass; see `VerifierSession.verify`."""
        feed = self.feed(committed, block)
        logits = self.sequence.forward(feed.tokens, keep=feed.keep) if feed.keep else None
        return PendingVerdict(self, block, self.accept(block, feed, logits, bonus=bonus)).read()

    def close(self) -> None:
        """Free the cache."""
        if self.keeps_cache:
            return
        self._prepare = self._sequence = None
        self._next_logits = self._last_logits = None

    def check_room(self, committed: Sequence[int], block: Block) -> None:
        """Raise unless a block can be judged: the prompt cannot be prepared, or has no room for it.

        Raises
        ------
        AudioError, ModelError
            Naming the reason.
        """
        self.sequence.check_room(len(self._pending) + len(committed) + block.width)

    def feed(self, committed: Sequence[int], block: Block) -> Feed:
        """What the next forward has to append to judge a block."""
        pending = [*self._pending, *committed]
        if self._processed is not None and committed:
            self._processed.append(on_device([list(committed)], self._device))
        fed = block.tokens.to(self._device)
        if pending:
            fed = torch.cat([on_device([pending], self._device), fed], dim=1)
        known = self._next_logits is not None and not pending
        # Ids beyond the vocabulary cannot be embedded; `accept_block` rejects them, and the rollback forgets them.
        return Feed(fed.clamp(max=self._vocab_size - 1), block.width + (not known))

    def accept(self, block: Block, feed: Feed, logits: Tensor | None, *, bonus: bool) -> ops.Acceptance:
        """Apply the rule to a block, given the forward's logits [1, keep, V]; nothing is read by the host."""
        known = self._next_logits if feed.keep == block.width else None
        target = judged = torch.cat([part for part in (known, logits) if part is not None], 1)  # [1, K + 1, V]
        self._last_logits = target[:, -1:]
        if self._processed is not None:
            target = self._processed.block_scores(target, block.tokens.to(self._device))
        config = self._config
        sampled = config.temperature > 0
        # Without a draft every rule comes down to the verifier's own next token.
        rule = config.rule if block.width else "exact" if sampled else "greedy"
        if rule in RULES_WITH_DRAFT_LOGITS or (sampled and rule in ("typical", "relaxed")):
            target = filter_logits(target, config)
        if self.judgements is not None:
            self.judgements.logits.append(judged[0])
            self.judgements.scores.append(target[0])
        draft_logits = draft_logsumexp = None
        if rule in RULES_WITH_DRAFT_LOGITS:
            if block.logits is None:
                draft_logits = target.new_zeros(1, 0, self._vocab_size)
            else:
                draft_logits, draft_logsumexp = _in_vocabulary(block.logits.to(target), self._vocab_size)
        self._verifications += 1
        return ops.accept_block(
            block.tokens.to(self._device),
            target,
            draft_logits,
            draft_lengths=_unread_length(block, self._device),
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

    def settle(self, block: Block, notes: Sequence[float]) -> Verdict:
        """Take the rejected tokens back, and note what is still to be fed; returns the verdict that `notes` hold."""
        num_accepted, following = map(int, notes[:2])
        width = block.width
        if isinstance(block, UnreadBlock):
            block.read(notes[2:])
            if block.ended and num_accepted == len(block):
                following = -1
        self.sequence.rollback(width - num_accepted)
        next_token = [following] if following >= 0 else []
        final = [*block.token_ids[:num_accepted], *next_token]
        if self._processed is not None:
            self._processed.append(on_device([final], self._device, torch.long))
        if self.judgements is not None:
            for rows in (self.judgements.logits, self.judgements.scores):
                rows[-1] = rows[-1][: len(final)]
        self._pending = next_token
        self._next_logits = None if next_token else self._last_logits
        self._last_logits = None
        return Verdict(num_accepted, following)


def _unread_length(block: Block, device: torch.device) -> Tensor | None:
    return block.record[:1].to(device).long() if isinstance(block, UnreadBlock) else None


def _in_vocabulary(draft_logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """The drafter's logits [1, K, V'] over the verifier's V columns, and their logsumexp where columns were cut."""
    missing = vocab_size - draft_logits.shape[-1]
    if missing >= 0:
        return nn.functional.pad(draft_logits, (0, missing), value=-torch.inf), None
    return draft_logits[..., :vocab_size], ops.token_stats(draft_logits).logsumexp
