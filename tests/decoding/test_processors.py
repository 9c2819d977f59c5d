"""Logits processors and stopping criteria: what the verifier's own ``generate`` makes of them, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    ClassifierFreeGuidanceLogitsProcessor,
    ConfidenceCriteria,
    EncoderNoRepeatNGramLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from tests.decoding.test_decoder import NEVER_ENDS
from tests.models.tiny import build
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.processors import split_warpers

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]
TOKENS = 24
DRAFTERS = {"copy": {}, "noisy": {"noise": 0.05}, "random": {"seed": 7}}
LOSSLESS: dict[str, Any] = {"always_escalate": True, "rule": "greedy"}


def own_tokens(model: AudioLM, audio: Any, **settings: Any) -> list[int]:
    """What transformers' own ``generate`` makes, behind the prompt."""
    inputs = model.prepare(audio)
    output = model.model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None, **settings
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def processors(prompt: int, plain: list[int], width: int) -> dict[str, tuple[LogitsProcessorList, dict[str, Any]]]:
    """Processors, and the settings of ``generate`` that stand for them; `plain` is the unprocessed text."""
    end = plain[5]
    bad = [[plain[1]], plain[3:5]]
    bias = [[[plain[2]], -3.0], [[plain[0], plain[1]], -8.0]]
    return {
        "repetition_penalty": ([RepetitionPenaltyLogitsProcessor(1.7)], {"repetition_penalty": 1.7}),
        "no_repeat_ngram": ([NoRepeatNGramLogitsProcessor(2)], {"no_repeat_ngram_size": 2}),
        "min_new_tokens": (
            [MinNewTokensLengthLogitsProcessor(prompt, 12, end)],
            {"min_new_tokens": 12, "eos_token_id": end},
        ),
        "bad_words": ([NoBadWordsLogitsProcessor(bad, [end])], {"bad_words_ids": bad, "eos_token_id": end}),
        "sequence_bias": ([SequenceBiasLogitsProcessor(bias)], {"sequence_bias": bias}),
        "suppress": ([SuppressTokensLogitsProcessor(plain[:3])], {"suppress_tokens": plain[:3]}),
        "suppress_at_begin": (
            [SuppressTokensAtBeginLogitsProcessor(plain[:1], prompt)],
            {"begin_suppress_tokens": plain[:1]},
        ),
        "forced_eos": (
            [ForcedEOSTokenLogitsProcessor(prompt + TOKENS, end)],
            {"forced_eos_token_id": end},
        ),
        "exponential_decay": (
            [ExponentialDecayLengthPenalty((4, 1.4), end, prompt)],
            {"exponential_decay_length_penalty": (4, 1.4), "eos_token_id": end},
        ),
        "several": (
            [SequenceBiasLogitsProcessor(bias), RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(3)],
            {"sequence_bias": bias, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        ),
        "prefix": (
            [PrefixConstrainedLogitsProcessor(lambda _, ids: [int(ids[-1] * 7 + k) % width for k in range(20)], 1)],
            {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1] * 7 + k) % width for k in range(20)]},
        ),
    }  # fmt: skip


NAMES = tuple(processors(4, list(range(3, 30)), 500))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", [("qwen2_audio", "qwen2_audio"), ("qwen2_5_omni", "qwen3_omni")], ids="-".join)
def test_lossless_greedy_is_the_verifiers_own_generate(
    name: str, pair: tuple[str, str], audio_lm: LoadModel, speech: Speech
) -> None:
    """The second pair's vocabularies have different padded sizes."""
    verifier = audio_lm(pair[1])
    plain = own_tokens(verifier, speech, eos_token_id=NEVER_ENDS)
    prompt = verifier.prepare(speech)["input_ids"].shape[1]
    listed, settings = processors(prompt, plain, verifier.vocab_size)[name]
    end = settings.get("eos_token_id", settings.get("forced_eos_token_id", NEVER_ENDS))
    own = own_tokens(verifier, speech, **{"eos_token_id": end, **settings})
    assert own != plain
    config = UGSDConfig(**LOSSLESS, eos_token_id=end)
    for drafter in DRAFTERS.values():
        draft = audio_lm(pair[0], **drafter)
        decoder = Decoder(draft, LocalVerifier(verifier), config)
        result = decoder.generate(speech, max_new_tokens=TOKENS, logits_processor=LogitsProcessorList(listed))
        assert result.tokens == own
        if not drafter and pair[0] == pair[1]:
            assert result.metrics.acceptance_rate == 1.0


def test_edge_and_verifier_alone_and_batches_take_processors(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    own = own_tokens(model, speech, repetition_penalty=1.7, eos_token_id=NEVER_ENDS)
    listed = [RepetitionPenaltyLogitsProcessor(1.7)]
    config = UGSDConfig(eos_token_id=NEVER_ENDS)
    for decoder in (Decoder(model, None, config), Decoder(None, LocalVerifier(model), config)):
        assert decoder.generate(speech, max_new_tokens=TOKENS, logits_processor=listed).tokens == own
    other = (speech[0][::-1].copy(), speech[1])
    gated = Decoder(
        audio_lm("qwen2_audio", noise=0.05),
        LocalVerifier(model),
        UGSDConfig(entropy_threshold=5.0, rank=2, eos_token_id=NEVER_ENDS),
    )
    alone = [gated.generate(clip, max_new_tokens=TOKENS, logits_processor=listed).tokens for clip in (speech, other)]
    together = gated.generate([speech, other], max_new_tokens=TOKENS, logits_processor=listed)
    assert [result.tokens for result in together] == alone
    lossless = Decoder(
        audio_lm("qwen2_audio", noise=0.05), LocalVerifier(model), UGSDConfig(**LOSSLESS, eos_token_id=NEVER_ENDS)
    )
    rows = lossless.generate([speech, other], max_new_tokens=TOKENS, logits_processor=listed)
    assert [row.tokens for row in rows] == [
        own_tokens(model, clip, repetition_penalty=1.7, eos_token_id=NEVER_ENDS) for clip in (speech, other)
    ]


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_lossless_sampling_sees_the_processed_scores(rule: Any, audio_lm: LoadModel, speech: Speech) -> None:
    """A copy's drafts are all accepted, and no suppressed token is ever drawn."""
    model = audio_lm("qwen2_audio")
    allowed = list(range(5, 25))
    banned = [token for token in range(model.vocab_size) if token not in allowed]
    listed = [SuppressTokensLogitsProcessor(banned), RepetitionPenaltyLogitsProcessor(1.5)]
    config = UGSDConfig(always_escalate=True, rule=rule, temperature=1.5, top_p=0.9, eos_token_id=NEVER_ENDS)
    for draft, rate in ((model, 1.0), (audio_lm("qwen2_audio", seed=7), 0.99)):
        result = Decoder(draft, LocalVerifier(model), config).generate(
            speech, max_new_tokens=40, logits_processor=listed
        )
        assert set(result.tokens) <= set(allowed)
        assert (result.metrics.acceptance_rate == 1.0) == (rate == 1.0)


def test_the_generation_config_of_a_whisper_suppresses() -> None:
    tiny, draft = build("whisper"), build("whisper", noise=0.1)
    model = tiny.model
    inputs = tiny.inputs()
    plain = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    model.generation_config.suppress_tokens = sorted(set(plain[-4:]) - {2})
    model.generation_config.begin_suppress_tokens = plain[1:2]
    own = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    assert own != plain
    lossless = UGSDConfig(**LOSSLESS, eos_token_id=NEVER_ENDS)
    decoder = Decoder(AudioLM(draft.model), LocalVerifier(AudioLM(model)), lossless)
    given: dict[str, Any] = {"inputs": draft.inputs(), "verifier_inputs": inputs, "max_new_tokens": TOKENS}
    assert decoder.generate(**given, logits_processor="generation_config").tokens == own
    assert decoder.generate(**given).tokens == plain


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stopping_criteria_end_where_generate_ends(drafter: str, audio_lm: LoadModel, speech: Speech) -> None:
    model, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", **DRAFTERS[drafter])
    tokenizer, prompt = model.tokenizer, model.prepare(speech)["input_ids"].shape[1]
    plain = own_tokens(model, speech, eos_token_id=NEVER_ENDS)
    text = tokenizer.decode(plain)
    word = next(text[at : at + 3] for at in range(len(text) // 2, len(text)) if text[at : at + 3].isascii())
    length = MaxLengthCriteria(prompt + 7)
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "stop strings": (StopStringCriteria(tokenizer, [word]), {"stop_strings": [word], "tokenizer": tokenizer}),
        "length": (length, {"stopping_criteria": StoppingCriteriaList([length])}),
        "time": (MaxTimeCriteria(0.0), {"max_time": 0.0}),
    }
    strict: dict[str, Any] = {"rank": 1, "entropy_threshold": 0.0}
    for name, (criterion, settings) in cases.items():
        own = own_tokens(model, speech, eos_token_id=NEVER_ENDS, **settings)
        assert len(own) < TOKENS, name
        criteria = StoppingCriteriaList([criterion])
        for config in (UGSDConfig(**LOSSLESS, eos_token_id=NEVER_ENDS), UGSDConfig(**strict, eos_token_id=NEVER_ENDS)):
            decoder = Decoder(draft, LocalVerifier(model), config)
            result = decoder.generate(speech, max_new_tokens=TOKENS, stopping_criteria=criteria)
            assert result.tokens == own, name
            assert result.metrics.acceptance_rate <= 1.0
            assert sum(len(block.emitted) for block in result.trace.blocks) == len(own)
            assert [token.token for token in result.trace.tokens()] == own


def test_what_cannot_be_honoured_is_refused(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    decoder = Decoder(model, LocalVerifier(model))
    with pytest.raises(ValueError, match="ClassifierFreeGuidanceLogitsProcessor cannot be honoured .* second"):
        decoder.generate(speech, logits_processor=[ClassifierFreeGuidanceLogitsProcessor(2.0)])
    with pytest.raises(ValueError, match="ConfidenceCriteria cannot be honoured"):
        decoder.generate(speech, stopping_criteria=StoppingCriteriaList([ConfidenceCriteria(0.5)]))
    encoder = EncoderNoRepeatNGramLogitsProcessor(2, model.prepare(speech)["input_ids"])
    decoder.generate(speech, logits_processor=[encoder], max_new_tokens=4)
    with pytest.raises(ValueError, match="EncoderNoRepeatNGramLogitsProcessor .* each of the 2 requests"):
        decoder.generate([speech, speech], logits_processor=[encoder])
    graph = Decoder(model, LocalVerifier(model), UGSDConfig(graph=True))
    with pytest.raises(ValueError, match="logits_processor is given with graph=True"):
        graph.generate(speech, logits_processor=[RepetitionPenaltyLogitsProcessor(1.2)])

    class Elsewhere:
        eos_token_ids = frozenset({2})
        max_audio_seconds = tokenizer = None

    with pytest.raises(ValueError, match="logits_processor is given with a Elsewhere, expected a verifier in this"):
        Decoder(model, Elsewhere()).generate(speech, logits_processor=[RepetitionPenaltyLogitsProcessor(1.2)])  # type: ignore[arg-type]


def test_warpers_become_settings_only_in_generates_order() -> None:
    penalty = RepetitionPenaltyLogitsProcessor(1.2)
    temperature, top_k, top_p = TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9)
    rest, settings = split_warpers([penalty, temperature, top_k, top_p])
    assert list(rest) == [penalty]
    assert settings == {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    assert split_warpers([]) == ([], {})
    assert split_warpers([penalty])[1] == {}
    for listed in (
        [top_p, temperature],
        [temperature, penalty],
        [temperature, EpsilonLogitsWarper(1e-3)],
        [TopKLogitsWarper(4, filter_value=-1e4)],
    ):
        rest, kept = split_warpers(listed)
        assert kept is None
        assert list(rest) == listed


def test_a_processor_sees_the_verifiers_prefix_on_both_sides(audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_5_omni", noise=0.05), audio_lm("qwen3_omni")
    prompt = verifier.prepare(speech)["input_ids"]
    assert draft.prepare(speech)["input_ids"].shape != prompt.shape
    seen: list[torch.Tensor] = []

    class Spy(RepetitionPenaltyLogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids.clone())
            assert scores.shape == (1, verifier.vocab_size)
            assert scores.dtype == torch.float32
            return super().__call__(input_ids, scores)

    edge = Decoder(draft, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=TOKENS)
    threshold = float(np.median([block.uncertainty for block in edge.trace.blocks]))
    config = UGSDConfig(entropy_threshold=threshold, rank=2, eos_token_id=NEVER_ENDS)
    result = Decoder(draft, LocalVerifier(verifier), config).generate(
        speech, max_new_tokens=TOKENS, logits_processor=[Spy(1.02)]
    )
    assert 0 < sum(block.escalated for block in result.trace.blocks) < len(result.trace.blocks)
    final = torch.cat([prompt, torch.tensor([result.tokens])], 1)
    for ids in seen:
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)
    block = iter(result.trace.blocks)
    starts = {prompt.shape[1] + record.start for record in block}
    assert {ids.shape[1] for ids in seen if torch.equal(ids, final[:, : ids.shape[1]])} >= starts
