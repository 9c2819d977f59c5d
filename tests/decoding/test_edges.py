"""What goes wrong outside: every way a draft can be wrong, and every input there is nothing to hear in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.test_decoder import NEVER_ENDS
from tests.models import tiny
from ugsd_fast import AudioError, AudioLM, Decoder, LocalVerifier, ModelError, UGSDConfig
from ugsd_fast.demo import EmbeddedPair, clips, load_pair

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]

GREEDY = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=NEVER_ENDS)
FAMILIES = ("voxtral", "gemma3n", "phi4_multimodal", "whisper")  # full and sliding windows, a switch, cross-attention
TOKENS = 20


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load_pair()


@pytest.fixture(scope="module")
def captions() -> list[Any]:
    return [clip.path for clip in clips()[:3]]


@contextmanager
def head(model: AudioLM, change: Callable[[Tensor, int], None]) -> Iterator[None]:
    """Change a model's logits [B, q, V] in place; the number counts its forwards."""
    count = 0

    def hook(_: Any, __: Any, logits: Tensor) -> Tensor:
        nonlocal count
        logits = logits.clone()
        change(logits, count)
        count += 1
        return logits

    handle = model.model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def favour(tokens: int | Sequence[int], by: float = 1e4) -> Callable[[Tensor, int], None]:
    """All but certain of one of `tokens`."""

    def change(logits: Tensor, _: int) -> None:
        logits[..., tokens] += by

    return change


def tiny_pair(family: str) -> tuple[AudioLM, AudioLM, list[Any], list[Any]]:
    """Drafter, verifier, and inputs of three requests for each."""
    draft, verifier = tiny.build(family, noise=0.1), tiny.build(family)
    requests = range(3)
    inputs, verifier_inputs = [draft.inputs(clip) for clip in requests], [verifier.inputs(clip) for clip in requests]
    return AudioLM(draft.model), AudioLM(verifier.model), inputs, verifier_inputs


def alone(verifier: AudioLM, inputs: Sequence[Any], config: UGSDConfig = GREEDY) -> list[list[int]]:
    """What the verifier writes without a drafter, request by request."""
    decoder = Decoder(None, LocalVerifier(verifier), config)
    return [decoder.generate(verifier_inputs=one, max_new_tokens=TOKENS).tokens for one in inputs]


def both_ways(decoder: Decoder, inputs: list[Any], verifier_inputs: list[Any], tokens: int = TOKENS) -> list[list[int]]:
    """Tokens of a batch, which are those of its requests one by one."""
    batch = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=tokens)
    for result, one, verifier_one in zip(batch, inputs, verifier_inputs, strict=True):
        single = decoder.generate(inputs=one, verifier_inputs=verifier_one, max_new_tokens=tokens)
        assert result.tokens == single.tokens
    return [result.tokens for result in batch]


# Ends


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_captions_that_end_within_a_block(block_size: int, pair: EmbeddedPair, captions: list[Any]) -> None:
    config = UGSDConfig(always_escalate=True, rule="greedy", block_size=block_size)
    verifier = Decoder(None, pair.verifier, config)
    decoder = Decoder(pair.draft, pair.verifier, config)
    own = [verifier.generate(path, prompt=pair.prompt) for path in captions]
    assert len({len(result.tokens) for result in own}) > 1, "captions of one length prove little"
    for result, expected in zip(decoder.generate(captions, prompt=pair.prompt), own, strict=True):
        assert result.tokens == expected.tokens
        assert result.text == expected.text
        assert result.tokens[-1] in pair.verifier.eos_token_ids
        ends = [token in pair.verifier.eos_token_ids for token in result.tokens]
        assert sum(ends) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_that_ends_at_once_ends_nothing(family: str) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)
    own = alone(verifier, verifier_inputs)
    end = next(token for token in range(5, 80) if not any(token in row for row in own))
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=end)
    with head(draft, favour(end)):
        results = Decoder(draft, LocalVerifier(verifier), config).generate(
            inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS
        )
        edge = Decoder(draft, None, config).generate(inputs=inputs, max_new_tokens=TOKENS)
    assert [result.tokens for result in results] == own
    assert all(block.draft_tokens == (end,) for result in results for block in result.trace.blocks)
    assert [result.tokens for result in edge] == [[end]] * 3


@pytest.mark.parametrize("max_new_tokens", [1, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_longer_than_the_caption_may_be(family: str, max_new_tokens: int) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)
    config = UGSDConfig(always_escalate=True, rule="greedy", block_size=64, eos_token_id=NEVER_ENDS)
    got = both_ways(Decoder(draft, LocalVerifier(verifier), config), inputs, verifier_inputs, max_new_tokens)
    assert got == [row[:max_new_tokens] for row in alone(verifier, verifier_inputs)]


@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_embedded_captions_are_cut(max_new_tokens: int, pair: EmbeddedPair, captions: list[Any]) -> None:
    config = UGSDConfig(always_escalate=True, rule="greedy", block_size=64)
    whole = Decoder(None, pair.verifier, config).generate(captions, prompt=pair.prompt)
    cut = Decoder(pair.draft, pair.verifier, config).generate(
        captions, prompt=pair.prompt, max_new_tokens=max_new_tokens
    )
    assert [result.tokens for result in cut] == [result.tokens[:max_new_tokens] for result in whole]


# Nothing to hear, or too much


NOISE = np.random.default_rng(0).normal(0, 0.1, 16_000 * 31).astype(np.float32)
REFUSED = {
    "no samples": (np.zeros(0, np.float32), "is empty|holds no|no audio|0 samples"),
    "silence": (np.zeros(16_000, np.float32), "is silent"),
    "not finite": (np.full(16_000, np.nan, np.float32), "finite"),
    "longer than the window": (NOISE, "lasts 31.00 s, expected at most 4 s"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_clips_without_speech_are_refused(name: str, pair: EmbeddedPair, captions: list[Any]) -> None:
    samples, message = REFUSED[name]
    for decoder in (
        Decoder(pair.draft, pair.verifier, pair.config),
        Decoder(pair.draft, None),
        Decoder(None, pair.verifier),
    ):
        with pytest.raises(AudioError, match=message):
            decoder.generate((samples, 16_000), prompt=pair.prompt)
        with pytest.raises(AudioError, match=message):
            decoder.stream((samples, 16_000), prompt=pair.prompt)
        with pytest.raises(AudioError, match=message):
            decoder.generate([captions[0], (samples, 16_000)], prompt=pair.prompt)
        assert decoder.generate(captions[0], prompt=pair.prompt).text, "the decoder goes on"


def test_the_shorter_window_of_two_models_counts(audio_lm: LoadModel) -> None:
    short, long = audio_lm("qwen2_audio"), audio_lm("qwen3_omni")
    clip = (NOISE[: 6 * 16_000], 16_000)
    for decoder in (Decoder(long, LocalVerifier(short), GREEDY), Decoder(short, LocalVerifier(long), GREEDY)):
        with pytest.raises(AudioError, match=r"lasts 6.00 s, expected at most 4 s"):
            decoder.generate(clip)
    # Without a window there is no limit.
    result = Decoder(long, LocalVerifier(long), GREEDY).generate(clip, max_new_tokens=8)
    assert result.tokens == Decoder(None, LocalVerifier(long), GREEDY).generate(clip, max_new_tokens=8).tokens


def test_prepared_inputs_without_audio_or_with_too_much(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    decoder = Decoder(model, LocalVerifier(model), GREEDY)
    good = model.prepare(speech)
    none = {**good, "feature_attention_mask": torch.zeros_like(good["feature_attention_mask"])}
    long = {
        **good,
        "feature_attention_mask": torch.ones_like(good["feature_attention_mask"]).repeat(1, 2),
        "input_features": good["input_features"].repeat(1, 1, 2),
    }
    for bad in (none, long):
        with pytest.raises(ModelError, match="audio placeholders, expected"):
            decoder.generate(inputs=bad, verifier_inputs=good, max_new_tokens=4)
        with pytest.raises(ModelError, match="audio placeholders, expected"):
            decoder.generate(inputs=good, verifier_inputs=bad, max_new_tokens=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_silence_is_heard_as_silence(family: str) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)
    for one in [*inputs, *verifier_inputs]:
        for value in one.values():
            if value.is_floating_point():
                value.zero_()
    own = alone(verifier, verifier_inputs)
    assert both_ways(Decoder(draft, LocalVerifier(verifier), GREEDY), inputs, verifier_inputs) == own


# Drafts that are no tokens of the verifier's, or none that it should see


@pytest.mark.parametrize("rule", ["greedy", "rank", "exact", "block", "typical", "relaxed"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_with_tokens_that_the_verifier_lacks(
    rule: Any, temperature: float, audio_lm: LoadModel, speech: Speech
) -> None:
    draft, verifier = audio_lm("qwen2_audio", seed=7), audio_lm("qwen2_5_omni")  # 544 and 512 columns
    if rule == "greedy" and temperature:
        return
    config = UGSDConfig(always_escalate=True, rule=rule, temperature=temperature, eos_token_id=NEVER_ENDS, seed=1)
    clips_of_speech = [speech, (speech[0][::-1].copy(), speech[1]), (speech[0][:20_000], speech[1])]

    def beyond(logits: Tensor, count: int) -> None:
        if count % 2:
            logits[..., 512:] += logits.abs().max() * torch.arange(1, 33)

    with head(draft, beyond):
        decoder = Decoder(draft, LocalVerifier(verifier), config)
        batch = decoder.generate(clips_of_speech, max_new_tokens=TOKENS)
        single = decoder.generate(speech, max_new_tokens=TOKENS)
        drafted = [token for result in batch for block in result.trace.blocks for token in block.draft_tokens]
    assert max(drafted) >= 512
    assert all(0 <= token < 512 for result in [*batch, single] for token in result.tokens), "none was let through"
    assert {len(result.tokens) for result in [*batch, single]} == {TOKENS}
    if not temperature and rule in ("greedy", "exact", "block"):
        own = Decoder(None, LocalVerifier(verifier), GREEDY)
        assert single.tokens == batch[0].tokens
        assert [result.tokens for result in batch] == [
            result.tokens for result in own.generate(clips_of_speech, max_new_tokens=TOKENS)
        ]


def test_a_verifier_with_tokens_that_the_drafter_lacks(audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_5_omni", seed=7), audio_lm("qwen2_audio")

    def beyond(logits: Tensor, _: int) -> None:
        logits[..., 530] = logits.amax(-1) + (logits[..., 7] - logits[..., 8]).sign()

    with head(verifier, beyond):
        results = Decoder(draft, LocalVerifier(verifier), GREEDY).generate([speech, speech], max_new_tokens=TOKENS)
        own = Decoder(None, LocalVerifier(verifier), GREEDY).generate(speech, max_new_tokens=TOKENS)
    assert 530 in own.tokens
    assert [result.tokens for result in results] == [own.tokens] * 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafted_audio_placeholders(family: str, gated: bool) -> None:
    """Where the prompt's placeholders are filled with audio, a drafted one must not be taken for one of them."""
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)
    config = GREEDY if not gated else UGSDConfig(entropy_threshold=0.5, rule="rank", rank=1, eos_token_id=NEVER_ENDS)
    with head(draft, lambda logits, count: favour(tiny.AUDIO_ID, by=1e4 if count % 3 else 0.0)(logits, count)):
        decoder = Decoder(draft, LocalVerifier(verifier), config)
        results = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS)
    drafted = [token for result in results for block in result.trace.blocks for token in block.draft_tokens]
    assert tiny.AUDIO_ID in drafted
    if not gated:
        assert [result.tokens for result in results] == alone(verifier, verifier_inputs)
    for result in results:
        assert len(result.tokens) == TOKENS
        for block in result.trace.blocks:
            if block.escalated:
                assert tiny.AUDIO_ID not in block.emitted


def test_placeholders_as_the_first_draft(audio_lm: LoadModel, speech: Speech) -> None:
    for family in ("qwen2_audio", "qwen2_5_omni", "qwen3_omni"):
        draft, verifier = audio_lm(family, seed=7), audio_lm(family)
        assert verifier.family is not None
        placeholder = verifier.family.audio_token_id(verifier.model.config)
        with head(draft, favour(placeholder)):
            results = Decoder(draft, LocalVerifier(verifier), GREEDY).generate([speech, speech], max_new_tokens=12)
        own = Decoder(None, LocalVerifier(verifier), GREEDY).generate(speech, max_new_tokens=12)
        assert [result.tokens for result in results] == [own.tokens] * 2
        assert results[0].metrics.acceptance_rate == 0.0


# Logits that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_with_some_logits_that_are_no_numbers(family: str, value: float) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)

    def spoil(logits: Tensor, count: int) -> None:
        if count % 2:
            logits[..., 3::7] = value

    with head(draft, spoil):
        decoder = Decoder(draft, LocalVerifier(verifier), GREEDY)
        results = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS)
    assert [result.tokens for result in results] == alone(verifier, verifier_inputs)
    assert all(np.isfinite(h) for result in results for block in result.trace.blocks for h in block.entropy)


@pytest.mark.parametrize(
    ("family", "value"),
    [
        *((family, float("nan")) for family in FAMILIES),
        ("voxtral", float("-inf")),
    ],  # Gemma's soft cap makes -inf finite
)
def test_rows_without_any_number_are_an_error(family: str, value: float) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair(family)

    def spoil(logits: Tensor, count: int) -> None:
        if count == 4:
            logits[...] = value

    for config in (GREEDY, UGSDConfig(always_escalate=True, rule="exact", temperature=1.0, eos_token_id=NEVER_ENDS)):
        decoder = Decoder(draft, LocalVerifier(verifier), config)
        for some, verifier_some in ((inputs[0], verifier_inputs[0]), (inputs, verifier_inputs)):
            with head(draft, spoil), pytest.raises(ModelError, match=r"Drafter: the model's logits have no finite"):
                decoder.generate(inputs=some, verifier_inputs=verifier_some, max_new_tokens=TOKENS)
            with head(verifier, spoil), pytest.raises(ModelError, match=r"the verifier's logits have no finite value"):
                decoder.generate(inputs=some, verifier_inputs=verifier_some, max_new_tokens=99)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", ["greedy", "exact", "block", "rank", "typical", "relaxed"])
def test_a_verifier_with_some_logits_that_are_no_numbers(rule: Any, value: float) -> None:
    draft, verifier, inputs, verifier_inputs = tiny_pair("voxtral")

    def spoil(logits: Tensor, _: int) -> None:
        logits[..., 40:] = value

    config = UGSDConfig(always_escalate=True, rule=rule, rank=1, eos_token_id=NEVER_ENDS)
    with head(verifier, spoil):
        decoder = Decoder(draft, LocalVerifier(verifier), config)
        results = decoder.generate(inputs=inputs, verifier_inputs=verifier_inputs, max_new_tokens=TOKENS)
        if config.lossless:
            assert [result.tokens for result in results] == alone(verifier, verifier_inputs)
    for result in results:
        assert len(result.tokens) == TOKENS
        expected = {token >= 40 for token in result.tokens}
        assert expected == {value == float("inf")}  # infinitely probable, or never


def test_the_embedded_pair_with_a_broken_drafter(pair: EmbeddedPair, captions: list[Any]) -> None:
    decoder = Decoder(pair.draft, pair.verifier, UGSDConfig(always_escalate=True, rule="greedy"))
    own = [result.tokens for result in Decoder(None, pair.verifier).generate(captions, prompt=pair.prompt)]

    def spoil(logits: Tensor, count: int) -> None:
        if count % 3 == 1:
            logits[..., ::2] = float("nan")
        if count % 3 == 2:
            logits[..., 5:] = float("inf")

    with head(pair.draft, spoil):
        assert [result.tokens for result in decoder.generate(captions, prompt=pair.prompt)] == own
        assert [decoder.generate(path, prompt=pair.prompt).tokens for path in captions] == own

    def break_down(logits: Tensor, count: int) -> None:
        if count == 7:
            logits[...] = float("nan")

    with head(pair.draft, break_down), pytest.raises(ModelError, match="Drafter: the model's logits have no finite"):
        decoder.generate(captions, prompt=pair.prompt)
    assert [result.tokens for result in decoder.generate(captions, prompt=pair.prompt)] == own, "nothing stays broken"
