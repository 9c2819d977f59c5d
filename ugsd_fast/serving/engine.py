"""A model as the verifier of many sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.cache.growing import self_attention
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.drafter import Block, DraftBlock
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.decoding.vocabulary import fingerprint
from ugsd_fast.errors import ModelError, UGSDError
from ugsd_fast.models import AudioLM
from ugsd_fast.serving import protocol
from ugsd_fast.serving.front_end import PromptMaker
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.prefill import StagedSequence, prompt_embeddings
from ugsd_fast.serving.scheduler import Schedulable, Scheduler
from ugsd_fast.serving.sessions import Call, Judged, Refusal
from ugsd_fast.verifier.base import Verdict
from ugsd_fast.verifier.local import Feed, LocalSession, LocalVerifier


class ServedSession(LocalSession):
    """A verifier's session whose caption the caller gives with every block, and whose cache can go and come back.

    Parameters
    ----------
    model : AudioLM
        The verifier.
    inputs : dict of str to Tensor
        Of the prompt; kept, to compute the cache again after an eviction.
    config : UGSDConfig
        The acceptance rule.
    """

    def __init__(self, model: AudioLM, inputs: dict[str, Tensor], config: UGSDConfig, on_rebuild: Callable[[], None]):
        super().__init__(model, lambda: dict(inputs), config)
        self._inputs = inputs
        self._on_rebuild = on_rebuild
        self._was_ready = False
        self._cached: list[int] = []  # of the caption, in the cache
        self._prompt_logits: Tensor | None = None  # [1, 1, V]
        self._top_k = 0
        self._best: tuple[Tensor, Tensor] | None = None  # tokens and log-probabilities [K + 1, top_k]
        self.last_used = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether the prompt is in the cache."""
        return self._prompt_logits is not None

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values, as allocated."""
        return 0 if self._sequence is None else cache_bytes(self._sequence.cache)

    @torch.inference_mode()
    def advance(self, positions: int) -> int:
        """Compute a piece of the prompt; the first one hears the audio. How many positions it had."""
        if self._prepare is None or self.ready:
            return 0
        before = self._sequence.length if self._sequence is not None else 0
        if self._sequence is None:
            if self._was_ready:
                self._on_rebuild()
            family = self._model.family
            embeddings = self._inputs.get("inputs_embeds")
            if embeddings is None and not getattr(self._model.model.config, "is_encoder_decoder", False):
                embeddings = prompt_embeddings(
                    self._model.model, self._inputs, family.forward_kwargs if family is not None else {}
                )
            if embeddings is None:  # in one piece
                self._sequence = self._model.open(self._prepare())
                empty = torch.zeros(1, 0, dtype=torch.long, device=self._device)
                self._prompt_logits = self._sequence.forward(empty, keep=1)
            else:
                self._sequence = StagedSequence(self._model.model, embeddings, family)
        if isinstance(self._sequence, StagedSequence) and self._prompt_logits is None:
            self._prompt_logits = self._sequence.advance(positions)
        self._was_ready = self.ready
        assert self._sequence is not None
        return self._sequence.length - before

    def evict(self) -> None:
        """Free the cache."""
        self._sequence = self._prompt_logits = self._next_logits = self._last_logits = None
        self._cached, self._pending = [], []

    def needed(self, call: Call) -> int:
        """Tokens that the forward of `call` appends."""
        return len(call.final) + len(call.draft) - max(self._shared(call.final), 0)

    def start(self, call: Call) -> DraftBlock:
        """Have the cache hold the call's caption, all but what the next forward feeds; the block to judge."""
        shared = self._shared(call.final)
        if len(self._cached) > shared:
            self.sequence.rollback(len(self._cached) - shared)
        self._cached = self._cached[:shared]
        self._pending = list(call.final[shared:])
        self._next_logits = None if self._pending else self._prompt_logits
        self._verifications = call.draw
        self._top_k = call.top_k
        tokens = torch.tensor([list(call.draft)], dtype=torch.long).reshape(1, -1)
        return DraftBlock(tokens, _draft_logits(call, self._vocab_size), tuple(call.draft), (), 0.0, True)

    def accept(self, block: Block, feed: Feed, logits: Tensor | None, *, bonus: bool) -> ops.Acceptance:
        """As `LocalSession.accept`, with the verifier's best tokens taken down where they were asked for."""
        if self._top_k:
            known = self._next_logits if feed.keep == len(block) else None
            target = torch.cat([part for part in (known, logits) if part is not None], 1)[0]
            best = target.float().log_softmax(-1).topk(min(self._top_k, target.shape[-1]))
            self._best = best.indices, best.values
        return super().accept(block, feed, logits, bonus=bonus)

    def finish(self, call: Call, verdict: Verdict) -> Judged:
        """Note what is in the cache after the verdict."""
        self._cached = [*call.final, *call.draft[: verdict.num_accepted]]
        top: list[list[tuple[int, float]]] = []
        if self._best is not None:
            tokens, values = self._best
            top = [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
            self._best = None
        return Judged(verdict.num_accepted, verdict.next_token, top)

    def _shared(self, final: Sequence[int]) -> int:
        """Tokens of `final` that stay in the cache: its last one is fed anew, as its successor is asked for."""
        shared = 0
        for ours, theirs in zip(self._cached, final[:-1]):
            if ours != theirs:
                break
            shared += 1
        return shared


class ModelBackend:
    """An `AudioLM` behind a scheduler: the `Backend` of a server.

    Parameters
    ----------
    model : AudioLM
        The verifier.
    name : str
        What clients are told it is.
    uplinks : iterable of str, optional
        Levels to accept. By default ``none`` for a text model, ``features`` and ``audio`` for others, as far as the
        model can be served at them: ``embeddings`` only if asked for, as its clients need the model's audio encoder.
    limits : Limits, optional
        What is taken on.

    Raises
    ------
    ModelError
        If the model cannot be served at a level that was asked for.
    """

    def __init__(
        self,
        model: AudioLM,
        *,
        name: str,
        uplinks: Iterable[protocol.Uplink] | None = None,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ):
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.audio_lm = model
        self._maker = PromptMaker(model)
        possible = self._maker.possible()
        wanted = [level for level in possible if level != "embeddings"] if uplinks is None else list(uplinks)
        refused = [level for level in wanted if level not in possible]
        if refused or not wanted:
            raise ModelError(
                f"serve: {name} cannot take uplink level {', '.join(refused) or '(none chosen)'}, expected of "
                f"{', '.join(possible) or 'no level: its inputs are not prepared from audio'}"
            )
        self.model = protocol.Model(
            name=name,
            uplinks=[level for level in protocol.UPLINKS if level in wanted],
            eos=sorted(model.eos_token_ids),
            vocabulary=fingerprint(model.tokenizer),
            sampling_rate=self._maker.sampling_rate,
            max_audio_seconds=float(model.max_audio_seconds or 0.0),
            max_verify_bytes=self.limits.max_verify_bytes,
            front_end=self._maker.description if "features" in wanted else "",
        )
        self._scheduler = Scheduler(BatchJudge(LocalVerifier(model)), self.limits, self.metrics)

    async def prepare(self, request: protocol.Open) -> ServedSession:
        """A session's state; its prompt is computed in the background."""
        rules = request.rules
        try:
            config = UGSDConfig(**{name: getattr(rules, name) for name in rules.__struct_fields__})  # type: ignore[arg-type]
            inputs = await asyncio.to_thread(self._maker.prepare, request)
        except protocol.BadFrame as error:
            raise Refusal("bad_frame", str(error)) from None
        except (UGSDError, ValueError) as error:
            raise Refusal("refused", str(error)) from None
        state = ServedSession(self.audio_lm, inputs, config, self.metrics.rebuilds.inc)
        self._scheduler.add(state)
        return state

    async def judge(self, state: ServedSession, call: Call) -> Judged:
        """Judge a block together with those of other sessions."""
        return await asyncio.wrap_future(self._scheduler.submit(state, call))

    def release(self, state: ServedSession) -> None:
        """Free a session's cache."""
        self._scheduler.remove(state)

    def close(self) -> None:
        """Stop the model's thread."""
        self._scheduler.close()


class BatchJudge:
    """Judges blocks of many `ServedSession` in one forward."""

    def __init__(self, verifier: LocalVerifier):
        self._verifier = verifier

    @torch.inference_mode()
    def judge(self, jobs: Sequence[tuple[Schedulable, Call]]) -> list[Judged | Exception]:
        """See `scheduler.Judge`."""
        outcomes: list[Judged | Exception | None] = [None] * len(jobs)
        started: list[int] = []
        calls: list[VerifyCall] = []
        for index, (state, call) in enumerate(jobs):
            session = cast(ServedSession, state)
            try:
                block = session.start(call)
                session.sequence.check_room(len(call.final) + len(call.draft))
            except (UGSDError, ValueError, IndexError) as error:
                outcomes[index] = Refusal("refused", str(error))
                continue
            started.append(index)
            calls.append(VerifyCall(session, [], block, call.bonus))
        verdicts = self._verifier.verify_batch(calls) if calls else []
        for index, prepared, verdict in zip(started, calls, verdicts, strict=True):
            if isinstance(verdict, Exception):
                outcomes[index] = Refusal("refused", str(verdict))
            else:
                outcomes[index] = prepared.session.finish(jobs[index][1], verdict)
        return cast("list[Judged | Exception]", outcomes)


def cache_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a cache take."""
    total = 0
    for layer in self_attention(cache).layers:
        tensors = getattr(layer, "_storage", None) or (getattr(layer, "keys", None), getattr(layer, "values", None))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
    return total


def _draft_logits(call: Call, vocab_size: int) -> Tensor | None:
    """The drafter's logits [1, K, V] of a call; see `protocol.Verify`."""
    if not call.logits:
        return None
    logits = torch.full((1, len(call.draft), vocab_size), -torch.inf)
    data, at = call.logits, 0
    for position in range(len(call.draft)):
        count = int.from_bytes(data[at : at + 4], "little")
        ids = np.frombuffer(data, "<u4", count, at + 4)
        logits[0, position, torch.from_numpy(ids.astype(np.int64))] = torch.from_numpy(
            np.frombuffer(data, "<f4", count, at + 4 + 4 * count).copy()
        )
        at += 4 + 8 * count
    return logits
