"""Uncertainty-guided speculative decoding (arXiv 2603.11397): draft, gate, verify, roll back."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ugsd_fast.audio import load_audio
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.decoding.drafter import EMPTY_BLOCK, DraftBlock, Drafter, draft_blocks
from ugsd_fast.decoding.processors import NO_STEERING, LogitsProcessors, Processed, Steering, Stopping
from ugsd_fast.decoding.request import Request
from ugsd_fast.decoding.streaming import Streamer, stream_to
from ugsd_fast.decoding.trace import StreamEvent
from ugsd_fast.decoding.translation import TranslatingDrafter, draft_translated, translation_between
from ugsd_fast.decoding.verification import VerifyCall, verify_ahead, verify_calls
from ugsd_fast.errors import VerifierUnavailable
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

        Returns
        -------
        Result or list of Result
            A list for a list of inputs.

        Raises
        ------
        ValueError
            If a logits processor or stopping criterion cannot be honoured, which the message names.
        AudioError, ModelError
            If an input cannot be read or prepared.
        VerifierUnavailable
            If the verifier fails under ``on_verifier_failure="raise"``.
        """
        if max_batch_size < 1:
            raise ValueError(f"Decoder: max_batch_size is {max_batch_size}, expected an integer >= 1")
        given = {"audio": audio, "prompt": prompt, "inputs": inputs, "verifier_inputs": verifier_inputs}
        lists = [value for name, value in given.items() if isinstance(value, list) and name != "prompt"]
        count = len(lists[0]) if lists else None
        if streamer is not None and lists:
            raise ValueError(f"Decoder: streamer is given with a list of {count}, expected one input")
        steering = Steering(logits_processor, stopping_criteria, streamer).check(1 if count is None else count)
        columns = [_column(name, value, count) for name, value in given.items()]
        arrivals = (
            self._open(clip, text, draft_inputs, judge_inputs, max_new_tokens, row, steering, streams=False)
            for row, (clip, text, draft_inputs, judge_inputs) in enumerate(zip(*columns, strict=True))
        )
        if streamer is not None:
            return stream_to(streamer, (event for _, event in self._run(arrivals, 1)))
        # A draft graph has addresses of its own for one request.
        room = 1 if self.config.graph else max_batch_size
        results = {request.row: request.result for request, event in self._run(arrivals, room) if event.result}
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
        request = self._open(audio, prompt, inputs, verifier_inputs, max_new_tokens, 0, steering)
        return (event for _, event in self._run(iter([request]), 1))

    def _run(self, arrivals: Iterator[Request], room: int) -> Iterator[tuple[Request, StreamEvent]]:
        """The loop itself: a block of each of `room` requests at a time; the next takes the place of one that ends."""
        requests: list[Request] = []
        try:
            while True:
                requests.extend(islice(arrivals, room - len(requests)))
                if not requests:
                    return
                clock = time.perf_counter()
                blocks = self._draft(requests)
                drafted = time.perf_counter()
                verdicts = self._verify(requests, blocks)
                times = {"draft_seconds": drafted - clock, "verify_seconds": time.perf_counter() - drafted}
                for request, block, verdict in zip(requests, blocks, verdicts, strict=True):
                    yield request, request.settle(block, verdict, **times)
                self._release([request for request in requests if request.result])
                requests = [request for request in requests if not request.result]
        finally:
            self._release(requests)

    def _draft(self, requests: Sequence[Request]) -> Sequence[DraftBlock]:
        """A block of every request; those of ordinary drafters step together."""
        drafters = [request.drafter for request in requests]
        if self.draft is None:
            return [EMPTY_BLOCK] * len(requests)
        lengths = [request.next_length() for request in requests]
        if all(isinstance(drafter, Drafter) and not drafter.buffer for drafter in drafters):
            return draft_blocks(cast(list[Drafter], drafters), lengths)
        if self._translation is not None:
            return draft_translated(cast(list[TranslatingDrafter], drafters), lengths)
        return [drafter.draft(length) for drafter, length in zip(drafters, lengths, strict=True) if drafter]

    def _verify(self, requests: Sequence[Request], blocks: Sequence[DraftBlock]) -> list[Verdict | None]:
        """The verifier's verdicts; None where it is not asked, or failed and the draft is to stand."""
        verdicts: list[Verdict | None] = [None] * len(requests)
        pending = {
            index: VerifyCall(request.session, request.unseen, block, request.wants_bonus(block))
            for index, (request, block) in enumerate(zip(requests, blocks, strict=True))
            if request.session is not None and request.escalates(block)
        }
        delay = _FIRST_RETRY
        while pending:
            assert self.verifier is not None
            answers = self._ask(list(pending.values()), [requests[index] for index in pending])
            for index, answer in zip(list(pending), answers, strict=True):
                if not isinstance(answer, VerifierUnavailable):
                    verdicts[index] = answer
                elif self.config.on_verifier_failure == "raise" or not len(blocks[index]):
                    raise answer
                elif self.config.on_verifier_failure == "wait":
                    continue
                del pending[index]
            if pending:
                time.sleep(delay)
                delay = min(2 * delay, _LONGEST_RETRY)
        return verdicts

    def _ask(self, calls: list[VerifyCall], requests: list[Request]) -> list[Verdict | VerifierUnavailable]:
        drafters = [request.drafter for request in requests]
        for drafter in drafters:
            if isinstance(drafter, Drafter):
                drafter.on_escalation = None
        ahead = self.config.ahead and all(isinstance(drafter, Drafter) for drafter in drafters)
        if not ahead or not all(hasattr(call.session, "submit") for call in calls):
            return verify_calls(self.verifier, calls)
        rooms = [min(self.config.ahead, request.room - len(call.block)) for request, call in zip(requests, calls)]
        return verify_ahead(calls, cast(list[Drafter], drafters), rooms)

    def _release(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.close()
            if isinstance(request.drafter, DraftGraph):
                self._idle_graphs.append(request.drafter)

    def _open(
        self,
        audio: Any,
        prompt: str | None,
        inputs: Mapping[str, Tensor] | None,
        verifier_inputs: Mapping[str, Tensor] | None,
        max_new_tokens: int,
        row: int = 0,
        steering: Steering = NO_STEERING,
        streams: bool = True,
    ) -> Request:
        if (audio is None) == (inputs is None and verifier_inputs is None):
            raise ValueError("Decoder: got both or neither of audio and prepared inputs, expected one of them")
        if max_new_tokens < 1:
            raise ValueError(f"Decoder: max_new_tokens is {max_new_tokens}, expected an integer >= 1")
        started = time.perf_counter()
        if audio is not None:
            limits = [side.max_audio_seconds for side in (self.draft, self.verifier) if side is not None]
            audio = load_audio(audio, max_seconds=min((limit for limit in limits if limit is not None), default=None))
        config = self.config.of_row(row)
        if audio is not None and self.draft is not None:
            inputs = self.draft.prepare(audio, prompt)
        processors = stopping = None
        if steering != NO_STEERING:
            model, heard = self._steered(steering, audio, prompt, inputs, verifier_inputs)
            ids = model.prompt_ids(heard).to(model.device)
            processors = steering.processors(model.model, ids, row)
            stopping = Stopping(steering.stopping_criteria, ids) if steering.stopping_criteria else None
            if steering.streamer is not None:
                steering.streamer.put(ids.cpu())
            if model is not self.draft:
                verifier_inputs = heard  # prepared already
        drafter = self._open_drafter(inputs, max_new_tokens, config)
        if processors is not None and isinstance(drafter, Drafter):
            drafter.processed = Processed(processors, ids.to(drafter.pending.device), vocab_size=model.vocab_size)
        session = self._open_verifier(audio, prompt, verifier_inputs, config, processors)
        begin = getattr(session, "begin", None)
        if begin is not None and config.always_escalate:
            begin()
        elif isinstance(drafter, Drafter):
            drafter.on_escalation = begin
        return Request(
            drafter,
            session,
            config,
            row=row,
            eos_token_ids=self.eos_token_ids,
            max_new_tokens=max_new_tokens,
            decode=self._decode_text,
            started=started,
            stopping=stopping,
            streams=streams,
        )

    def _steered(
        self,
        steering: Steering,
        audio: Any,
        prompt: str | None,
        inputs: Mapping[str, Tensor] | None,
        verifier_inputs: Mapping[str, Tensor] | None,
    ) -> tuple[AudioLM, Mapping[str, Tensor]]:
        """The model whose prompt is the prefix of processors and criteria, and its prepared inputs."""
        judge: AudioLM | None = getattr(self.verifier, "model", None)
        if steering.logits_processor is not None:
            if self.config.graph or self._translation is not None:
                what = "graph=True" if self.config.graph else "models with different tokenizers"
                raise ValueError(f"Decoder: logits_processor is given with {what}, expected None there")
            if self.verifier is not None and judge is None:
                raise ValueError(
                    f"Decoder: logits_processor is given with a {type(self.verifier).__name__}, expected a verifier in "
                    "this process (Python objects do not cross the network)"
                )
        if judge is None:
            if self.draft is None or inputs is None:
                raise ValueError(
                    "Decoder: stopping_criteria or a streamer are given, expected a model in this process or its inputs"
                )
            return self.draft, inputs
        if verifier_inputs is None and audio is not None:
            verifier_inputs = judge.prepare(audio, prompt)
        if verifier_inputs is None:
            raise ValueError(NO_VERIFIER_INPUTS)
        return judge, verifier_inputs

    def reseeded(self, seed: int) -> Decoder:
        """The same models and settings with another `UGSDConfig.seed`."""
        other = copy.copy(self)
        other.config = replace(self.config, seed=seed)
        other._idle_graphs = []  # theirs have the old one
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

    def _open_drafter(
        self, inputs: Mapping[str, Tensor] | None, max_new_tokens: int, config: UGSDConfig
    ) -> Drafter | DraftGraph | TranslatingDrafter | None:
        if self.draft is None:
            return None
        if inputs is None:
            raise ValueError("Decoder: inputs is None, expected prepared inputs for the drafter beside verifier_inputs")
        prepared = dict(inputs)
        if self.config.graph:
            self.draft.check_placeholders(prepared)
            prepared = self.draft.to_device(prepared)
            return self._graph_of(prepared["input_ids"].shape[1] + max_new_tokens).start(prepared)
        translation = self._translation
        drafter = Drafter(
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
        self,
        audio: Any,
        prompt: str | None,
        inputs: Mapping[str, Tensor] | None,
        config: UGSDConfig,
        processors: LogitsProcessorList | None,
    ) -> VerifierSession | None:
        if self.verifier is None:
            return None
        if audio is None and inputs is None:
            raise ValueError(NO_VERIFIER_INPUTS)
        steered: dict[str, Any] = {} if processors is None else {"logits_processor": processors}
        return self.verifier.open(config, audio=audio, prompt=prompt, inputs=inputs, **steered)


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
