"""Uncertainty-guided speculative decoding (arXiv 2603.11397): draft, gate, verify, roll back."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ugsd_fast.audio import load_audio
from ugsd_fast.decoding.ahead import AheadDrafter
from ugsd_fast.decoding.block import EMPTY_BLOCK, Block, UnreadBlock
from ugsd_fast.decoding.block_length import Costs
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.decoding.drafter import Drafter, draft_blocks, draft_unread
from ugsd_fast.decoding.processors import NO_STEERING, LogitsProcessors, Processed, Steering, Stopping
from ugsd_fast.decoding.request import Given, Request, name_rows
from ugsd_fast.decoding.streaming import Streamer, stream_to
from ugsd_fast.decoding.trace import Result, StreamEvent
from ugsd_fast.decoding.translation import TranslatingDrafter, draft_translated, translation_between
from ugsd_fast.decoding.unread import PendingVerdict, read_together
from ugsd_fast.decoding.verification import VerifyCall, verify_ahead, verify_calls
from ugsd_fast.errors import VerifierUnavailable, attempt
from ugsd_fast.models import AudioLM
from ugsd_fast.models.static_sequence import check_replayable

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verdict, Verifier, VerifierSession

NO_VERIFIER_INPUTS = (
    "Decoder: verifier_inputs is None, expected prepared inputs for the verifier beside inputs "
    "(the two models never share inputs: each has its own processor and prompt)"
)
_FIRST_RETRY, _LONGEST_RETRY = 0.05, 5.0  # seconds


class Decoder:
    """Captions audio with an edge model that drafts and a verifier that judges uncertain blocks.

    Parameters
    ----------
    draft : AudioLM or None
        The edge model; None lets the verifier decode alone.
    verifier : LocalVerifier, RemoteVerifier or None
        Who judges; None keeps every draft (edge-only).
    config : UGSDConfig, optional
        The paper's settings by default.

    Raises
    ------
    ValueError
        If neither model is given.
    ModelError
        If ``config.graph`` is set and the drafter's steps cannot be replayed.
    VocabularyMismatchError
        If the two models have different tokenizers, and ``rule`` ("exact", "block") or ``graph`` need them to be one.

    Notes
    -----
    The local acceptance of a certain block is lossy by design: no verifier has seen it. The output is the verifier's
    own only under ``always_escalate=True`` with a lossless rule (``config.lossless``).

    Examples
    --------
    >>> from ugsd_fast.demo import clips, load_pair
    >>> pair = load_pair()
    >>> decoder = Decoder(pair.draft, pair.verifier, pair.config)
    >>> result = decoder.generate(clips()[0].path, prompt=pair.prompt)
    >>> len(result.text) > 0
    True
    """

    def __init__(self, draft: AudioLM | None, verifier: Verifier | None, config: UGSDConfig | None = None):
        if draft is None and verifier is None:
            raise ValueError("Decoder: draft and verifier are both None, expected at least one of them")
        self.draft = draft
        self.verifier = verifier
        self.config = config or UGSDConfig()
        self._translation = None
        if draft is not None and verifier is not None:
            self._translation = translation_between(draft, verifier, self.config, self.eos_token_ids)
        if self.config.graph and draft is not None:
            check_replayable(draft.model, draft.family)
        self._idle_graphs: list[DraftGraph] = []
        self._costs = Costs()

    def generate(
        self,
        audio: Any = None,
        *,
        prompt: str | list[str] | None = None,
        inputs: Mapping[str, Tensor] | list[Mapping[str, Tensor]] | None = None,
        verifier_inputs: Mapping[str, Tensor] | list[Mapping[str, Tensor]] | None = None,
        max_new_tokens: int = 128,
        max_batch_size: int = 16,
        logits_processor: LogitsProcessors | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Streamer | None = None,
        return_exceptions: bool = False,
    ) -> Any:
        """Caption one input, or each of a list.

        The requests of a list share their forward passes: one a draft step for all that draft, one for all whose block
        is verified. Each has gate, acceptance, rollback and end of its own; one that ends leaves, and the next joins.

        Parameters
        ----------
        audio : path, (array, rate), Audio, or a list of them
            Each model prepares it with its own processor.
        prompt : str or list of str, optional
            The instruction, given to both models through their own chat templates; for a list of inputs, one for all
            or one for each.
        inputs, verifier_inputs : mapping of str to Tensor, or list of mappings, optional
            Prepared model inputs (``input_ids`` [1, P], audio tensors …) instead of `audio`, for drafter and verifier
            apart: the two never share inputs. One that is None in the decoder needs none.
        max_new_tokens : int
            Most tokens a caption may have.
        max_batch_size : int
            Requests of a list that are decoded at the same time.
        logits_processor : LogitsProcessorList or "generation_config", optional
            transformers' processors, applied to both models' scores with the verifier's prompt and the generated tokens
            as prefix (the drafter's prompt, where there is no verifier in this process). ``"generation_config"`` stands
            for those that the verifier's own ``generate`` would apply: suppressed tokens, penalties, lengths.
        stopping_criteria : StoppingCriteriaList, optional
            Asked after each token that is final; the caption ends behind the first that one says yes to.
        streamer : transformers.TextStreamer or its like, optional
            Is given the prompt (the verifier's, or the drafter's where there is no verifier in this process), then
            tokens as they become final. For one input only.
        return_exceptions : bool
            What becomes of an input of a list that cannot be captioned. False: the first error is raised, with a note
            that names the row, and the others end with it. True: the error takes the place of its result, as with
            `asyncio.gather`, and the others go on. One that a forward pass of several requests raises ends all of them.

        Returns
        -------
        Result or list of Result
            A list for a list of inputs; with ``return_exceptions`` an exception in each place that has no result.

        Raises
        ------
        ValueError
            If a logits processor or stopping criterion cannot be honoured, which the message names.
        AudioError, ModelError
            If an input cannot be read or prepared.
        VerifierUnavailable
            If the verifier fails under ``on_verifier_failure="raise"``.

        Examples
        --------
        >>> from ugsd_fast.demo import clips, load_pair
        >>> pair = load_pair()
        >>> decoder = Decoder(pair.draft, pair.verifier, pair.config)
        >>> captioned, failed = decoder.generate([clips()[0].path, "none.wav"], return_exceptions=True)
        >>> failed
        AudioError('none.wav: no such file')
        """
        if max_batch_size < 1:
            raise ValueError(f"Decoder: max_batch_size is {max_batch_size}, expected an integer >= 1")
        given = {"audio": audio, "prompt": prompt, "inputs": inputs, "verifier_inputs": verifier_inputs}
        lists = [value for name, value in given.items() if isinstance(value, list) and name != "prompt"]
        count = len(lists[0]) if lists else None
        if streamer is not None and lists:
            raise ValueError(f"Decoder: streamer is given with a list of {count}, expected one input")
        if return_exceptions and not lists:
            raise ValueError("Decoder: return_exceptions is given with one input, expected a list of them")
        steering = Steering(logits_processor, stopping_criteria, streamer).check(1 if count is None else count)
        columns = [_column(name, value, count) for name, value in given.items()]
        arrivals = (
            Given(clip, text, draft_inputs, judge_inputs, max_new_tokens, steering, row, count, streams=False)
            for row, (clip, text, draft_inputs, judge_inputs) in enumerate(zip(*columns, strict=True))
        )
        if streamer is not None:
            return stream_to(streamer, (event for event in self._events(next(arrivals)) if event is not None))
        # A draft graph has addresses of its own for one request.
        room = 1 if self.config.graph else max_batch_size
        results: dict[int, Result | Exception] = {}
        with closing(self._run([], arrivals, room)) as outcomes:
            for row, outcome in outcomes:
                if not isinstance(outcome, Exception):
                    if outcome.result is not None:
                        results[row] = outcome.result
                elif return_exceptions:
                    results[row] = outcome
                else:
                    raise outcome
        for result in results.values():
            if isinstance(result, Exception):
                traceback.clear_frames(result.__traceback__)  # they hold the caches of every request of that round
        return [results[row] for row in range(len(results))] if lists else results[0]

    def stream(
        self,
        audio: Any = None,
        *,
        prompt: str | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        verifier_inputs: Mapping[str, Tensor] | None = None,
        max_new_tokens: int = 128,
        logits_processor: LogitsProcessors | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> Iterator[StreamEvent]:
        """Caption one input, yielding text as it becomes final; the last event carries the `Result`.

        Takes what `generate` takes, but one input only.
        """
        steering = Steering(logits_processor, stopping_criteria).check(1)
        given = Given(audio, prompt, inputs, verifier_inputs, max_new_tokens, steering)
        events = self._events(given)
        next(events)
        return cast(Iterator[StreamEvent], events)

    def _events(self, given: Given) -> Iterator[StreamEvent | None]:
        """What happens to one request, whose error is raised; first of all None, once it is open.

        Whoever lets go of the iterator, before its first event even, closes the request.
        """
        requests = [self._open(given)]
        try:
            yield None
            for _, outcome in self._run(requests, iter(()), 1):
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            for request in list(requests):
                self._end(request, requests)

    def _run(
        self, requests: list[Request], arrivals: Iterator[Given], room: int
    ) -> Generator[tuple[int, StreamEvent | Exception]]:
        """The loop itself: a block of each of `room` requests at a time; the next takes the place of one that ends.

        Yields what becomes of each row, block by block; an error ends its row and no other.
        """
        try:
            while True:
                while len(requests) < room and (given := next(arrivals, None)) is not None:
                    opened = attempt(self._open, given)
                    if isinstance(opened, Exception):
                        name_rows([given], [opened])
                        yield given.row, opened
                    else:
                        requests.append(opened)
                if not requests:
                    return
                clock = time.perf_counter()
                drafts = yield from self._read_pending(requests, self._draft(requests))
                drafted = time.perf_counter()
                for request, draft in zip(list(requests), drafts, strict=True):
                    if isinstance(draft, Exception):
                        yield request.given.row, draft
                        self._end(request, requests)
                blocks = [draft for draft in drafts if not isinstance(draft, Exception)]
                verdicts = self._verify(requests, blocks)
                times = {"draft_seconds": drafted - clock, "verify_seconds": time.perf_counter() - drafted}
                settling = []
                for request, block, verdict in zip(requests, blocks, verdicts, strict=True):
                    if not isinstance(verdict, PendingVerdict):
                        settling.append((request, attempt(request.settle, block, verdict, **times)))
                    elif (error := attempt(request.defer, verdict, **times)) is not None:
                        settling.append((request, error))
                yield from self._settled(requests, settling)
        finally:
            for request in list(requests):
                self._end(request, requests)

    def _settled(
        self, requests: list[Request], outcomes: Sequence[tuple[Request, StreamEvent | Exception]]
    ) -> Iterator[tuple[int, StreamEvent | Exception]]:
        name_rows([request.given for request, _ in outcomes], [outcome for _, outcome in outcomes])
        for request, outcome in outcomes:
            yield request.given.row, outcome
            if isinstance(outcome, Exception) or outcome.result:
                self._end(request, requests)

    def _read_pending(
        self, requests: list[Request], drafts: Sequence[Block | Exception]
    ) -> Generator[tuple[int, StreamEvent | Exception], None, Sequence[Block | Exception]]:
        """Read the verdicts that are pending with the blocks behind them; returns those of requests that go on."""
        waiting = [request for request in requests if request.pending is not None]
        if not waiting:
            return drafts
        rows = list(requests)
        unread = cast(Sequence[UnreadBlock | Exception], drafts)
        pending = [cast(PendingVerdict, request.pending) for request in waiting]
        read = attempt(read_together, pending, unread)
        if isinstance(read, Exception):  # of the device, say
            yield from self._settled(requests, [(request, read) for request in rows])
            return []
        verdicts, blocks = read
        outcomes = [
            attempt(request.settle_pending, verdict) for request, verdict in zip(waiting, verdicts, strict=True)
        ]
        failed = [None if new is old else new for new, old in zip(blocks, drafts, strict=True)]  # not named before
        name_rows([request.given for request in rows], failed)
        yield from self._settled(requests, list(zip(waiting, outcomes, strict=True)))
        return [block for request, block in zip(rows, blocks, strict=True) if request in requests]

    def _draft(self, requests: Sequence[Request]) -> Sequence[Block | Exception]:
        """A block of every request, or the error that ends it; those of ordinary drafters step together."""
        if self.draft is None:
            return [EMPTY_BLOCK] * len(requests)
        drafters: list[Any] = [request.drafter for request in requests]
        lengths = [request.next_length() for request in requests]
        blocks: Sequence[Block | Exception] | Exception
        unread = any(request.pending for request in requests)
        unread |= self.config.always_escalate and getattr(self.verifier, "reads_blocks", False)
        if all(isinstance(drafter, Drafter) and not drafter.begun for drafter in drafters):
            blocks = attempt(draft_unread if unread else draft_blocks, drafters, lengths)
        elif self._translation is not None:
            blocks = attempt(draft_translated, drafters, lengths)
        else:
            drafts = [one.draft_unread if unread and isinstance(one, DraftGraph) else one.draft for one in drafters]
            blocks = [attempt(draft, length) for draft, length in zip(drafts, lengths, strict=True)]
        blocks = [blocks] * len(requests) if isinstance(blocks, Exception) else blocks
        name_rows([request.given for request in requests], blocks)
        return blocks

    def _verify(
        self, requests: Sequence[Request], blocks: Sequence[Block]
    ) -> list[Verdict | PendingVerdict | Exception | None]:
        """The verifier's verdicts or errors; None where it is not asked, or failed and the draft is to stand."""
        verdicts: list[Verdict | PendingVerdict | Exception | None] = [None] * len(requests)
        pending = {
            index: VerifyCall(request.session, request.unseen, block, request.wants_bonus(block))
            for index, (request, block) in enumerate(zip(requests, blocks, strict=True))
            if request.session is not None and request.escalates(block)
        }
        delay = _FIRST_RETRY
        while pending:
            assert self.verifier is not None
            answers = attempt(self._ask, list(pending.values()), [requests[index] for index in pending])
            answers = [answers] * len(pending) if isinstance(answers, Exception) else answers
            for index, answer in zip(list(pending), answers, strict=True):
                policy = self.config.on_verifier_failure if blocks[index].width else "raise"
                if not isinstance(answer, VerifierUnavailable) or policy == "raise":
                    verdicts[index] = answer
                elif policy == "wait":
                    continue
                del pending[index]
            if pending:
                time.sleep(delay)
                delay = min(2 * delay, _LONGEST_RETRY)
        return verdicts

    def _ask(self, calls: list[VerifyCall], requests: list[Request]) -> Sequence[Verdict | PendingVerdict | Exception]:
        drafters = [request.drafter for request in requests]
        for drafter in drafters:
            if isinstance(drafter, Drafter):
                drafter.on_escalation = None
        verifier: Any = self.verifier
        deferred = all(request.may_defer(call.block) for request, call in zip(requests, calls))
        if deferred and hasattr(verifier, "launch") and verifier.can_launch(calls):
            return verifier.launch(calls)
        ahead = all(isinstance(drafter, AheadDrafter) for drafter in drafters)
        if not ahead or not all(hasattr(call.session, "submit") for call in calls):
            return verify_calls(self.verifier, calls)
        rooms = [min(self.config.ahead, request.room - len(call.block)) for request, call in zip(requests, calls)]
        return verify_ahead(calls, cast(list[AheadDrafter], drafters), rooms)

    def _end(self, request: Request, requests: list[Request]) -> None:
        requests.remove(request)
        request.close()
        if isinstance(request.drafter, DraftGraph):
            self._idle_graphs.append(request.drafter)

    def _open(self, given: Given) -> Request:
        if (given.audio is None) == (given.inputs is None and given.verifier_inputs is None):
            raise ValueError("Decoder: got both or neither of audio and prepared inputs, expected one of them")
        if given.max_new_tokens < 1:
            raise ValueError(f"Decoder: max_new_tokens is {given.max_new_tokens}, expected an integer >= 1")
        started = time.perf_counter()
        if given.audio is not None:
            limits = [side.max_audio_seconds for side in (self.draft, self.verifier) if side is not None]
            longest = min((limit for limit in limits if limit is not None), default=None)
            given = replace(given, audio=load_audio(given.audio, max_seconds=longest))
            if self.draft is not None:
                given = replace(given, inputs=self.draft.prepare(given.audio, given.prompt))
        config = self.config.of_row(given.row)
        processors = stopping = None
        steering = given.steering
        if steering != NO_STEERING:
            model, heard = self._steered(given)
            ids = model.prompt_ids(heard).to(model.device)
            processors = steering.processors(model.model, ids, given.row)
            stopping = Stopping(steering.stopping_criteria, ids) if steering.stopping_criteria else None
            if steering.streamer is not None:
                steering.streamer.put(ids.cpu())
            if model is not self.draft:
                given = replace(given, verifier_inputs=heard)  # prepared already
        drafter = self._open_drafter(given, config)
        if processors is not None and isinstance(drafter, Drafter):
            drafter.processed = Processed(processors, ids.to(drafter.pending.device), vocab_size=model.vocab_size)
        session = self._open_verifier(given, config, processors)
        begin = getattr(session, "begin", None)
        if begin is not None and config.always_escalate:
            begin()
        elif isinstance(drafter, Drafter):
            drafter.on_escalation = begin
        return Request(
            drafter,
            session,
            config,
            given,
            eos_token_ids=self.eos_token_ids,
            decode=self._decode_text,
            started=started,
            stopping=stopping,
            costs=self._costs,
        )

    def _steered(self, given: Given) -> tuple[AudioLM, Mapping[str, Tensor]]:
        """The model whose prompt is the prefix of processors and criteria, and its prepared inputs."""
        judge: AudioLM | None = getattr(self.verifier, "model", None)
        if given.steering.logits_processor is not None:
            if self.config.graph or self._translation is not None:
                what = "graph=True" if self.config.graph else "models with different tokenizers"
                raise ValueError(f"Decoder: logits_processor is given with {what}, expected None there")
            if self.verifier is not None and judge is None:
                raise ValueError(
                    f"Decoder: logits_processor is given with a {type(self.verifier).__name__}, expected a verifier in "
                    "this process (Python objects do not cross the network)"
                )
        if judge is None:
            if self.draft is None or given.inputs is None:
                raise ValueError(
                    "Decoder: stopping_criteria or a streamer are given, expected a model in this process or its inputs"
                )
            return self.draft, given.inputs
        if given.verifier_inputs is not None:
            return judge, given.verifier_inputs
        if given.audio is None:
            raise ValueError(NO_VERIFIER_INPUTS)
        return judge, judge.prepare(given.audio, given.prompt)

    def reseeded(self, seed: int) -> Decoder:
        """The same models and settings with another `UGSDConfig.seed`."""
        other = copy.copy(self)
        other.config = replace(self.config, seed=seed)
        other._idle_graphs = []  # theirs have the old one
        other._costs = Costs()
        return other

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a caption: the config's, or else the verifier's (the drafter's, if there is none)."""
        if self.config.eos_token_ids is not None:
            return self.config.eos_token_ids
        if self.verifier is None:
            assert self.draft is not None
            return self.draft.eos_token_ids
        try:
            return self.verifier.eos_token_ids
        except VerifierUnavailable:
            if self.draft is None or self.config.on_verifier_failure != "accept":
                raise
            return self.draft.eos_token_ids  # the edge begins alone

    def _decode_text(self, tokens: Sequence[int]) -> str:
        side = self.verifier if self._translation else self.draft or self.verifier
        return side.decode(tokens)  # type: ignore[union-attr]

    def _open_drafter(self, given: Given, config: UGSDConfig) -> Drafter | DraftGraph | TranslatingDrafter | None:
        if self.draft is None:
            return None
        if given.inputs is None:
            raise ValueError("Decoder: inputs is None, expected prepared inputs for the drafter beside verifier_inputs")
        prepared = dict(given.inputs)
        if self.config.graph:
            self.draft.check_placeholders(prepared)
            prepared = self.draft.to_device(prepared)
            return self._graph_of(prepared["input_ids"].shape[1] + given.max_new_tokens).start(prepared)
        translation = self._translation
        drafter = (AheadDrafter if config.ahead else Drafter)(
            self.draft.open(prepared),
            config,
            eos_token_ids=translation.drafter.ends if translation else self.eos_token_ids,
            vocab_size=self.draft.vocab_size,
            device=self.draft.device,
        )
        return TranslatingDrafter(drafter, translation) if translation else drafter

    def _graph_of(self, capacity: int) -> DraftGraph:
        """A draft graph that nobody uses and that holds as many tokens, the smallest there is."""
        fitting = [graph for graph in self._idle_graphs if graph.capacity >= capacity]
        if fitting:
            graph = min(fitting, key=lambda graph: graph.capacity)
            self._idle_graphs.remove(graph)
            return graph
        assert self.draft is not None
        return DraftGraph(self.draft, self.config, eos_token_ids=self.eos_token_ids, capacity=capacity)

    def _open_verifier(
        self, given: Given, config: UGSDConfig, processors: LogitsProcessorList | None
    ) -> VerifierSession | None:
        if self.verifier is None:
            return None
        if given.audio is None and given.verifier_inputs is None:
            raise ValueError(NO_VERIFIER_INPUTS)
        steered: dict[str, Any] = {} if processors is None else {"logits_processor": processors}
        heard: dict[str, Any] = {"audio": given.audio, "prompt": given.prompt, "inputs": given.verifier_inputs}
        return self.verifier.open(config, **heard, **steered)


def _column(name: str, value: Any, count: int | None) -> list[Any]:
    """One value for each of `count` requests; None stands for one request, not in a list."""
    if isinstance(value, list):
        if len(value) != count:
            expected = "one input's" if count is None else f"{count} (one for each input)"
            raise ValueError(f"Decoder: {name} is a list of {len(value)}, expected {expected}")
        return value
    if count is not None and value is not None and name != "prompt":
        raise ValueError(f"Decoder: {name} is a {type(value).__name__}, expected a list of {count} like the others")
    return [value] * (1 if count is None else count)
