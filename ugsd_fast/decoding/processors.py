"""Logits processors and stopping criteria of transformers in a speculative loop.

Both models' scores go through the same processors with the same prefix, the verifier's prompt and what was generated:
a penalty on repetition or a length counts alike on both sides, and lossless rules compare the distributions that the
verifier alone would have made and that the draft was really drawn from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ugsd_fast.decoding.streaming import Streamer

# A list of transformers' processors, or those that the verifier's generation config stands for.
LogitsProcessors = LogitsProcessorList | Sequence[LogitsProcessor] | Literal["generation_config"]

# By name, as not every version of transformers has all of them.
_REFUSED = {
    **dict.fromkeys(
        ("ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor"),
        "it needs a second, unconditional row of scores",
    ),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it calls the model itself, with a cache that cannot roll back",
    "SynthIDTextWatermarkLogitsProcessor": "it keeps a state that rejected tokens cannot be taken out of",
    "WhisperNoSpeechDetection": "it keeps a state and calls the model itself",
    **dict.fromkeys(
        (
            "AlternatingCodebooksLogitsProcessor",
            "BarkEosPrioritizerLogitsProcessor",
            "DiaEOSChannelFilterLogitsProcessor",
            "DiaEOSDelayPatternLogitsProcessor",
        ),
        "it is for audio codes, not text",
    ),
    "ConfidenceCriteria": "it reads the scores of a draft, which the verifier overrules",
}
_OF_ONE_ROW = ("EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor")
_WARPERS: dict[type, str] = {  # in the order in which generate() applies them
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}


def check_processors(processors: Sequence[Any], *, rows: int = 1) -> None:
    """Refuse logits processors and stopping criteria that a speculative loop cannot honour.

    Custom ones are taken at their word to depend on nothing but the prefix and the scores they are given.

    Raises
    ------
    ValueError
        Naming the class and the reason.
    """
    for processor in processors:
        for base in type(processor).__mro__:
            reason = _REFUSED.get(base.__name__)
            if reason is None and rows > 1 and base.__name__ in _OF_ONE_ROW:
                reason = f"it was made for the prompts of a batch, and each of the {rows} requests goes its own way"
            if reason is not None:
                raise ValueError(f"{type(processor).__name__} cannot be honoured in speculative decoding: {reason}")


def split_warpers(processors: Sequence[LogitsProcessor]) -> tuple[LogitsProcessorList, dict[str, float] | None]:
    """Take temperature, top-k, top-p and min-p off the end of a list, as settings of `UGSDConfig`.

    Parameters
    ----------
    processors : sequence of LogitsProcessor
        As ``generate(do_sample=True)`` makes it.

    Returns
    -------
    LogitsProcessorList, dict or None
        The other processors, and the settings by name. None where the warpers do not stand at the end in generate()'s
        order with its filter value: then they stay in the list, and what they make is sampled at temperature 1.

    Examples
    --------
    >>> from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
    >>> rest, settings = split_warpers(LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]))
    >>> len(rest), settings
    (0, {'temperature': 0.7, 'top_p': 0.9})
    """
    kinds, everything = list(_WARPERS), list(processors)
    at = [type(one) in _WARPERS for one in everything]
    start = at.index(True) if any(at) else len(everything)
    warpers: list[Any] = everything[start:]
    order = [kinds.index(type(one)) if type(one) in _WARPERS else -1 for one in warpers]
    plain = all(getattr(one, "filter_value", -torch.inf) == -torch.inf for one in warpers)
    single = all(getattr(one, "min_tokens_to_keep", 1) == 1 for one in warpers)
    if order != sorted(set(order)) or -1 in order or not plain or not single:
        return LogitsProcessorList(everything), None
    settings = {_WARPERS[type(one)]: getattr(one, _WARPERS[type(one)]) for one in warpers}
    return LogitsProcessorList(everything[:start]), settings


class Processed:
    """Processors of one request on one side of the loop, with the prefix that they see.

    Parameters
    ----------
    processors : sequence of LogitsProcessor
        Applied in this order.
    prompt : LongTensor[1, P]
        The verifier's prompt (the drafter's, where there is no verifier), on this side's device.
    vocab_size : int
        Columns that the processors see: the verifier's. The drafter's scores are cut, or filled up with −inf.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], prompt: Tensor, *, vocab_size: int):
        # Some prepare themselves for the device and width of the first scores.
        self._processors = LogitsProcessorList([copy.copy(one) for one in processors])
        self._ids = prompt
        self._vocab_size = vocab_size

    @property
    def length(self) -> int:
        """Tokens in the prefix, prompt included."""
        return self._ids.shape[1]

    def append(self, tokens: Tensor) -> None:
        """Append tokens [1, n] to the prefix; ids that the verifier does not have become its last."""
        self._ids = torch.cat([self._ids, tokens.clamp(min=0, max=self._vocab_size - 1)], 1)

    def truncate(self, length: int) -> None:
        """Cut the prefix to its first `length` tokens."""
        self._ids = self._ids[:, :length]

    def scores(self, logits: Tensor) -> Tensor:
        """Scores [1, V] of the token behind the prefix, float32, of its logits [1, V']."""
        missing = self._vocab_size - logits.shape[-1]
        scores = logits.to(torch.float32, copy=True)
        if missing:
            scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)  # a negative pad cuts
        return self._processors(self._ids, scores)  # type: ignore[arg-type]

    def block_scores(self, logits: Tensor, draft: Tensor) -> Tensor:
        """Scores [1, K + 1, V] of the positions of a draft [1, K] and the one behind it; the prefix stays."""
        prefix, rows = self._ids, []
        for position in range(logits.shape[1]):
            rows.append(self.scores(logits[:, position]))
            self.append(draft[:, position : position + 1])
        self._ids = prefix
        return torch.stack(rows, 1)


class Stopping:
    """Stopping criteria of one request, asked token by token.

    Parameters
    ----------
    criteria : StoppingCriteriaList
        Called with all ids [1, P + n] and no scores.
    prompt : LongTensor[1, P]
        What the criteria see before the generated tokens.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor):
        self._criteria = StoppingCriteriaList(criteria)
        self._prompt = prompt[0].tolist()

    def kept(self, tokens: Sequence[int], emitted: Sequence[int]) -> tuple[int, bool]:
        """How many of `emitted` stand behind `tokens`, and whether a criterion ends the request there."""
        before = [*self._prompt, *tokens]
        for count in range(1, len(emitted) + 1):
            ids = torch.tensor([[*before, *emitted[:count]]], dtype=torch.long)
            if bool(self._criteria(ids, None).all()):  # type: ignore[arg-type]
                return count, True
        return len(emitted), False


class Steering(NamedTuple):
    """What a call of the decoder adds to its models' scores and ends, and who else reads its tokens."""

    logits_processor: LogitsProcessors | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    streamer: Streamer | None = None

    def check(self, rows: int) -> Steering:
        """Raise where something cannot be honoured; see `check_processors`."""
        if self.logits_processor is not None and self.logits_processor != "generation_config":
            check_processors(self.logits_processor, rows=rows)
        check_processors(self.stopping_criteria or [])
        return self

    def processors(self, model: Any, prompt: Tensor, row: int) -> LogitsProcessorList | None:
        """Processors of one request; `model` is the transformers model whose generation config may be meant."""
        if self.logits_processor is None:
            return None
        if self.logits_processor == "generation_config":
            return processors_of(model, prompt)
        return LogitsProcessorList([_of_row(one, row) for one in self.logits_processor])


NO_STEERING = Steering()


def processors_of(model: Any, prompt: Tensor) -> LogitsProcessorList:
    """What transformers' ``generate`` would apply by a model's own generation config: penalties, suppressed tokens.

    Temperature and its like are not among them: they are the config's.
    """
    config = copy.deepcopy(model.generation_config)
    config.do_sample = False
    model._prepare_special_tokens(config, True, device=prompt.device)
    return model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        device=str(prompt.device),
    )


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """The processor of one request of several, each of which is a batch of its own."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor) and row:
        allowed: Any = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    ignored = getattr(processor, "prompt_ignore_length", None)  # of a repetition penalty: each row's padding
    if isinstance(ignored, Tensor) and len(ignored) > 1:
        processor = copy.copy(processor)
        vars(processor)["prompt_ignore_length"] = ignored[row : row + 1]
    return processor
