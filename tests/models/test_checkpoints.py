"""The tiny checkpoints load as the hub's do, and drive as ``ugsd_fast.models`` expects of real ones."""

from __future__ import annotations

import filecmp
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache

from tests.checkpoints import BUILDERS, TEXT_TOKENS, build_qwen2_5_omni, copy_checkpoint
from ugsd_fast.models.families import family_of
from ugsd_fast.models.processors import load_processor

FAMILIES = list(BUILDERS)
OMNIS = ["qwen2_5_omni", "qwen3_omni"]
MODELS = {
    "qwen2_audio": transformers.Qwen2AudioForConditionalGeneration,
    "qwen2_5_omni": transformers.Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen3_omni": transformers.Qwen3OmniMoeThinkerForConditionalGeneration,
}
HUB_NAMES = {
    "qwen2_audio": {
        "audio_tower.conv1.weight",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "multi_modal_projector.linear.weight",
    },
    "qwen2_5_omni": {
        "thinker.audio_tower.audio_bos_eos_token.weight",
        "thinker.lm_head.weight",
        "thinker.model.embed_tokens.weight",
        "thinker.model.layers.0.self_attn.k_proj.bias",
        "thinker.visual.patch_embed.proj.weight",
        "talker.codec_head.weight",
        "token2wav.code2wav_dit_model.proj_out.weight",
    },
    "qwen3_omni": {
        "thinker.audio_tower.conv2d1.weight",
        "thinker.lm_head.weight",
        "thinker.model.embed_tokens.weight",
        "thinker.model.layers.0.mlp.experts.3.gate_proj.weight",
        "thinker.model.layers.0.mlp.gate.weight",
        "thinker.visual.pos_embed.weight",
        "talker.codec_head.weight",
        "code2wav.code_embedding.weight",
    },
}
RATE = 16_000
TOLERANCE = 1e-4  # on logits whose spread is about 5


def processor_of(path: Path) -> Any:
    family = family_of(json.loads((path / "config.json").read_text())["model_type"])
    assert family is not None
    return load_processor(family, str(path))


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def prompt(processor: Any, text: str = "Describe the emotion.") -> str:
    messages = [{"role": "user", "content": [{"type": "audio", "audio": ""}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def prepare(processor: Any, audio: list[np.ndarray], texts: list[str] | None = None) -> Any:
    texts = texts or [prompt(processor)] * len(audio)
    return processor(
        text=texts, audio=audio, sampling_rate=RATE, return_tensors="pt", padding=True, padding_side="left"
    )


def positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def greedy(model: Any, inputs: Any, tokens: int = 8) -> tuple[Tensor, Tensor]:
    """Token ids [B, tokens] and logits [B, tokens, V] of generate()."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=TEXT_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1)


def whole_forward(model: Any, inputs: Any, continuation: Tensor) -> Tensor:
    """Logits [B, L + n, V] of one forward without a cache."""
    ids = torch.cat([inputs["input_ids"], continuation], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(continuation)], dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    return model(**whole, position_ids=positions(mask), use_cache=False).logits


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    for family, build in BUILDERS.items():
        build(path / family)
    return path


@pytest.fixture(scope="module")
def load(root: Path) -> Any:
    @functools.cache
    def load_once(family: str) -> tuple[Any, Any]:
        return MODELS[family].from_pretrained(root / family).eval(), processor_of(root / family)

    return load_once


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_loads(root: Path, family: str) -> None:
    model, info = MODELS[family].from_pretrained(root / family, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
    # transformers 5.17 lists the weights of talker and vocoder here, 5.23 nothing
    assert {name.split(".")[0] for name in info["unexpected_keys"]} <= {"talker", "token2wav", "code2wav"}
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_hubs_names(root: Path, family: str) -> None:
    with safe_open(root / family / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names >= HUB_NAMES[family]
    known = {name.split(".")[0] for name in HUB_NAMES[family]}
    assert {name.split(".")[0] for name in names} == known


@pytest.mark.parametrize("family", OMNIS)
def test_omni_config_is_the_full_models(root: Path, family: str) -> None:
    config = transformers.AutoConfig.from_pretrained(root / family)
    assert config.model_type == {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni": "qwen3_omni_moe"}[family]
    assert config.enable_audio_output
    thinker = MODELS[family].from_pretrained(root / family).config
    assert thinker.model_type == config.thinker_config.model_type == config.model_type + "_thinker"
    assert thinker.get_text_config(decoder=True).vocab_size == {"qwen2_5_omni": 512, "qwen3_omni": 528}[family]
    assert thinker.get_text_config(decoder=True).rope_parameters["mrope_section"] == [2, 3, 3]


def test_families_share_text_ids_but_not_names(root: Path) -> None:
    tokenizers = {family: transformers.AutoTokenizer.from_pretrained(root / family) for family in FAMILIES}
    text = "A woman laughs <|im_end|>\n<|im_start|>assistant\n naïve 声音 42"
    first, *others = [tokenizer(text).input_ids for tokenizer in tokenizers.values()]
    assert all(ids == first for ids in others)
    assert tokenizers["qwen2_audio"].decode(first) == text
    assert max(first) < TEXT_TOKENS + 3
    assert tokenizers["qwen2_5_omni"].audio_token == "<|AUDIO|>"
    assert tokenizers["qwen3_omni"].audio_token == "<|audio_pad|>"
    assert tokenizers["qwen2_5_omni"].audio_token_id != tokenizers["qwen3_omni"].audio_token_id
    assert {tokenizers[family].eos_token for family in OMNIS} == {"<|im_end|>"}


def test_seed_decides_the_weights(root: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    again = build_qwen2_5_omni(tmp_path / "again")
    other = build_qwen2_5_omni(tmp_path / "other", seed=1, vocab_size=600)
    assert torch.equal(torch.get_rng_state(), state)
    assert filecmp.cmp(again / "model.safetensors", root / "qwen2_5_omni" / "model.safetensors", shallow=False)
    model = MODELS["qwen2_5_omni"].from_pretrained(other)
    assert model.lm_head.weight.shape[0] == model.config.get_text_config(decoder=True).vocab_size == 600


def test_vocab_size_must_hold_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 460, expected more than 461"):
        build_qwen2_5_omni(tmp_path, vocab_size=460)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(root: Path, tmp_path: Path, load: Any, family: str) -> None:
    model, processor = load(family)
    inputs = prepare(processor, [clip(1.0)])
    tokens, logits = greedy(model, inputs)
    twin = MODELS[family].from_pretrained(copy_checkpoint(root / family, tmp_path / "twin")).eval()
    noisy = MODELS[family].from_pretrained(copy_checkpoint(root / family, tmp_path / "noisy", noise=0.1)).eval()
    assert torch.equal(greedy(twin, inputs)[1], logits)
    assert (greedy(noisy, inputs)[1] - logits).abs().max() > 1
    assert torch.equal(greedy(MODELS[family].from_pretrained(root / family).eval(), inputs)[0], tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seconds", [0.1, 0.31, 1.0, 2.567, 3.99])
def test_placeholders_match_features(load: Any, family: str, seconds: float) -> None:
    model, processor = load(family)
    inputs = prepare(processor, [clip(seconds)])
    frames = int(inputs["feature_attention_mask"].sum())
    if family == "qwen3_omni":
        whole, rest = divmod(frames, 100)
        expected = 13 * whole + (((((rest - 1) // 2 + 1) - 1) // 2 + 1) - 1) // 2 + 1
        features = model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])
    else:
        expected = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == expected
    if family == "qwen3_omni":
        assert features.last_hidden_state.shape[0] == expected
    assert sorted(inputs) == ["attention_mask", "feature_attention_mask", "input_features", "input_ids"]


def test_audio_beyond_the_window(load: Any) -> None:
    audio = [clip(14.0)]  # windows: 4 s, 12 s, none
    counts = {}
    for family in FAMILIES:
        _, processor = load(family)
        inputs = prepare(processor, audio)
        counts[family] = (inputs["input_features"].shape[-1], int(inputs["feature_attention_mask"].sum()))
    assert counts == {"qwen2_audio": (400, 400), "qwen2_5_omni": (1200, 1200), "qwen3_omni": (1400, 1400)}


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_decides_the_caption(load: Any, family: str) -> None:
    model, processor = load(family)
    (first, logits), (second, _) = (
        greedy(model, prepare(processor, [audio]), 24) for audio in (clip(2.0, 1), 3 * clip(2.0, 2))
    )
    assert not torch.equal(first, second)
    assert first.max() < TEXT_TOKENS + 3  # no placeholder, no padding id
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.max() - entropy.min() > 1  # there is something for a gate to tell apart


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_blocks_and_crops_equal_a_fresh_forward(load: Any, family: str) -> None:
    model, processor = load(family)
    inputs = prepare(processor, [clip(2.3)])
    length = inputs["input_ids"].shape[1]
    tokens, logits = greedy(model, inputs, 10)
    whole = whole_forward(model, inputs, tokens)
    torch.testing.assert_close(whole[:, length - 1 : -1], logits, rtol=0, atol=TOLERANCE)
    if family in OMNIS:
        model.model.rope_deltas = torch.full((1, 1), 37)  # another request's: explicit positions never read it

    cache = new_cache(model)

    def forward(ids: Tensor) -> Tensor:
        start = cache.get_seq_length()
        position_ids = torch.arange(start, start + ids.shape[1])[None]
        return model(input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits

    prefill = model(**inputs, position_ids=positions(inputs["attention_mask"]), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(prefill.logits, whole[:, :length], rtol=0, atol=TOLERANCE)
    for step in range(2):
        got = forward(tokens[:, step : step + 1])
        torch.testing.assert_close(got[:, 0], whole[:, length + step], rtol=0, atol=TOLERANCE)

    rejected = (tokens[:, 2:7] + 1) % TEXT_TOKENS
    other = whole_forward(model, inputs, torch.cat([tokens[:, :2], rejected], dim=1))
    torch.testing.assert_close(forward(rejected), other[:, -5:], rtol=0, atol=TOLERANCE)
    assert cache.is_croppable
    cache.crop(-5)
    assert cache.get_seq_length() == length + 2
    torch.testing.assert_close(forward(tokens[:, 2:7]), whole[:, length + 2 : length + 7], rtol=0, atol=TOLERANCE)
    cache.crop(-2)
    torch.testing.assert_close(forward(tokens[:, 5:9]), whole[:, length + 5 : length + 9], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(load: Any, family: str) -> None:
    model, processor = load(family)
    texts = [prompt(processor), prompt(processor, "Describe the voice, the pace and the emotion.")]
    inputs = prepare(processor, [clip(1.0, 1), clip(2.0, 2)], texts)
    mask = inputs["attention_mask"]
    assert mask[:, 0].tolist() == [0, 1]
    tokens, logits = greedy(model, inputs, 6)
    cache, position_ids = new_cache(model), positions(mask)
    prefill = model(**inputs, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(prefill[:, -1], logits[:, 0], rtol=0, atol=TOLERANCE)
    block = model(
        input_ids=tokens[:, :5],
        attention_mask=torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], dim=1),
        position_ids=position_ids[:, -1:] + 1 + torch.arange(5),
        past_key_values=cache,
        use_cache=True,
    ).logits
    torch.testing.assert_close(block, logits[:, 1:], rtol=0, atol=TOLERANCE)
    if family != "qwen3_omni":  # its audio encoder sees what a clip is padded with in a batch
        alone = greedy(model, prepare(processor, [clip(1.0, 1)], texts[:1]), 6)[1]
        torch.testing.assert_close(alone[0], logits[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_on_the_head_narrows_the_logits(load: Any, family: str) -> None:
    model, processor = load(family)
    inputs = prepare(processor, [clip(0.5)])
    nothing = inputs["input_ids"][:, :0]
    whole = whole_forward(model, inputs, nothing)
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -2:],)):
        narrow = whole_forward(model, inputs, nothing)
    torch.testing.assert_close(narrow, whole[:, -2:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", OMNIS)
def test_features_may_be_cut_to_the_clip(load: Any, family: str) -> None:
    model, processor = load(family)
    inputs = prepare(processor, [clip(1.7)])
    frames = int(inputs["feature_attention_mask"].sum())
    cut = {
        **inputs,
        "input_features": inputs["input_features"][..., :frames],
        "feature_attention_mask": inputs["feature_attention_mask"][:, :frames],
    }
    nothing = inputs["input_ids"][:, :0]
    torch.testing.assert_close(
        whole_forward(model, cut, nothing), whole_forward(model, inputs, nothing), rtol=0, atol=TOLERANCE
    )


def test_eos_is_where_the_hub_has_it(load: Any) -> None:
    end_of_text, end_of_turn = TEXT_TOKENS, TEXT_TOKENS + 2
    assert load("qwen2_audio")[0].generation_config.eos_token_id == [end_of_text, end_of_turn]
    for family, in_config in (("qwen2_5_omni", end_of_turn), ("qwen3_omni", None)):
        model, processor = load(family)
        assert model.generation_config.eos_token_id is None
        assert getattr(model.config, "eos_token_id", None) == in_config
        assert processor.tokenizer.eos_token_id == end_of_turn


@pytest.mark.parametrize("family", FAMILIES)
def test_system_turn_of_the_template(load: Any, family: str) -> None:
    text = prompt(load(family)[1])
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text.startswith(default) == (family != "qwen3_omni")
    assert text.endswith("Describe the emotion.<|im_end|>\n<|im_start|>assistant\n")


def test_no_path_of_this_machine_is_saved(root: Path) -> None:
    for path in root.rglob("*.json"):
        assert str(root) not in path.read_text(encoding="utf-8")
        json.loads(path.read_text(encoding="utf-8"))
