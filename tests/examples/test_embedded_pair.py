"""The shipped pair and clips: complete, small, loadable offline, held out."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from examples.embedded_pair.captions import PROMPT, audio_tokens, prompt_ids
from examples.embedded_pair.train import load_checkpoint, save_checkpoint
from ugsd_fast.demo import CLIPS_FOLDER, PAIR_FOLDER, clips, load_pair
from ugsd_fast.demo.attributes import EMOTIONS, compose, parse

NAMES = ("draft", "verifier")


def test_both_models_take_at_most_32_megabytes():
    assert sum(path.stat().st_size for path in PAIR_FOLDER.rglob("*") if path.is_file()) <= 32e6


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_float16_and_complete(name):
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(PAIR_FOLDER / name, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float16
    assert not model.generation_config.do_sample
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_two_tokenizers_are_one():
    vocabularies = [AutoProcessor.from_pretrained(PAIR_FOLDER / name).tokenizer.get_vocab() for name in NAMES]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.345, 4.0])
def test_training_and_the_processor_write_the_same_prompt(seconds):
    processor = AutoProcessor.from_pretrained(PAIR_FOLDER / "draft")
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    wave = np.random.default_rng(0).standard_normal(int(16_000 * seconds)).astype(np.float32) * 0.1
    inputs = processor(text=text, audio=[wave], sampling_rate=16_000, return_tensors="pt")
    frames = int(inputs["feature_attention_mask"].sum())
    assert inputs["input_ids"][0].tolist() == prompt_ids(processor.tokenizer, frames)
    assert inputs["input_ids"][0].tolist().count(processor.audio_token_id) == audio_tokens(frames)


def test_captions_are_one_token_a_word():
    tokenizer = AutoProcessor.from_pretrained(PAIR_FOLDER / "draft").tokenizer
    for clip in clips():
        ids = tokenizer(clip.caption, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == clip.caption
        assert len(ids) <= len(clip.caption.split()) + 2


def test_clips_cover_the_emotions_and_say_what_their_captions_say():
    found = clips()
    assert len(found) >= 24
    assert {clip.attributes["emotion"] for clip in found} == set(EMOTIONS)
    for clip in found:
        assert compose(dict(clip.attributes)) == clip.caption
        assert parse(clip.caption) == clip.attributes
        info = soundfile.info(clip.path)
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert 0.5 < info.duration <= 4.0
    assert {path.name for path in CLIPS_FOLDER.glob("*.flac")} == {clip.path.name for clip in found}


@pytest.mark.skipif(not importlib.util.find_spec("espeakng_loader"), reason="needs the build-time requirements")
def test_clips_are_held_out():
    from examples.embedded_pair.speech import TEST_VARIANTS, TUNE_VARIANTS, sentences

    trained, held_out = set(sentences(held_out=False)), set(sentences(held_out=True))
    assert not trained & held_out
    assert not TEST_VARIANTS & TUNE_VARIANTS
    for clip in clips():
        assert clip.sentence in held_out
        assert clip.voice.split("+")[1] in TEST_VARIANTS


def test_settings_name_the_recipe():
    settings = json.loads((PAIR_FOLDER / "pair.json").read_text())
    assert settings["prompt"] == PROMPT
    assert settings["config"]["rule"] == "rank"
    assert settings["training"].keys() == set(NAMES)


def test_the_pair_captions_a_clip_within_the_grammar():
    from ugsd_fast import Decoder

    pair = load_pair(threads=1)
    decoder = Decoder(pair.draft, pair.verifier, pair.config)
    result = decoder.generate(clips()[0].path, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens)
    assert None not in {value for name, value in parse(result.text).items() if name != "intensity"}
    assert result.tokens[-1] in decoder.eos_token_ids


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    model, heads = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        heads(model(torch.ones(4, 3))).square().sum().backward()
        optimizer.step()

    step()
    save_checkpoint(tmp_path / "m.safetensors", 1, model, heads, optimizer)
    step()
    expected = [parameter.detach().clone() for parameter in parameters]

    saved = load_checkpoint(tmp_path / "m.safetensors")
    assert saved.step == 1
    model.load_state_dict(saved.part("model"))
    heads.load_state_dict(saved.part("heads"))
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    saved.restore(optimizer)
    step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, expected, strict=True))
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]
