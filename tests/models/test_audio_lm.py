"""Loading, preparing inputs and reading off what a model is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from ugsd_fast import AudioLM
from ugsd_fast.errors import AudioError, ModelError
from ugsd_fast.models.sequence import CachedSequence

FAMILIES = ("qwen2_audio", "qwen2_5_omni", "qwen3_omni")
CLASSES = {
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_the_class_that_writes_text(family: str, audio_lm: LoadModel) -> None:
    model = audio_lm(family)
    assert type(model.model).__name__ == CLASSES[family]
    assert not model.model.training
    assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.eos_token_ids
    assert model.vocab_size == model.model.config.get_text_config(decoder=True).vocab_size


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_goes_through_the_chat_template(family: str, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    inputs = model.prepare(speech, "What does the voice say?")
    text = model.tokenizer.decode(inputs["input_ids"][0])
    assert "What does the voice say?<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    placeholders = int((inputs["input_ids"] == model.model.config.audio_token_id).sum())
    assert placeholders == {"qwen2_audio": 50, "qwen2_5_omni": 50, "qwen3_omni": 26}[family]


def test_other_rates_and_channels_make_the_same_inputs(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    samples, rate = speech
    stereo = np.stack([samples, samples], axis=1)
    one, two = model.prepare((samples, rate)), model.prepare((stereo, rate))
    torch.testing.assert_close(one["input_features"], two["input_features"])
    doubled = model.prepare((np.repeat(samples, 2), 2 * rate))
    assert doubled["input_ids"].shape == one["input_ids"].shape


@pytest.mark.parametrize("family", ["qwen2_5_omni"])
def test_padding_frames_are_cut_without_a_difference(family: str, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    inputs = model.prepare(speech)
    assert inputs["input_features"].shape[-1] == 200
    padded = dict(inputs)
    for name in ("input_features", "feature_attention_mask"):
        padded[name] = torch.nn.functional.pad(inputs[name], (0, 1000))
    with torch.inference_mode():
        torch.testing.assert_close(model.model(**inputs).logits, model.model(**padded).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni"])
def test_audio_beyond_the_window_is_refused_not_cut(family: str, audio_lm: LoadModel) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 13 * 16_000).astype(np.float32)
    with pytest.raises(AudioError, match=r"lasts 13\.00 s, expected at most (4|12) s"):
        audio_lm(family).prepare((samples, 16_000))
    assert audio_lm("qwen3_omni").prepare((samples, 16_000))["input_ids"].shape[1] > 13 * 13


def test_a_processor_of_another_family_is_noticed(audio_lm: LoadModel, speech: Speech) -> None:
    mixed = AudioLM(audio_lm("qwen3_omni").model, audio_lm("qwen2_5_omni").processor)
    with pytest.raises(ModelError, match="audio placeholders, expected 26"):
        mixed.prepare(speech)


def test_only_the_last_logits_of_a_prompt_are_computed(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    sizes = []
    hook = model.model.lm_head.register_forward_hook(lambda _, args, output: sizes.append(output.shape[1]))
    try:
        sequence = model.open(model.prepare(speech))
        sequence.forward(torch.zeros(1, 0, dtype=torch.long))
        sequence.forward(torch.zeros(1, 3, dtype=torch.long))
    finally:
        hook.remove()
    assert sizes == [1, 3]
    assert not model.model.lm_head._forward_pre_hooks


def test_two_sequences_of_one_model_do_not_disturb_each_other(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_5_omni")
    inputs = model.prepare(speech)
    short = {"input_ids": inputs["input_ids"][:, -7:]}
    tokens = torch.tensor([[5, 6, 7]])

    def run(sequences: list[CachedSequence]) -> list[torch.Tensor]:
        for sequence in sequences:
            sequence.forward(torch.zeros(1, 0, dtype=torch.long))
        return [sequence.forward(tokens) for sequence in sequences]

    together = run([model.open(inputs), model.open(short)])
    torch.testing.assert_close(together[0], run([model.open(inputs)])[0])
    torch.testing.assert_close(together[1], run([model.open(short)])[0])


def test_left_padded_prompts_give_the_same_logits(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    inputs = model.prepare(speech)
    padded = dict(inputs)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (3, 0))
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0))
    logits = []
    for prepared in (inputs, padded):
        sequence = model.open(prepared)
        sequence.forward(torch.tensor([[8, 9, 10]]))
        sequence.rollback(2)
        logits.append(sequence.forward(torch.tensor([[11, 12]])))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_dtype_of_the_checkpoint_unless_a_cpu_cannot(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = AudioLM.from_pretrained(checkpoint("qwen2_audio"), device="cpu").model
    for saved, loaded in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        path = tmp_path / str(saved)
        model.to(saved).save_pretrained(path)
        AudioLM.from_pretrained(checkpoint("qwen2_audio"), device="cpu").processor.save_pretrained(path)
        assert AudioLM.from_pretrained(path, device="cpu").model.dtype == loaded
    assert AudioLM.from_pretrained(path, device="cpu", dtype=torch.float64).model.dtype == torch.float64


def test_unknown_missing_and_damaged_models_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load model nobody/nothing"):
        AudioLM.from_pretrained("nobody/nothing")
    with pytest.raises(ModelError, match="it has no config.json"):
        AudioLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="model type is 'bert', expected one of qwen2_audio"):
        AudioLM.from_pretrained(tmp_path)
    missing = tmp_path / "missing"
    shutil.copytree(checkpoint("qwen2_audio"), missing)
    weights = load_file(missing / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({name: weight for name, weight in weights.items() if name != dropped}, missing / "model.safetensors")
    with pytest.raises(ModelError, match="has no .*q_proj.weight .1 weights are missing"):
        AudioLM.from_pretrained(missing)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint("qwen2_audio").iterdir():
        data = file.read_bytes()
        (damaged / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ModelError, match="cannot load model"):
        AudioLM.from_pretrained(damaged)


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=16, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder of no known family"):
        AudioLM(T5ForConditionalGeneration(config))
