"""Uncertainty-guided speculative decoding (arXiv 2603.11397): draft, gate, verify, roll back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ugsd_fast.audio import load_audio
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.decoding.drafter import EMPTY_BLOCK, DraftBlock, Drafter
from ugsd_fast.decoding.text import IncrementalText
from ugsd_fast.decoding.trace import BlockRecord, Result, StreamEvent, Trace
from ugsd_fast.decoding.vocabulary import check_vocabularies
from ugsd_fast.errors import ModelError, VerifierUnavailable
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
        prompt: str | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        verifier_inputs: Mapping[str, Tensor] | None = None,
        max_new_tokens: int = 128,
    ) -> Any:
        """Caption one input, or each of a list.

        Parameters
        ----------
        audio : path, (array, rate), Audio, or a list of them
            Each model prepares it with its own processor.
        prompt : str, optional
            The instruction, given to both models through their own chat templates.
        inputs, verifier_inputs : mapping of str to Tensor, optional
            Prepared model inputs (``input_ids`` [1, P], audio tensors …) instead of `audio`, for drafter and verifier
            apart: the two never share inputs. One that is None in the decoder needs none.
        max_new_tokens : int
            Most tokens a caption may have.

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
        if isinstance(audio, list):
            return [self.generate(one, prompt=prompt, max_new_tokens=max_new_tokens) for one in audio]
        events = self.stream(
            audio,
            prompt=prompt,
            inputs=inputs,
            verifier_inputs=verifier_inputs,
            max_new_tokens=max_new_tokens,
        )
        result = None
        for event in events:
            result = event.result
        return result

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
        if (audio is None) == (inputs is None and verifier_inputs is None):
            raise ValueError("Decoder: got both or neither of audio and prepared inputs, expected one of them")
        if max_new_tokens < 1:
            raise ValueError(f"Decoder: max_new_tokens is {max_new_tokens}, expected an integer >= 1")
        started = time.perf_counter()
        if audio is not None:
            limits = [side.max_audio_seconds for side in (self.draft, self.verifier) if side is not None]
            audio = load_audio(audio, max_seconds=min((limit for limit in limits if limit is not None), default=None))
        drafter = self._open_drafter(audio, prompt, inputs, max_new_tokens)
        session = self._open_verifier(audio, prompt, verifier_inputs)
        return self._events(drafter, session, max_new_tokens, started)

    def _events(
        self, drafter: Drafter | DraftGraph | None, session: VerifierSession | None, max_new_tokens: int, started: float
    ) -> Iterator[StreamEvent]:
        trace, first_token = Trace(), 0.0
        tokens: list[int] = []
        text = IncrementalText(self._decode_text)
        try:
            for block, last in self._blocks(drafter, session, max_new_tokens):
                latency = time.perf_counter() - started
                first_token = first_token or latency
                trace.blocks.append(block)
                tokens.extend(block.emitted)
                result = None
                delta = text.extend(block.emitted, final=last)
                if last:
                    metrics = trace.metrics(
                        latency=latency,
                        time_to_first_token=first_token,
                        verifier_forwards=session.forwards if session else 0,
                        drafter_forwards=drafter.forwards if drafter else 0,
                        traffic=session.traffic if session else None,
                    )
                    result = Result(text.text, tokens, trace, metrics)
                yield StreamEvent(delta, tuple(block.tokens()), block, result)
        finally:
            if session is not None:
                session.close()
            if isinstance(drafter, DraftGraph):
                self._idle_graphs.append(drafter)

    def _blocks(
        self, drafter: Drafter | DraftGraph | None, session: VerifierSession | None, max_new_tokens: int
    ) -> Iterator[tuple[BlockRecord, bool]]:
        """The loop itself: blocks in order, each with whether it is the last."""
        config, eos = self.config, self.eos_token_ids
        position = 0
        unseen: list[int] = []  # final tokens that the verifier does not know yet
        last = False
        while not last:
            room = max_new_tokens - position
            clock = time.perf_counter()
            block = drafter.draft(min(config.block_size, room)) if drafter else EMPTY_BLOCK
            draft_seconds = time.perf_counter() - clock

            escalate = session is not None and (config.always_escalate or block.escalate)
            verdict = None
            if session is not None and escalate:
                ended = len(block) == room or (len(block) and block.token_ids[-1] in eos)
                bonus = not len(block) or (config.appends_bonus and not ended)
                verdict = self._verify(session, unseen, block, bonus=bonus)
            verify_seconds = time.perf_counter() - clock - draft_seconds

            num_accepted = verdict.num_accepted if verdict else len(block)
            next_token = verdict.next_token if verdict else -1
            emitted = block.token_ids[:num_accepted] + ((next_token,) if next_token >= 0 else ())
            if not emitted:
                raise ModelError("Decoder: the verifier's logits have no finite value, expected a next token")
            last = position + len(emitted) >= max_new_tokens or emitted[-1] in eos
            yield (
                BlockRecord(
                    start=position,
                    draft_tokens=block.token_ids,
                    entropy=block.entropy,
                    uncertainty=block.uncertainty,
                    escalated=escalate,
                    num_accepted=num_accepted,
                    emitted=emitted,
                    draft_seconds=draft_seconds,
                    verify_seconds=verify_seconds,
                    verified=not escalate or verdict is not None,
                ),
                last,
            )
            position += len(emitted)
            unseen = [] if verdict else [*unseen, *emitted]
            if drafter and not last:
                drafter.commit(num_accepted, next_token)

    def _verify(
        self, session: VerifierSession, unseen: Sequence[int], block: DraftBlock, *, bonus: bool
    ) -> Verdict | None:
        """The verifier's verdict, or None where it failed and the draft is to stand."""
        delay = _FIRST_RETRY
        while True:
            try:
                return session.verify(unseen, block, bonus=bonus)
            except VerifierUnavailable:
                if self.config.on_verifier_failure == "raise" or not len(block):
                    raise
                if self.config.on_verifier_failure == "accept":
                    return None
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_RETRY)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a caption: the config's, or else the verifier's (the drafter's, if there is none)."""
        if self.config.eos_token_ids is not None:
            return self.config.eos_token_ids
        return (self.verifier or self.draft).eos_token_ids  # type: ignore[union-attr]

    def _decode_text(self, tokens: Sequence[int]) -> str:
        return (self.draft or self.verifier).decode(tokens)  # type: ignore[union-attr]

    def _open_drafter(
        self, audio: Any, prompt: str | None, inputs: Mapping[str, Tensor] | None, max_new_tokens: int
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
            self.config,
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
        self, audio: Any, prompt: str | None, inputs: Mapping[str, Tensor] | None
    ) -> VerifierSession | None:
        if self.verifier is None:
            return None
        if audio is None and inputs is None:
            raise ValueError(
                "Decoder: verifier_inputs is None, expected prepared inputs for the verifier beside inputs "
                "(the two models never share inputs: each has its own processor and prompt)"
            )
        return self.verifier.open(self.config, audio=audio, prompt=prompt, inputs=inputs)
