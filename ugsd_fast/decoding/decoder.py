"""Uncertainty-guided speculative decoding (arXiv 2603.11397): draft, gate, verify, roll back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ugsd_fast.audio import load_audio
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.decoding.drafter import EMPTY_BLOCK, DraftBlock, Drafter, draft_blocks
from ugsd_fast.decoding.request import Request
from ugsd_fast.decoding.trace import StreamEvent
from ugsd_fast.decoding.verification import VerifyCall, verify_calls
from ugsd_fast.decoding.vocabulary import check_vocabularies
from ugsd_fast.errors import VerifierUnavailable
from ugsd_fast.models import AudioLM
from ugsd_fast.models.static_sequence import check_replayable

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verdict, Verifier, VerifierSession

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
        If the two models give the same token id different meanings.

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
        if draft is not None and verifier is not None:
            check_vocabularies(draft, verifier)
        self.draft = draft
        self.verifier = verifier
        self.config = config or UGSDConfig()
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

        Returns
        -------
        Result or list of Result
            A list for a list of inputs.

        Raises
        ------
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
        columns = [_column(name, value, count) for name, value in given.items()]
        arrivals = (
            self._open(clip, text, draft_inputs, judge_inputs, max_new_tokens, row)
            for row, (clip, text, draft_inputs, judge_inputs) in enumerate(zip(*columns, strict=True))
        )
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
    ) -> Iterator[StreamEvent]:
        """Caption one input, yielding text as it becomes final; the last event carries the `Result`.

        Takes what `generate` takes, but one input only.
        """
        request = self._open(audio, prompt, inputs, verifier_inputs, max_new_tokens)
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
        if all(isinstance(drafter, Drafter) for drafter in drafters):
            return draft_blocks(cast(list[Drafter], drafters), lengths)
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
            answers = verify_calls(self.verifier, list(pending.values()))
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
        return Request(
            self._open_drafter(audio, prompt, inputs, max_new_tokens, config),
            self._open_verifier(audio, prompt, verifier_inputs, config),
            config,
            row=row,
            eos_token_ids=self.eos_token_ids,
            max_new_tokens=max_new_tokens,
            decode=self._decode_text,
            started=started,
        )

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
        return (self.draft or self.verifier).decode(tokens)  # type: ignore[union-attr]

    def _open_drafter(
        self,
        audio: Any,
        prompt: str | None,
        inputs: Mapping[str, Tensor] | None,
        max_new_tokens: int,
        config: UGSDConfig,
    ) -> Drafter | DraftGraph | None:
        if self.draft is None:
            return None
        if audio is None and inputs is None:
            raise ValueError("Decoder: inputs is None, expected prepared inputs for the drafter beside verifier_inputs")
        prepared = dict(inputs) if inputs is not None else self.draft.prepare(audio, prompt)
        if self.config.graph:
            self.draft.check_placeholders(prepared)
            prepared = self.draft.to_device(prepared)
            return self._graph_of(prepared["input_ids"].shape[1] + max_new_tokens).start(prepared)
        return Drafter(
            self.draft.open(prepared),
            config,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.draft.vocab_size,
            device=self.draft.device,
        )

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
        self, audio: Any, prompt: str | None, inputs: Mapping[str, Tensor] | None, config: UGSDConfig
    ) -> VerifierSession | None:
        if self.verifier is None:
            return None
        if audio is None and inputs is None:
            raise ValueError(
                "Decoder: verifier_inputs is None, expected prepared inputs for the verifier beside inputs "
                "(the two models never share inputs: each has its own processor and prompt)"
            )
        return self.verifier.open(config, audio=audio, prompt=prompt, inputs=inputs)


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
