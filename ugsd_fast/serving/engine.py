"""A model as the verifier of many sessions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.block import Block, DraftBlock
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.decoding.vocabulary import fingerprint
from ugsd_fast.errors import ModelError, UGSDError
from ugsd_fast.models import AudioLM
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.sequence import CachedSequence
from ugsd_fast.serving import protocol
from ugsd_fast.serving.front_end import PromptMaker
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.memory import CacheMemory
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
    on_rebuild : callable
        Called when an evicted cache is computed again.

    Attributes
    ----------
    prompt_length : int
        Positions of the prompt, those of the audio included.
    """

    def __init__(self, model: AudioLM, inputs: dict[str, Tensor], config: UGSDConfig, on_rebuild: Callable[[], None]):
        super().__init__(model, lambda: dict(inputs), config)
        self.inputs = inputs
        embeddings = inputs.get("inputs_embeds")
        self.prompt_length = (model.prompt_ids(inputs) if embeddings is None else embeddings).shape[1]
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
    def remaining(self) -> int:
        """Positions of the prompt that are not in the cache yet."""
        if self._sequence is None:
            return self.prompt_length
        return 0 if self.ready else self.prompt_length - self._sequence.length

    def shares(self, positions: int) -> bool:
        """Whether the prompt can be computed in one forward with others."""
        return self._sequence is None and "inputs_embeds" not in self.inputs and self.prompt_length <= positions

    def begin(self) -> CachedSequence:
        """The sequence of a prompt that is to be computed in one piece."""
        assert self._prepare is not None
        if self._was_ready:
            self._on_rebuild()
        self._sequence = self._model.open(self._prepare())
        return self._sequence

    def heard(self, logits: Tensor) -> None:
        """Note the logits [1, 1, V] behind the prompt."""
        self._prompt_logits = logits
        self._was_ready = True

    @torch.inference_mode()
    def advance(self, positions: int) -> None:
        """Compute a piece of the prompt; the first one hears the audio."""
        if self._prepare is None or self.ready:
            return
        if self._sequence is None and not self.shares(positions):
            embeddings = self.inputs.get("inputs_embeds")
            family = self._model.family
            if embeddings is None and (family is None or not family.is_encoder_decoder):
                kwargs = family.forward_kwargs if family is not None else {}
                embeddings = prompt_embeddings(self._model.model, self.inputs, kwargs)
            if embeddings is not None:
                if self._was_ready:
                    self._on_rebuild()
                self._sequence = StagedSequence(self._model.model, embeddings, family)
        if isinstance(self._sequence, StagedSequence):
            logits = self._sequence.advance(positions)
        else:  # in one piece
            logits = self.begin().forward(torch.zeros(1, 0, dtype=torch.long, device=self._device), keep=1)
        if logits is not None:
            self.heard(logits)

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
        possible = self._maker.levels
        wanted = [level for level in possible if level != "embeddings"] if uplinks is None else list(uplinks)
        refused = [level for level in wanted if level not in possible]
        if refused or not wanted:
            raise ModelError(
                f"serve: {name} cannot take uplink level {', '.join(refused) or '(none chosen)'}, expected of "
                f"{', '.join(possible) or f'no level: {self._maker.reason}'}"
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
        self._preparing = ThreadPoolExecutor(1, "ugsd-prepare")
        self._scheduler = Scheduler(BatchJudge(LocalVerifier(model)), self.limits, self.metrics)
        self._closed = False

    async def prepare(self, request: protocol.Open) -> ServedSession:
        """A session's state; its prompt is computed in the background."""
        if self._closed:
            raise Refusal("unknown_session", "the server is closing")
        rules = request.rules
        try:
            config = UGSDConfig(**{name: getattr(rules, name) for name in rules.__struct_fields__})  # type: ignore[arg-type]
            loop = asyncio.get_running_loop()
            inputs = await loop.run_in_executor(self._preparing, self._maker.prepare, request)
        except protocol.BadFrame as error:
            raise Refusal("bad_frame", str(error)) from None
        except (UGSDError, ValueError) as error:
            raise Refusal("refused", str(error)) from None
        state = ServedSession(self.audio_lm, inputs, config, self.metrics.rebuilds.inc)
        self._scheduler.add(state)  # may refuse
        return state

    async def judge(self, state: ServedSession, call: Call) -> Judged:
        """Judge a block together with those of other sessions."""
        return await asyncio.wrap_future(self._scheduler.submit(state, call))

    def release(self, state: ServedSession) -> None:
        """Free a session's cache."""
        self._scheduler.remove(state)

    def close(self) -> None:
        """Stop the model's threads."""
        self._closed = True
        self._scheduler.close()
        self._preparing.shutdown()


class BatchJudge:
    """Hears prompts and judges blocks of many `ServedSession`, several in one forward."""

    def __init__(self, verifier: LocalVerifier):
        self._verifier = verifier
        self._memory = CacheMemory(verifier.model)
        self._one_at_a_time = threading.Lock() if forwards_change(verifier.model) else nullcontext()

    def kv_bytes(self, state: Schedulable, call: Call | None = None) -> int:
        """See `scheduler.Judge`."""
        session = cast(ServedSession, state)
        prompt = session.prompt_length
        if call is None:
            return self._memory(prompt, prompt, session.inputs)
        caption = len(call.final) + len(call.draft)
        return self._memory(prompt + caption, max(prompt, caption), session.inputs)

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[tuple[Schedulable, int]]) -> list[Exception | None]:
        """See `scheduler.Judge`."""
        sessions = [cast(ServedSession, state) for state, _ in pieces]
        outcomes: list[Exception | None] = [None] * len(pieces)
        together = [session for session, (_, room) in zip(sessions, pieces, strict=True) if session.shares(room)]
        with self._one_at_a_time:
            if len(together) > 1:
                try:
                    self._prefill_packed(together)
                except Exception:  # whose fault was it?
                    for session in together:
                        session.evict()
            for index, (session, (_, positions)) in enumerate(zip(sessions, pieces, strict=True)):
                try:
                    session.advance(positions)
                except Exception as error:
                    outcomes[index] = error
        return outcomes

    def _prefill_packed(self, sessions: Sequence[ServedSession]) -> None:
        sequences = [session.begin() for session in sessions]
        none = [torch.zeros(1, 0, dtype=torch.long, device=self._verifier.model.device)] * len(sessions)
        logits = forward_packed(sequences, none, [1] * len(sessions))
        for session, row in zip(sessions, logits, strict=True):
            session.heard(row.clone()[None, None])

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
            except (UGSDError, ValueError, IndexError) as error:
                outcomes[index] = Refusal("refused", str(error))
                continue
            started.append(index)
            calls.append(VerifyCall(session, [], block, call.bonus))
        with self._one_at_a_time:
            verdicts = self._verifier.verify_batch(calls) if calls else []
        for index, prepared, verdict in zip(started, calls, verdicts, strict=True):
            if isinstance(verdict, Exception):
                outcomes[index] = Refusal("refused", str(verdict))
            else:
                outcomes[index] = prepared.session.finish(jobs[index][1], verdict)
        return cast("list[Judged | Exception]", outcomes)


def forwards_change(model: AudioLM) -> bool:
    """Whether forwards change the model itself, so that two cannot run beside each other."""
    text = model.model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, Mapping)}
    toggles = model.family is not None and model.family.toggles_adapter
    return toggles or not kinds.isdisjoint({"dynamic", "longrope"})  # these replace frequencies by length


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
