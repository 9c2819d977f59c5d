"""The decoder inside transformers' ``generate``: the same tokens, settings honoured, outputs of the same types."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput

from tests.models.test_families import counted
from tests.models.tiny import FAMILIES, Tiny, build
from ugsd_fast import AudioLM, Decoder, LocalVerifier, ModelError, UGSDConfig
from ugsd_fast.cache import GrowingCache
from ugsd_fast.cache.growing import self_attention
from ugsd_fast.hf import UGSDGenerate
from ugsd_fast.models.families import family_of
from ugsd_fast.models.rows import split_rows
from ugsd_fast.verifier.local import LocalSession

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]

TOKENS = 24
DRAFTERS: dict[str, dict[str, Any]] = {"copy": {}, "noisy": {"noise": 0.1}, "random": {"seed": 7}}
PROMPTED = [name for name in FAMILIES if name not in ("whisper", "moonshine")]
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class EndsInThree(StoppingCriteria):
    """A criterion of one's own."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] % 10 == 3


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": 20},
    "bad_words": {"bad_words_ids": [[9], [3, 4], [70]]},
    "suppress": {"suppress_tokens": [5, 6, 7, 8, 30, 31, 32, 33]},
    "begin_suppress": {"begin_suppress_tokens": list(range(0, 96, 2))},
    "forced_eos": {"forced_eos_token_id": 11},
    "exponential_decay": {"exponential_decay_length_penalty": (4, 1.3)},
    "max_length": {"max_length": 45, "max_new_tokens": None},
    "criterion": {"stopping_criteria": StoppingCriteriaList([EndsInThree()])},
    "max_length_criterion": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(19)])},
}  # fmt: skip


@pytest.fixture(scope="module")
def verifiers() -> dict[str, Tiny]:
    return {family: build(family) for family in FAMILIES}


def kwargs_of(tiny: Tiny) -> dict[str, Any]:
    entry = family_of(tiny.model.config.model_type)
    assert entry is not None
    return dict(entry.forward_kwargs)


def batch_of(tiny: Tiny, clips: int) -> dict[str, Tensor]:
    """Prompts of growing length, left-padded, each with a clip of its own."""
    rows = [tiny.inputs(clip) for clip in range(clips)]
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "input_ids"}
    if "input_ids" in rows[0]:
        ids = [torch.cat([row["input_ids"][0], torch.arange(20, 20 + clip)]) for clip, row in enumerate(rows)]
        width = max(map(len, ids))
        together["input_ids"] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])[:, None]
        together["attention_mask"] = (torch.arange(width) >= width - lengths).long()
    return together


def row_of(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_generate(family: str, drafter: str, verifiers: dict[str, Tiny]) -> None:
    target, draft = verifiers[family], build(family, **DRAFTERS[drafter])
    settings = {**target.inputs(), **kwargs_of(target), "max_new_tokens": 64, "do_sample": False}
    ugsd = UGSDGenerate(draft.model, draft.inputs())
    with counted(draft.tower, target.tower) as calls:
        output = target.model.generate(**settings, custom_generate=ugsd)
    assert calls == [1, 1]
    assert torch.equal(output, target.model.generate(**settings))
    if drafter == "copy":
        assert ugsd.results[0].metrics.acceptance_rate == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_padded_prompts(family: str, verifiers: dict[str, Tiny]) -> None:
    """Rows end one by one; processors see the padded prompt, as generate's do."""
    target, draft = verifiers[family], build(family, noise=0.1)
    inputs = batch_of(target, 4)
    settings = {**kwargs_of(target), "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    plain = target.model.generate(**inputs, **settings)
    ugsd = UGSDGenerate(draft.model, batch_of(draft, 4), max_batch_size=3)
    early = plain[:, -TOKENS : 6 - TOKENS].flatten().tolist()
    end = next(token for token in plain[1, 6 - TOKENS :].tolist() if token not in early)
    for processors in ({}, {"repetition_penalty": 1.5, "min_new_tokens": 9}, SETTINGS["criterion"]):
        more = {**settings, **processors, "eos_token_id": end}
        own = target.model.generate(**inputs, **more)
        assert torch.equal(target.model.generate(**inputs, **more, custom_generate=ugsd), own)
        assert processors or len({len(result.tokens) for result in ugsd.results}) > 1


def test_rows_may_have_several_clips_or_none(verifiers: dict[str, Tiny]) -> None:
    """As the processor lays them out: all clips of all rows behind each other."""
    tiny = verifiers["audioflamingo3"]
    one, two = tiny.inputs(0), tiny.inputs(1)
    prompts = [torch.cat([one["input_ids"], two["input_ids"]], 1)[0], torch.arange(30, 36), two["input_ids"][0]]
    rows = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (26 - len(row), 0)) for row in prompts]),
        "attention_mask": torch.stack([(torch.arange(26) >= 26 - len(row)).long() for row in prompts]),
        **{name: torch.cat([one[name], two[name], two[name]]) for name in ("input_features", "input_features_mask")},
    }
    model = AudioLM(tiny.model)
    split = split_rows(model, rows)
    assert [row["input_ids"].shape[1] for row in split] == [26, 6, 13]
    assert [len(row.get("input_features", ())) for row in split] == [2, 0, 1]
    ugsd = UGSDGenerate(build("audioflamingo3", noise=0.1).model, lambda inputs: inputs)
    settings = {**rows, "max_new_tokens": TOKENS, "do_sample": False}
    output = tiny.model.generate(**settings, custom_generate=ugsd)
    assert torch.equal(output, tiny.model.generate(**settings))
    with pytest.raises(ModelError, match="placeholders for 2 of 3 clips"):
        split_rows(model, {**rows, "input_ids": rows["input_ids"][:2], "attention_mask": rows["attention_mask"][:2]})
    with pytest.raises(ModelError, match="expected left padding only"):
        split_rows(model, {**rows, "attention_mask": rows["attention_mask"].flip(1)})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["voxtral", "gemma4", "whisper"])
def test_settings_are_honoured(name: str, family: str, verifiers: dict[str, Tiny]) -> None:
    target = verifiers[family]
    settings: dict[str, Any] = {**target.inputs(), "max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": 11}
    settings |= SETTINGS[name]
    own = target.model.generate(**settings)
    for drafter in DRAFTERS.values() if name in ("plain", "repetition_penalty") else [DRAFTERS["noisy"]]:
        draft = build(family, **drafter)
        ugsd = UGSDGenerate(draft.model, draft.inputs())
        assert torch.equal(target.model.generate(**settings, custom_generate=ugsd), own)
        if not drafter:
            assert ugsd.results[0].metrics.acceptance_rate == 1.0


def test_stop_strings_stop_where_generate_does(audio_lm: LoadModel, speech: Speech) -> None:
    verifier, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", noise=0.05)
    inputs = verifier.prepare(speech)
    settings: dict[str, Any] = {**inputs, "max_new_tokens": TOKENS, **GREEDY, "eos_token_id": None, "pad_token_id": 0}
    plain = verifier.model.generate(**settings)[0, inputs["input_ids"].shape[1] :]
    words = [verifier.decode([token]) for token in plain.tolist()]
    stop = next(word for word in words[4:] if word.isascii() and word not in "".join(words[:4]))
    own = verifier.model.generate(**settings, stop_strings=[stop], tokenizer=verifier.tokenizer)
    ugsd = UGSDGenerate(draft, draft.prepare(speech), processor=verifier.processor)
    assert torch.equal(verifier.model.generate(**settings, stop_strings=[stop], custom_generate=ugsd), own)
    assert own.shape[1] < inputs["input_ids"].shape[1] + TOKENS
    unknown = UGSDGenerate(draft, draft.prepare(speech))
    with pytest.raises(ValueError, match=r"expected UGSDGenerate\(processor=...\)"):
        verifier.model.generate(**settings, stop_strings=stop, custom_generate=unknown)


@pytest.mark.parametrize("family", ["voxtral", "moonshine", "whisper"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_outputs_are_of_generates_types(family: str, sampled: bool, verifiers: dict[str, Tiny]) -> None:
    target, draft = verifiers[family], build(family, noise=0.1)
    inputs = batch_of(target, 2)
    settings = {
        **inputs,
        "max_new_tokens": 12,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    settings |= {"output_scores": True, "output_logits": True, "suppress_tokens": [4, 9, 20]}
    own = target.model.generate(**settings, do_sample=False)
    if family == "whisper":
        settings["temperature"] = 0.8 if sampled else None
        settings["top_k"] = 7
    elif sampled:
        settings |= {"do_sample": True, "temperature": 0.8, "top_k": 7}
    ugsd = UGSDGenerate(draft.model, batch_of(draft, 2))
    output = target.model.generate(**settings, custom_generate=ugsd)
    assert type(output) is type(own)
    assert output.sequences.dtype == torch.long
    steps = 12
    assert len(output.scores) == len(output.logits) == steps
    assert all(part.shape == (2, 96) and part.dtype == torch.float32 for part in (*output.scores, *output.logits))
    if not sampled:
        assert torch.equal(output.sequences, own.sequences)
        for ours, theirs in zip((*output.logits, *output.scores), (*own.logits, *own.scores), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        transitions = [target.model.compute_transition_scores(one.sequences, one.scores) for one in (output, own)]
        torch.testing.assert_close(*transitions, rtol=1e-4, atol=1e-4)
    else:
        written = output.sequences[:, -steps:]
        for step, scores in enumerate(output.scores):
            assert (scores > -torch.inf).sum(1).tolist() == [7, 7]
            assert bool((scores.gather(1, written[:, step : step + 1]) > -torch.inf).all())
            expected = output.logits[step].clone()
            expected[:, [4, 9, 20]] = -torch.inf
            kept = scores > -torch.inf
            torch.testing.assert_close(scores[kept], (expected / 0.8)[kept], rtol=1e-5, atol=1e-5)
    output.scores[0].add_(1)  # ordinary tensors, not of inference mode


def test_scores_of_rows_that_have_ended_are_zero(verifiers: dict[str, Tiny]) -> None:
    target = verifiers["voxtral"]
    settings = {**batch_of(target, 3), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    end = int(target.model.generate(**settings)[1, -8])
    ugsd = UGSDGenerate(build("voxtral", noise=0.1).model, lambda inputs: inputs)
    output = target.model.generate(
        **settings, eos_token_id=end, custom_generate=ugsd, return_dict_in_generate=True, output_scores=True
    )
    assert output.logits is None
    for row, result in enumerate(ugsd.results):
        assert [bool(scores[row].any()) for scores in output.scores] == [
            step < len(result.tokens) for step in range(len(output.scores))
        ]


def assert_caches_are_one(ours: Any, theirs: Any, mask: Tensor | None = None) -> None:
    """Types, lengths, and keys and values [B, H, T, D] of every layer, where `mask` [B, T] is 1."""
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()
    parts = [(self_attention(ours), self_attention(theirs))]
    if ours is not parts[0][0]:
        assert ours.is_updated == theirs.is_updated
        parts.append((ours.cross_attention_cache, theirs.cross_attention_cache))
    for own, other in parts:
        assert [type(layer) for layer in own.layers] == [type(layer) for layer in other.layers]
        for layer, expected in zip(own.layers, other.layers, strict=True):
            if getattr(expected, "keys", None) is None:
                assert getattr(layer, "keys", None) is None
                continue
            assert not layer.keys.is_inference()
            for states, wanted in ((layer.keys, expected.keys), (layer.values, expected.values)):
                assert states.shape == wanted.shape
                seen = torch.ones_like(states)
                if mask is not None:
                    seen = seen * mask[:, None, -states.shape[2] :, None]
                torch.testing.assert_close(states * seen, wanted * seen, rtol=1e-4, atol=1e-4)


def go_on(tiny: Tiny, output: Any, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """What transformers' own generate writes behind an output, of its tokens and its cache."""
    ids = output.sequences
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    if tiny.model.config.is_encoder_decoder:
        inputs = {**tiny.inputs(), "decoder_input_ids": ids, "decoder_attention_mask": inputs["attention_mask"]}
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    return tiny.model.generate(**inputs, past_key_values=output.past_key_values, max_new_tokens=9, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_goes_on_from_the_cache_as_from_generates(family: str, verifiers: dict[str, Tiny]) -> None:
    """Without audio, which the cache has heard: the tokens of a generate that was never interrupted."""
    target, draft = verifiers[family], build(family, noise=0.1)
    settings = {**target.inputs(), **kwargs_of(target), "do_sample": False, "return_dict_in_generate": True}
    ugsd = UGSDGenerate(draft.model, draft.inputs())
    for tokens in (1, 12):  # nothing behind the prompt is cached, and more than a window
        own = target.model.generate(**settings, max_new_tokens=tokens)
        output = target.model.generate(**settings, max_new_tokens=tokens, custom_generate=ugsd)
        assert list(output) == list(own)
        assert_caches_are_one(output.past_key_values, own.past_key_values)
        whole = target.model.generate(**settings, max_new_tokens=tokens + 9).sequences
        assert torch.equal(go_on(target, output)[:, -9:], whole[:, -9:])  # Whisper leaves the prompt out


@pytest.mark.parametrize("family", ["voxtral", "phi4_multimodal", "gemma3n", "gemma4", "whisper", "moonshine"])
def test_the_cache_of_a_padded_batch_is_generates(family: str, verifiers: dict[str, Tiny]) -> None:
    """Rows that have ended go on with padding there, as generate's do."""
    target, draft = verifiers[family], build(family, noise=0.1)
    inputs = batch_of(target, 3)
    settings = {**inputs, **kwargs_of(target), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
    plain = target.model.generate(**settings)[:, -12:].tolist()
    ends = [token for token in plain[1][4:] if len({row.index(token) if token in row else 12 for row in plain}) > 1]
    settings |= {"eos_token_id": ends[0], "return_dict_in_generate": True}
    own = target.model.generate(**settings)
    ugsd = UGSDGenerate(draft.model, batch_of(draft, 3), max_batch_size=2)
    output = target.model.generate(**settings, custom_generate=ugsd)
    lengths = torch.tensor([len(result.tokens) for result in ugsd.results])
    assert len(set(lengths.tolist())) > 1
    prompt = inputs.get("attention_mask") if "input_ids" in inputs else None
    if prompt is None:
        assert_caches_are_one(output.past_key_values, own.past_key_values)
        return
    steps = torch.arange(int(lengths.max())).expand(3, -1)
    mask = torch.cat([prompt, torch.ones_like(steps)], 1)
    assert_caches_are_one(output.past_key_values, own.past_key_values, mask[:, :-1])
    for seen in (mask, torch.cat([prompt, (steps < lengths[:, None]).long()], 1)):
        more = {**settings, "input_ids": output.sequences, "attention_mask": seen, "max_new_tokens": 9}
        fresh = target.model.generate(**{**more, "eos_token_id": None}).sequences
        assert torch.equal(go_on(target, copy.deepcopy(output), seen), fresh)


def test_a_cache_of_ones_own_is_filled(verifiers: dict[str, Tiny]) -> None:
    """With or without return_dict_in_generate; of any kind; ordinary tensors, through which gradients flow."""
    target = verifiers["voxtral"]
    settings = {**target.inputs(), "max_new_tokens": 12, "do_sample": False}
    whole = target.model.generate(**{**settings, "max_new_tokens": 21})
    ugsd = UGSDGenerate(build("voxtral", noise=0.1).model, lambda inputs: inputs)
    text = target.model.config.get_text_config()
    for cache in (DynamicCache(), GrowingCache(text), StaticCache(config=text, max_cache_len=64)):
        tokens = target.model.generate(**settings, past_key_values=cache, custom_generate=ugsd)
        assert int(cache.get_seq_length()) == tokens.shape[1] - 1
        output = GenerateDecoderOnlyOutput(sequences=tokens, past_key_values=cache)
        assert torch.equal(go_on(target, output), whole)
    output = target.model.generate(**settings, return_dict_in_generate=True, custom_generate=ugsd)
    logits = target.model(output.sequences[:, -1:], past_key_values=output.past_key_values).logits
    logits.sum().backward()
    target.model.zero_grad()


def test_nothing_is_kept_unless_asked_for(verifiers: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    target = verifiers["voxtral"]
    opened: list[LocalSession] = []
    monkeypatch.setattr(LocalSession, "close", lambda self: opened.append(self))
    ugsd = UGSDGenerate(build("voxtral", noise=0.1).model, lambda inputs: inputs)
    settings = {**target.inputs(), "max_new_tokens": 4, "do_sample": False, "custom_generate": ugsd}
    target.model.generate(**settings)
    decoder = ugsd._decoder
    output = target.model.generate(**settings, return_dict_in_generate=True, output_scores=True)
    assert [session.keeps_cache for session in opened] == [False, True]
    assert ugsd._decoder is decoder
    assert output.past_key_values is not None
    # Where generate counts padding among the positions, a loop without padding has other keys.
    padded = batch_of(verifiers["vibevoice_asr"], 2)
    alone = UGSDGenerate(build("vibevoice_asr").model, padded)
    settings = {**padded, **kwargs_of(verifiers["vibevoice_asr"]), "max_new_tokens": 4, "do_sample": False}
    output = verifiers["vibevoice_asr"].model.generate(
        **settings, pad_token_id=0, custom_generate=alone, return_dict_in_generate=True
    )
    assert output.past_key_values is None


def test_without_room_for_the_padding_no_cache_is_returned() -> None:
    """The longest prompt's row ends early, and another runs on until padding there would change frequencies."""
    target, draft = build("phi4_multimodal"), build("phi4_multimodal", noise=0.1)
    inputs = batch_of(target, 3)
    settings = {**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first, *others = target.model.generate(**settings).sequences[:, -12:].tolist()
    settings["eos_token_id"] = [next(token for token in row if token not in first) for row in others]
    ugsd = UGSDGenerate(draft.model, batch_of(draft, 3))
    own = target.model.generate(**settings)
    target.model.config.rope_parameters = {**(target.model.config.rope_parameters or {}), "rope_type": "longrope"}
    for room, has_cache in ((inputs["input_ids"].shape[1] + 10, False), (512, True)):
        target.model.config.original_max_position_embeddings = room
        output = target.model.generate(**settings, custom_generate=ugsd)
        assert torch.equal(output.sequences, own.sequences)
        assert (output.past_key_values is not None) == has_cache
        assert len(ugsd.results[0].tokens) == 12 > max(len(result.tokens) for result in ugsd.results[1:])


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni"])
@pytest.mark.parametrize("threshold", [0.0, None, 1e9], ids=["verified", "lossy", "local"])
def test_what_the_verifier_never_saw_is_in_the_cache(
    family: str, threshold: float | None, audio_lm: LoadModel, speech: Speech
) -> None:
    """transformers counts on a cache of all tokens but the newest: one forward adds what was accepted locally."""
    verifier, draft = audio_lm(family), audio_lm(family, noise=0.05)
    if threshold is None:
        edge = Decoder(draft, None, UGSDConfig(eos_token_id=-1)).generate(speech, max_new_tokens=TOKENS)
        threshold = float(np.median([block.uncertainty for block in edge.trace.blocks]))
    inputs = verifier.prepare(speech)
    settings: dict[str, Any] = {**GREEDY, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": TOKENS}
    ugsd = UGSDGenerate(draft, draft.prepare(speech), UGSDConfig(entropy_threshold=threshold, rank=3))
    output = verifier.model.generate(**inputs, **settings, return_dict_in_generate=True, custom_generate=ugsd)
    ids = output.sequences
    assert output.past_key_values.get_seq_length() == ids.shape[1] - 1
    together = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = verifier.model.generate(**together, **settings)
    text = {name: together[name] for name in ("input_ids", "attention_mask")}
    again = verifier.model.generate(**text, **settings, past_key_values=output.past_key_values)
    assert torch.equal(again, whole)


def test_sampling_follows_torchs_generator_and_the_verifiers_law(verifiers: dict[str, Tiny]) -> None:
    """1,536 draws of two tokens, drafted by another model, against the verifier's own probabilities (chi-square)."""
    target = verifiers["voxtral"]
    ugsd = UGSDGenerate(build("voxtral", noise=0.3).model, lambda inputs: inputs, UGSDConfig(
        always_escalate=True, rule="block", block_size=2), max_batch_size=64)  # fmt: skip
    row = target.inputs()
    many = {name: value.repeat_interleave(64, 0) for name, value in row.items()}
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 0.95, "max_new_tokens": 2}

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return target.model.generate(**many, **settings, custom_generate=ugsd)[:, -2:]

    assert torch.equal(draw(0), draw(0))
    drawn = torch.cat([draw(seed) for seed in range(24)])
    assert not torch.equal(drawn[:64], drawn[64:128])
    assert 0 < ugsd.results[0].metrics.verifier_forwards <= 2
    greedy: dict[str, Any] = {**settings, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    chi2 = cells = 0.0
    first = target.model.generate(**row, **greedy).scores[0].softmax(-1)[0]
    for one in first.nonzero()[:, 0].tolist():
        longer = {**row, "input_ids": torch.cat([row["input_ids"], torch.tensor([[one]])], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        second = target.model.generate(**longer, **greedy).scores[0].softmax(-1)[0]
        for other in second.nonzero()[:, 0].tolist():
            expected = float(first[one] * second[other]) * len(drawn)
            found = int(((drawn[:, 0] == one) & (drawn[:, 1] == other)).sum())
            chi2 += (found - expected) ** 2 / expected
            cells += 1
    assert cells > 3
    assert chi2 < 4 * cells + 10  # far beyond the 99.9th percentile of up to 8 degrees of freedom


def test_a_lossy_config_is_the_decoders_own_run(audio_lm: LoadModel, speech: Speech) -> None:
    verifier, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", noise=0.05)
    edge = Decoder(draft, None, UGSDConfig(eos_token_id=-1)).generate(speech, max_new_tokens=TOKENS)
    config = UGSDConfig(entropy_threshold=float(np.median([b.uncertainty for b in edge.trace.blocks])), rank=3)
    ugsd = UGSDGenerate(draft, draft.prepare(speech), config)
    inputs = verifier.prepare(speech)
    settings = {**inputs, "max_new_tokens": TOKENS, **GREEDY}
    output = verifier.model.generate(**settings, custom_generate=ugsd)
    own = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=TOKENS)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == own.tokens == ugsd.results[0].tokens
    assert 0 < own.metrics.escalated_share < 1
    assert ugsd.results[0].metrics.escalated_share == own.metrics.escalated_share
    with pytest.raises(ValueError, match="always_escalate=False, expected True"):
        verifier.model.generate(**settings, return_dict_in_generate=True, output_scores=True, custom_generate=ugsd)


def test_other_tokenizers_and_no_drafter(audio_lm: LoadModel, speech: Speech) -> None:
    verifier, draft = audio_lm("qwen3_omni"), audio_lm("qwen2_5_omni", noise=0.05)
    inputs = verifier.prepare(speech)
    settings: dict[str, Any] = {**inputs, "max_new_tokens": TOKENS, **GREEDY}
    own = verifier.model.generate(**settings)
    across = UGSDGenerate(draft, draft.prepare(speech), processor=verifier.processor)
    alone = UGSDGenerate()
    for ugsd in (across, alone):
        assert torch.equal(verifier.model.generate(**settings, custom_generate=ugsd), own)
    assert alone.results[0].metrics.drafter_forwards == 0


def test_the_decoder_is_kept_between_calls(verifiers: dict[str, Tiny]) -> None:
    target, draft = verifiers["voxtral"], build("voxtral", noise=0.1)
    ugsd = UGSDGenerate(draft.model)

    def decode(tiny: Tiny, clip: int, **settings: Any) -> Decoder:
        settings = {**tiny.inputs(clip), "max_new_tokens": 8, "do_sample": False, **settings}
        own = tiny.model.generate(**settings) if not settings["do_sample"] else None
        output = tiny.model.generate(**settings, custom_generate=ugsd, drafter_inputs=draft.inputs(clip))
        assert own is None or torch.equal(output, own)
        assert ugsd._decoder is not None
        return ugsd._decoder

    first = decode(target, 0)
    assert decode(target, 1) is first
    assert decode(target, 0, eos_token_id=3) is not first
    sampling = decode(target, 0, do_sample=True)
    assert decode(target, 1, do_sample=True) is sampling
    assert decode(verifiers["audioflamingo3"], 0).verifier is not first.verifier


def test_whispers_long_audio_is_drafted_segment_by_segment(verifiers: dict[str, Tiny]) -> None:
    """transformers cuts long audio itself and calls for each segment; its suppressed tokens are honoured."""
    target, draft = build("whisper"), build("whisper", noise=0.1)
    settings: dict[str, Any] = {
        "input_features": torch.randn(1, 8, 3 * 48, generator=torch.Generator().manual_seed(5)),
        "attention_mask": torch.ones(1, 3 * 48, dtype=torch.long),
        "return_timestamps": True,
        "suppress_tokens": [4, 9, 20],
        "begin_suppress_tokens": [7, 8],
        "max_new_tokens": TOKENS,
    }
    target.model.generation_config.no_timestamps_token_id = 80
    target.model.generation_config.eos_token_id = 2
    own = target.model.generate(**settings)
    heard = []

    def segment(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        heard.append(inputs["input_features"].shape[-1])
        return {name: inputs[name] for name in ("input_features", "decoder_input_ids")}

    ugsd = UGSDGenerate(draft.model, segment)
    assert torch.equal(target.model.generate(**settings, custom_generate=ugsd), own)
    assert len(heard) > 1
    assert set(heard) == {48}


class Recorder:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.put_in: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_in.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamers_are_fed_final_tokens(audio_lm: LoadModel, speech: Speech, capsys: pytest.CaptureFixture) -> None:
    verifier, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", noise=0.05)
    tokenizer, inputs = verifier.tokenizer, verifier.prepare(speech)
    settings: dict[str, Any] = {**inputs, "max_new_tokens": TOKENS, **GREEDY, "eos_token_id": None, "pad_token_id": 0}
    prompted, silent = TextStreamer(tokenizer), TextStreamer(tokenizer, skip_prompt=True)
    for streamer in (prompted, silent):
        verifier.model.generate(**settings, streamer=streamer)
        own = capsys.readouterr().out
        ugsd = UGSDGenerate(draft, draft.prepare(speech), streamer=streamer)
        output = verifier.model.generate(**settings, custom_generate=ugsd)
        assert capsys.readouterr().out == own
    assert torch.equal(output, verifier.model.generate(**settings))

    recorder = Recorder()
    decoder = Decoder(draft, LocalVerifier(verifier), UGSDConfig(entropy_threshold=1.0, rank=3, eos_token_id=-1))
    result = decoder.generate(speech, max_new_tokens=TOKENS, streamer=recorder)
    assert torch.equal(recorder.put_in[0], inputs["input_ids"])
    assert [value[0].tolist() for value in recorder.put_in[1:]] == [list(b.emitted) for b in result.trace.blocks]
    assert recorder.ended == 1
    with pytest.raises(ValueError, match="streamer is given with a list of 2"):
        decoder.generate([speech, speech], streamer=recorder)


def test_events_carry_final_text_entropies_and_sources(audio_lm: LoadModel, speech: Speech) -> None:
    verifier, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", noise=0.05)
    edge = Decoder(draft, None, UGSDConfig(block_size=3, eos_token_id=-1)).generate(speech, max_new_tokens=64)
    threshold = float(np.median([block.uncertainty for block in edge.trace.blocks]))
    config = UGSDConfig(block_size=3, entropy_threshold=threshold, rank=2, bonus=True, eos_token_id=-1)
    decoder = Decoder(draft, LocalVerifier(verifier), config)
    events = list(decoder.stream(speech, max_new_tokens=64))
    own = decoder.generate(speech, max_new_tokens=64)
    result = events[-1].result
    assert result is not None
    assert all(event.result is None for event in events[:-1])
    assert "".join(event.text for event in events) == result.text == own.text
    tokens = [token for event in events for token in event.tokens]
    assert [token.token for token in tokens] == result.tokens == own.tokens
    assert {token.source for token in tokens} == {"edge", "accepted", "corrected", "bonus"}
    for token in tokens:
        assert (token.entropy is None) == (token.source in ("corrected", "bonus"))


def test_text_can_be_iterated_over_in_another_thread(audio_lm: LoadModel, speech: Speech) -> None:
    verifier, draft = audio_lm("qwen2_audio"), audio_lm("qwen2_audio", noise=0.05)
    decoder = Decoder(draft, LocalVerifier(verifier))
    streamer = TextIteratorStreamer(verifier.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(decoder.generate(speech, max_new_tokens=TOKENS, streamer=streamer))
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == results[0].text

    broken = Decoder(draft, LocalVerifier(verifier))
    broken._draft = None  # type: ignore[assignment]  # fails behind the prompt
    with pytest.raises(TypeError):
        broken.generate(speech, streamer=streamer)
    assert "".join(streamer) == ""  # ended all the same


REFUSED = {
    "beams": ({"num_beams": 2}, "generation mode is 'beam_search'"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "generation mode is 'assisted_generation'"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions is True"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states is True"),
    "guidance": ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor cannot be honoured"),
    "streamer": ({"streamer": Recorder()}, r"hands to no custom_generate, expected UGSDGenerate\(streamer=...\)"),
    "positions": ({"position_ids": torch.arange(3, 13)[None]}, "position_ids are not those of a prompt"),
    "its own rows": ({"drafter_inputs": {"input_ids": torch.ones(2, 3).long()}}, "have 2 rows, expected 1"),
    "a rule that samples not": ({"do_sample": True}, "rule='greedy' with temperature=1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name: str, verifiers: dict[str, Tiny]) -> None:
    target = verifiers["voxtral"]
    settings, message = REFUSED[name]
    ugsd = UGSDGenerate(target.model, target.inputs(), UGSDConfig(always_escalate=True, rule="greedy"))
    with pytest.raises(ValueError, match=message):
        target.model.generate(**target.inputs(), max_new_tokens=4, custom_generate=ugsd, **settings)


def test_errors_name_the_row(verifiers: dict[str, Tiny]) -> None:
    target = verifiers["audioflamingo3"]
    inputs = batch_of(target, 3)
    ugsd = UGSDGenerate(build("audioflamingo3", noise=0.1).model, lambda inputs: inputs)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "custom_generate": ugsd}
    target.model.generate(**inputs, **settings)
    assert len(ugsd.results) == 3
    placeholder = int(inputs["input_ids"][1].mode().values)
    ids = inputs["input_ids"].clone()
    ids[1, (ids[1] == placeholder).int().argmax()] = 9
    with pytest.raises(ModelError, match="audio placeholders, expected") as raised:
        target.model.generate(**{**inputs, "input_ids": ids}, **settings)
    assert raised.value.__notes__ == ["row 2 of 3: inputs[1]"]
    assert ugsd.results == []
    mask = inputs["attention_mask"].clone()
    mask[2, 5] = 0
    with pytest.raises(ModelError, match="row 3 of 3: the attention mask has zeros behind the prompt's first token"):
        target.model.generate(**{**inputs, "attention_mask": mask}, **settings)


def test_an_assistant_belongs_in_the_drafter(verifiers: dict[str, Tiny]) -> None:
    target = verifiers["voxtral"]
    ugsd = UGSDGenerate(target.model, target.inputs())
    with pytest.raises(ValueError, match=r"given assistant_model.*expected UGSDGenerate\(drafter=...\)"):
        target.model.generate(**target.inputs(), custom_generate=ugsd, assistant_model=target.model)
    with pytest.raises(ValueError, match="drafter_inputs is None, expected the drafter's own"):
        target.model.generate(**target.inputs(), custom_generate=UGSDGenerate(target.model))


def test_sampling_and_ends_are_the_calls(verifiers: dict[str, Tiny]) -> None:
    target = verifiers["voxtral"]
    for config, name in ((UGSDConfig(temperature=0.5), "temperature"), (UGSDConfig(eos_token_id=7), "eos_token_id")):
        ugsd = UGSDGenerate(target.model, target.inputs(), config)
        with pytest.raises(ValueError, match=rf"config.{name} is .* expected the default in the config"):
            target.model.generate(**target.inputs(), max_new_tokens=4, do_sample=False, custom_generate=ugsd)
    agreeing = UGSDGenerate(target.model, target.inputs(), UGSDConfig(eos_token_id=[7, 9]))
    target.model.generate(
        **target.inputs(), max_new_tokens=4, do_sample=False, eos_token_id=[9, 7], custom_generate=agreeing
    )


def test_several_sequences_of_one_prompt_are_draws_of_their_own(verifiers: dict[str, Tiny]) -> None:
    target = verifiers["voxtral"]
    ugsd = UGSDGenerate(target.model, target.inputs())
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(target.model.generate(**target.inputs(), **settings, custom_generate=ugsd))
        assert all(result.metrics.acceptance_rate == 1.0 for result in ugsd.results)  # of a copy
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0].tolist()}) == 3
