"""The decoder behind transformers' own door: ``model.generate(**inputs, custom_generate=UGSDGenerate(...))``.

The model is the verifier. What it is called with decides as it always does: lengths, ends, sampling, processors and
stopping criteria are those of the call and of its generation config, and the output is what ``generate`` returns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.utils import ModelOutput

from ugsd_fast.cache.growing import self_attention
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.decoder import Decoder
from ugsd_fast.decoding.processors import split_warpers
from ugsd_fast.decoding.streaming import Streamer
from ugsd_fast.decoding.trace import Result
from ugsd_fast.errors import attempt
from ugsd_fast.models import AudioLM
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.rows import split_rows
from ugsd_fast.verifier.local import Judgements, LocalSession, LocalVerifier

Inputs = Mapping[str, Any]

# Of the call's own making: the decoder has its own cache and positions.
_OWN = frozenset({"past_key_values", "position_ids", "use_cache", "logits_to_keep", "return_dict"})
_DEFAULT_CACHES = (None, "dynamic", "sliding_window", "hybrid", "hybrid_chunked")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class UGSDGenerate:
    """Decodes speculatively inside ``model.generate``.

    Parameters
    ----------
    drafter : AudioLM or transformers.PreTrainedModel, optional
        The edge model; without one the verifier decodes alone.
    drafter_inputs : mapping of str to Tensor, or callable, optional
        The drafter's own prepared inputs, as many rows as the call has; or what makes them of the call's inputs
        (``lambda inputs: inputs`` where both models have one processor). ``generate(drafter_inputs=...)`` gives those
        of one call.
    config : UGSDConfig, optional
        Gate, rule and block length. By default lossless: what the verifier alone would write, token by token
        (``rule="greedy"``) or, with ``do_sample=True``, in distribution (``rule="exact"``). Sampling settings and ends
        are the call's.
    processor : optional
        The verifier's processor or tokenizer: for stop strings, and for a drafter with another tokenizer.
    streamer : transformers.TextStreamer or its like, optional
        ``generate`` hands its own to no ``custom_generate``.
    max_batch_size : int
        Rows that are decoded at the same time.

    Attributes
    ----------
    results : list of Result
        Trace and metrics of the last call, one a row; none where it failed.

    Raises
    ------
    ValueError
        On a call with a setting that cannot be honoured (beams, attentions, a cache of one's
        own …); nothing is ignored.

    Notes
    -----
    ``generate(streamer=…, assistant_model=…)`` are refused: transformers keeps them to itself. ``stop_strings`` go to
    ``generate`` directly, not in a `GenerationConfig`. Scores are the verifier's, so they need ``always_escalate``;
    behind a row's end they are zero. With ``do_sample=True`` the uniforms are seeded from torch's generator:
    ``torch.manual_seed`` decides, as ever.

    ``past_key_values``, of ``return_dict_in_generate=True`` or given empty, hold at the end what ``generate`` leaves in
    them: all tokens but the newest, and padding behind rows that have ended. What no verifier has seen of that takes
    one more forward pass, which no metric counts, and every row's cache is kept until then. None is returned, and one
    that was given stays empty, where rows are padded and the model counts padding as positions (VibeVoice-ASR), or
    where it has no room for the padding.

    Examples
    --------
    >>> from ugsd_fast.demo import clips, load_pair
    >>> pair = load_pair()
    >>> verifier, clip = pair.verifier.model, clips()[0].path
    >>> ugsd = UGSDGenerate(pair.draft, pair.draft.prepare(clip, pair.prompt))
    >>> inputs = verifier.prepare(clip, pair.prompt)
    >>> tokens = verifier.model.generate(**inputs, custom_generate=ugsd, max_new_tokens=32)
    >>> bool((tokens == verifier.model.generate(**inputs, max_new_tokens=32)).all())
    True
    """

    def __init__(
        self,
        drafter: Any = None,
        drafter_inputs: Inputs | Callable[[Inputs], Inputs] | None = None,
        config: UGSDConfig | None = None,
        *,
        processor: Any = None,
        streamer: Streamer | None = None,
        max_batch_size: int = 16,
    ):
        self.drafter = drafter if drafter is None or isinstance(drafter, AudioLM) else AudioLM(drafter)
        self.drafter_inputs = drafter_inputs
        self.config = config
        self.processor = processor
        self.streamer = streamer
        self.max_batch_size = max_batch_size
        self.results: list[Result] = []
        self._decoder: Decoder | None = None

    # The names of the parameters are what generate() goes by.
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: Tensor | None = None,
        drafter_inputs: Inputs | Callable[[Inputs], Inputs] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what ``generate`` has prepared."""
        self.results = []
        _refuse_what_generate_keeps()
        _refuse_settings(generation_config, model_kwargs)
        _refuse_positions(input_ids, model_kwargs)
        verifier, rows = self._verifier_of(model), input_ids.shape[0]
        ends, length, criteria = _split_ends(stopping_criteria)
        if stop_strings is not None:
            criteria.append(self._stop_strings(stop_strings, verifier))
        processors, warpers = split_warpers(logits_processor)
        pad = _pad_token(generation_config)
        if rows > 1 and criteria and pad is None:
            raise ValueError("UGSDGenerate: pad_token_id is None, expected one (rows of a batch end one by one)")
        if rows > 1 and self.streamer is not None:
            raise ValueError(f"UGSDGenerate: streamer is given with a batch of {rows}, expected one row")

        config = self._config_of(generation_config, warpers, ends)
        scored = _wants_scores(generation_config, config)
        padding = _padding(model, input_ids, model_kwargs)
        cache = _wanted_cache(model, generation_config, model_kwargs, padded=any(padding))
        inputs = _model_inputs(verifier.model, input_ids, model_kwargs)
        heard = {model.main_input_name: inputs_tensor} if model.config.is_encoder_decoder else {}
        copies = generation_config.num_return_sequences or 1
        columns: dict[str, Any] = {
            "verifier_inputs": split_rows(verifier.model, inputs, keep_padding=bool(processors or criteria)),
            "inputs": self._drafter_rows(drafter_inputs, {**heard, **inputs}, rows, copies),
            "logits_processor": processors or None,
            "stopping_criteria": criteria or None,
            "max_new_tokens": max(length - input_ids.shape[1], 1),
        }
        decoder = self._decoder_of(verifier, config)
        keeper = _KeepingVerifier(verifier, scored=scored)
        if scored or cache is not None:
            decoder = copy.copy(decoder)
            decoder.verifier = keeper
        if self.streamer is not None:
            for name in ("verifier_inputs", "inputs"):
                columns[name] = columns[name] and columns[name][0]
            self.results = [decoder.generate(**columns, streamer=self.streamer)]
        else:
            self.results = decoder.generate(**columns, max_batch_size=self.max_batch_size)

        written = [torch.tensor(result.tokens, device=input_ids.device) for result in self.results]
        padded = nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=0 if pad is None else pad)
        sequences = torch.cat([input_ids, padded], 1)
        lengths = [len(row) for row in written]
        if cache is not None and not keeper.fill(cache, sequences, padding, lengths):
            cache = None
        if not generation_config.return_dict_in_generate:
            return sequences
        kept = keeper.judgements(lengths) if scored else Judgements()
        output: Any = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        return output(
            sequences=sequences,
            scores=tuple(kept.scores) if generation_config.output_scores else None,
            logits=tuple(kept.logits) if generation_config.output_logits else None,
            past_key_values=cache,
        )

    def _verifier_of(self, model: Any) -> LocalVerifier:
        known = self._decoder.verifier if self._decoder is not None else None
        if isinstance(known, LocalVerifier) and known.model.model is model:
            return known
        return LocalVerifier(AudioLM(model, self.processor))

    def _decoder_of(self, verifier: LocalVerifier, config: UGSDConfig) -> Decoder:
        """The last call's decoder, if only its seed is another."""
        known = self._decoder
        if known is None or known.verifier is not verifier or known.config != replace(config, seed=known.config.seed):
            known = self._decoder = Decoder(self.drafter, verifier, config)
        return known if known.config.seed == config.seed else known.reseeded(config.seed)

    def _config_of(
        self, generation_config: GenerationConfig, warpers: Mapping[str, float] | None, ends: frozenset[int]
    ) -> UGSDConfig:
        """The given config, or a lossless one, with the call's sampling and ends."""
        sampled = bool(generation_config.do_sample)
        asked: dict[str, Any] = dict.fromkeys(_SAMPLING) | {"eos_token_id": tuple(sorted(ends))}
        defaults = {field.name: field.default for field in fields(UGSDConfig)}
        for name in _SAMPLING:
            asked[name] = (warpers or {}).get(name, 1.0 if name == "temperature" and sampled else defaults[name])
        config = self.config or UGSDConfig(always_escalate=True, rule="exact" if sampled else "greedy")
        for name, value in asked.items():
            own = config.eos_token_ids if name == "eos_token_id" else getattr(config, name)
            if own != defaults[name] and own != (ends if name == "eos_token_id" else value):
                raise ValueError(
                    f"UGSDGenerate: config.{name} is {getattr(config, name)!r} and generate() asks for {value!r}, "
                    "expected the default in the config (sampling and ends are generate()'s)"
                )
        if sampled:
            asked["seed"] = (config.seed + int(torch.randint(2**63 - 1, ()))) % 2**64
        return replace(config, **asked)

    def _drafter_rows(self, given: Any, inputs: Inputs, rows: int, copies: int) -> list[dict[str, Any]] | None:
        if self.drafter is None:
            return None
        given = self.drafter_inputs if given is None else given
        if callable(given):
            given = given({name: value for name, value in inputs.items() if value is not None})
        if given is None:
            raise ValueError(
                "UGSDGenerate: drafter_inputs is None, expected the drafter's own prepared inputs "
                "(the two models never share inputs: each has its own processor and prompt)"
            )
        found = split_rows(self.drafter, {name: value for name, value in given.items() if name not in _OWN})
        if len(found) * copies == rows:  # generate() has repeated its own
            found = [row for row in found for _ in range(copies)]
        if len(found) != rows:
            raise ValueError(f"UGSDGenerate: drafter_inputs have {len(found)} rows, expected {rows} as the call has")
        return found

    def _stop_strings(self, strings: str | Sequence[str], verifier: LocalVerifier) -> StopStringCriteria:
        if verifier.tokenizer is None:
            raise ValueError(
                "UGSDGenerate: stop_strings are given and no tokenizer is known, expected UGSDGenerate(processor=...)"
            )
        return StopStringCriteria(verifier.tokenizer, strings if isinstance(strings, str) else list(strings))


class _KeepingVerifier(LocalVerifier):
    """A verifier for one call that keeps its sessions: their caches, and what they thought of every token if scored."""

    def __init__(self, verifier: LocalVerifier, *, scored: bool):
        super().__init__(verifier.model)
        self._scored = scored
        self._sessions: list[LocalSession] = []

    def open(self, config: UGSDConfig, **kwargs: Any) -> LocalSession:
        """Start a session; see `LocalVerifier.open`."""
        session = super().open(config, **kwargs)
        session.judgements = Judgements() if self._scored else None
        session.keeps_cache = True
        self._sessions.append(session)
        return session

    def judgements(self, lengths: Sequence[int]) -> Judgements:
        """Logits and scores [B, V] of each step, float32; zero where a row has ended."""
        rows = [session.judgements for session in self._sessions]
        columns = [
            [
                torch.cat([part.float() for part in parts])[:length]
                for parts, length in zip((getattr(row, name) for row in rows), lengths, strict=True)
            ]
            for name in ("logits", "scores")
        ]
        return Judgements(*(list(nn.utils.rnn.pad_sequence(column).unbind(0)) for column in columns))

    def fill(self, cache: Cache, sequences: Tensor, padding: Sequence[int], lengths: Sequence[int]) -> bool:
        """Move the sessions' keys and values into an empty cache, as `generate` leaves it.

        Parameters
        ----------
        cache : transformers.Cache
            Of any kind.
        sequences : LongTensor[B, S]
            Prompts and what was generated; the cache holds all of it but the newest column.
        padding, lengths : sequence of int
            Columns before each row's prompt, and tokens that it generated.

        Returns
        -------
        bool
            False where a row has no room for the columns behind its end: nothing is filled in then.
        """
        width = sequences.shape[1] - 1
        prompt = sequences.shape[1] - max(lengths)
        rows = [session.sequence for session in self._sessions]
        missing = []
        for row, (sequence, first, length) in enumerate(zip(rows, padding, lengths, strict=True)):
            sequence.rollback(max(sequence.length + first - min(prompt + length, width), 0))
            start = first + sequence.length if sequence.length else prompt
            missing.append(sequences[row : row + 1, start:width].to(self.model.device))
        if any(attempt(row.check_room, new.shape[1]) for row, new in zip(rows, missing, strict=True)):
            return False
        behind = [index for index, row in enumerate(rows) if missing[index].shape[1] or not row.length]
        if behind:
            forward_packed([rows[i] for i in behind], [missing[i] for i in behind], [1] * len(behind))
        held = [self_attention(row.cache) for row in rows]
        _move(held, self_attention(cache), width)
        if isinstance(cache, EncoderDecoderCache):
            heard: list[Any] = [row.cache.cross_attention_cache for row in rows]  # type: ignore[attr-defined]
            _move(heard, cache.cross_attention_cache, heard[0].get_seq_length())
            cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        return True


def _move(rows: Sequence[Cache], cache: Cache, width: int) -> None:
    """Put the keys and values of caches of one row each into one cache, layer by layer, aligned at the right."""
    for index in range(len(rows[0].layers)):
        layers: list[Any] = [row.layers[index] for row in rows]
        if getattr(layers[0], "keys", None) is None:  # shares another's
            continue
        keys, values = (
            torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        cache.update(keys, values, index)
        for row in rows:  # so that there are never two of all
            row.layers[index] = None  # type: ignore[call-overload]


def _refuse_what_generate_keeps() -> None:
    """Look into the ``generate`` that called: who waits for a streamer that nobody feeds waits for ever."""
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    if caller is None or caller.f_code.co_name != "generate":
        return
    for name in ("streamer", "assistant_model"):
        if caller.f_locals.get(name) is not None:
            instead = {"streamer": "streamer", "assistant_model": "drafter"}[name]
            raise ValueError(
                f"UGSDGenerate: generate() was given {name}, which transformers hands to no custom_generate, expected "
                f"UGSDGenerate({instead}=...)"
            )


def _refuse_settings(config: GenerationConfig, model_kwargs: Inputs) -> None:
    """Raise where the call asks for what a speculative loop does not do."""
    mode = config.get_generation_mode()
    reads = bool(config.return_dict_in_generate)
    cache = model_kwargs.get("past_key_values")
    asked = {
        "generation mode": (str(getattr(mode, "value", mode)), ("greedy_search", "sample")),
        "cache_implementation": (config.cache_implementation, _DEFAULT_CACHES),
        "use_cache": (model_kwargs.get("use_cache"), (None, True)),
        "tokens in past_key_values": (0 if cache is None else int(cache.get_seq_length()), (0,)),
        "output_attentions": (reads and bool(config.output_attentions), (False,)),
        "output_hidden_states": (reads and bool(config.output_hidden_states), (False,)),
        "inputs_embeds": (model_kwargs.get("inputs_embeds") is not None, (False,)),
    }
    for name, (value, expected) in asked.items():
        if value not in expected:
            raise ValueError(
                f"UGSDGenerate: {name} is {value!r}, expected {' or '.join(map(repr, expected))} "
                "(speculative decoding does not do it)"
            )


def _wants_scores(generation_config: GenerationConfig, config: UGSDConfig) -> bool:
    asked = generation_config.output_scores or generation_config.output_logits
    if not (generation_config.return_dict_in_generate and asked):
        return False
    if not config.always_escalate:
        raise ValueError(
            "UGSDGenerate: output_scores or output_logits are asked for with always_escalate=False, expected True "
            "(the verifier never sees a block that is accepted locally)"
        )
    return True


def _wanted_cache(model: Any, config: GenerationConfig, model_kwargs: Inputs, *, padded: bool) -> Cache | None:
    """The cache that `generate` has made or was given, if anybody will see it and it can be filled."""
    cache = model_kwargs.get("past_key_values")
    if not config.return_dict_in_generate and not getattr(cache, "_is_user_defined", False):
        return None
    if padded and "position_ids" not in inspect.signature(model.forward).parameters:
        return None  # generate would count padding among the positions, and the loop does not
    if cache is not None and model.config.is_encoder_decoder and not isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def _padding(model: Any, input_ids: Tensor, model_kwargs: Inputs) -> list[int]:
    """Columns before each prompt."""
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    return [0] * len(input_ids) if mask is None else (mask == 0).sum(1).tolist()


def _refuse_positions(input_ids: Tensor, model_kwargs: Inputs) -> None:
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    if not bool(((positions == mask.cumsum(-1) - 1) | (mask == 0)).all()):
        raise ValueError("UGSDGenerate: position_ids are not those of a prompt of text and audio, expected None")


def _model_inputs(model: AudioLM, input_ids: Tensor, model_kwargs: Inputs) -> dict[str, Any]:
    """What the call says to the model itself, the prompt with it."""
    settings = model.family.forward_kwargs if model.family is not None else {}
    inputs: dict[str, Any] = {"decoder_input_ids" if model.model.config.is_encoder_decoder else "input_ids": input_ids}
    for name, value in model_kwargs.items():
        empty = value is None or value is False or (isinstance(value, dict) and not value)
        if name in _OWN or empty:
            continue
        if isinstance(value, Tensor | ModelOutput):
            inputs[name] = value
        elif name not in settings or settings[name] != value:
            raise ValueError(f"UGSDGenerate: {name} is {value!r}, expected {settings.get(name)!r}")
    return inputs


def _split_ends(criteria: StoppingCriteriaList) -> tuple[frozenset[int], int, StoppingCriteriaList]:
    """End-of-sequence tokens and greatest length, which the loop itself looks at, and the other criteria."""
    ends = [one.eos_token_id.tolist() for one in criteria if type(one) is EosTokenCriteria]
    length = min(one.max_length for one in criteria if type(one) is MaxLengthCriteria)
    others = [one for one in criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
    return frozenset().union(*ends), length, StoppingCriteriaList(others)


def _pad_token(config: GenerationConfig) -> int | None:
    """What rows that have ended are filled up with: the pad token, or else the first end-of-sequence token."""
    named = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    return named[0] if isinstance(named, list) else named
