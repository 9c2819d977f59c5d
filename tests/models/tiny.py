"""Tiny random models of every family, built from their configs, with prepared inputs for one clip.

>>> tiny = build("voxtral", seed=1)  # doctest: +SKIP
>>> tiny.model.generate(**tiny.inputs(clip=0))  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import soundfile
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from ugsd_fast.models.families import family_of
from ugsd_fast.models.processors import processor_class

VOCAB_SIZE = 96
AUDIO_ID = 90
_WIDTH = 16
_SPREAD = 0.3  # of the weights: at the usual 0.02 every context has the same next token
_PROMPT = [5, 17, 40, 8]

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 512,
    "initializer_range": _SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WHISPER_LIKE = {
    "num_mel_bins": 8,
    "hidden_size": _WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": _SPREAD,
}


@dataclass(frozen=True)
class Tiny:
    """A model, what prepares its inputs, and the module that hears."""

    model: Any
    inputs: Callable[..., dict[str, Tensor]]
    tower: nn.Module


def _noise(clip: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + clip))


def _prompt(placeholders: int) -> dict[str, Tensor]:
    ids = torch.tensor([[*_PROMPT[:2], *[AUDIO_ID] * placeholders, *_PROMPT[2:]]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _mel(
    placeholders: int, frames: int, mask: str | None = "input_features_mask", mels: int = 8, valid: int = 0
) -> Any:
    """Inputs with mel frames [1, mels, frames], the first `valid` (default all) of which are audio."""

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        masks = {}
        if mask:
            masks[mask] = (torch.arange(frames) < (valid or frames)).long()[None]
        return {**_prompt(placeholders), "input_features": _noise(clip, 1, mels, frames), **masks}

    return inputs


def _qwen3_asr() -> Any:
    config = transformers.Qwen3ASRConfig(
        text_config={"model_type": "qwen3", **_TEXT},
        audio_config={
            "num_mel_bins": 8,
            "d_model": _WIDTH,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": _WIDTH,
            "downsample_hidden_size": 4,
            "n_window": 50,  # transformers counts on 13 tokens a window
            "n_window_infer": 200,
            "initializer_range": _SPREAD,
        },
        audio_token_id=AUDIO_ID,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return config, _mel(18, 200, valid=139)  # a window of 100 frames gives 13 tokens, the other 39 frames 5


def _voxtral() -> Any:
    config = transformers.VoxtralConfig(
        text_config={"model_type": "llama", **_TEXT},
        audio_config={**_WHISPER_LIKE, "intermediate_size": 4 * _WIDTH, "max_source_positions": 24},
        audio_token_id=AUDIO_ID,
    )
    return config, _mel(6, 48, mask=None)


def _audioflamingo3() -> Any:
    config = transformers.AudioFlamingo3Config(
        text_config={"model_type": "qwen2", **_TEXT},
        audio_config={**_WHISPER_LIKE, "max_source_positions": 24},
        audio_token_id=AUDIO_ID,
    )
    return config, _mel(9, 48, valid=37)


def _musicflamingo() -> Any:
    config = transformers.MusicFlamingoConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        audio_config={**_WHISPER_LIKE, "model_type": "audioflamingo3_encoder", "max_source_positions": 24},
        audio_token_id=AUDIO_ID,
        audio_bos_token_id=91,
        audio_eos_token_id=92,
    )
    return config, _mel(9, 48, valid=37)


def _glmasr() -> Any:
    config = transformers.GlmAsrConfig(
        text_config={"model_type": "llama", **_TEXT},
        audio_config={**_WHISPER_LIKE, "intermediate_size": 4 * _WIDTH, "max_position_embeddings": 64},
        audio_token_id=AUDIO_ID,
        tie_word_embeddings=False,
    )
    return config, _mel(4, 48, valid=37)


def _granite_speech() -> Any:
    config = transformers.GraniteSpeechConfig(
        text_config={"model_type": "granite", **{k: v for k, v in _TEXT.items() if k != "head_dim"}},
        encoder_config={
            "input_dim": 8,
            "num_layers": 2,
            "hidden_dim": _WIDTH,
            "feedforward_mult": 2,
            "num_heads": 2,
            "dim_head": 8,
            "output_dim": 6,
            "context_size": 8,
            "max_pos_emb": 16,
            "dropout": 0.0,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": _WIDTH,
            "encoder_hidden_size": _WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "cross_attention_frequency": 1,
            "initializer_range": _SPREAD,
        },
        audio_token_index=AUDIO_ID,
        has_lora_adapter=False,
        downsample_rate=5,
        window_size=15,
        initializer_range=_SPREAD,
        tie_word_embeddings=False,
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        mask = torch.arange(9)[None] < 7  # three windows of 15 frames give 3 queries each
        return {**_prompt(7), "input_features": _noise(clip, 1, 40, 8), "input_features_mask": mask}

    return config, inputs


def _phi4_multimodal() -> Any:
    config = transformers.Phi4MultimodalConfig(
        **{k: v for k, v in _TEXT.items() if k not in ("head_dim", "initializer_range")},
        initializer_range=_SPREAD,
        original_max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        vision_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
            "image_token_id": 93,
        },
        audio_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": _WIDTH,
            "depthwise_separable_out_channel": _WIDTH,
            "input_size": 16,
            "nemo_conv_channels": 4,
            "bias_max_distance": 32,
            "audio_token_id": AUDIO_ID,
            "initializer_range": _SPREAD,
        },
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        return {
            **_prompt(5),
            "audio_input_features": _noise(clip, 1, 40, 16),
            "audio_embed_sizes": torch.tensor([5]),
        }

    return config, inputs


_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}


def _gemma3n() -> Any:
    config = transformers.Gemma3nConfig(
        text_config={
            **_TEXT,
            **_LAYERS,
            "intermediate_size": [32] * 4,
            "vocab_size_per_layer_input": 84,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        vision_config={"hidden_size": _WIDTH, "vocab_size": 4, "vocab_offset": 84},
        audio_config={
            "vocab_size": 8,
            "vocab_offset": 88,
            "input_feat_size": 16,
            "hidden_size": _WIDTH,
            "conf_attention_chunk_size": 4,
            "conf_attention_context_left": 5,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "conf_reduction_factor": 2,
            "sscp_conv_channel_size": [4, 2],
        },
        audio_soft_tokens_per_image=8,
        audio_token_id=AUDIO_ID,
        image_token_id=93,
        initializer_range=_SPREAD,
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        mask = torch.arange(48)[None] < 37
        return {**_prompt(8), "input_features": _noise(clip, 1, 48, 16), "input_features_mask": mask}

    return config, inputs


def _gemma4() -> Any:
    config = transformers.Gemma4Config(
        text_config={
            **_TEXT,
            **_LAYERS,
            "global_head_dim": 4,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
        vision_config=None,
        audio_config={
            "hidden_size": _WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 2],
            "attention_chunk_size": 4,
            "attention_context_left": 5,
            "output_proj_dims": _WIDTH,
            "use_clipped_linears": False,
            "initializer_range": _SPREAD,
        },
        audio_token_id=AUDIO_ID,
        image_token_id=93,
        video_token_id=94,
        initializer_range=_SPREAD,
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        mask = torch.arange(48)[None] < 37
        return {**_prompt(10), "input_features": _noise(clip, 1, 48, 128), "input_features_mask": mask}

    return config, inputs


def _vibevoice_asr() -> Any:
    codec = {
        "model_type": "vibevoice_acoustic_tokenizer_encoder",
        "hidden_size": 8,
        "num_filters": 4,
        "downsampling_ratios": [2, 4],
        "depths": [1, 1, 1],
        "ffn_expansion": 2,
    }
    config = transformers.VibeVoiceAsrConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        acoustic_tokenizer_encoder_config=dict(codec),
        semantic_tokenizer_encoder_config=dict(codec),
        audio_token_id=AUDIO_ID,
        audio_bos_token_id=91,
        audio_eos_token_id=92,
        acoustic_tokenizer_chunk_size=1 << 20,
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        mask = torch.arange(64)[None] < 50  # hops of 8 samples
        return {**_prompt(7), "input_values": _noise(clip, 1, 1, 64), "padding_mask": mask}

    return config, inputs


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB_SIZE,
        num_mel_bins=8,
        d_model=_WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=24,
        max_target_positions=96,
        init_std=_SPREAD,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        tie_word_embeddings=False,
    )
    return config, lambda clip=0: {"input_features": _noise(clip, 1, 8, 48)}


def _moonshine() -> Any:
    config = transformers.MoonshineConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=_WIDTH,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=_SPREAD,
        pad_token_id=0,
        tie_word_embeddings=False,
    )

    def inputs(clip: int = 0) -> dict[str, Tensor]:
        mask = (torch.arange(4000)[None] < 3000).long()
        return {"input_values": _noise(clip, 1, 4000), "attention_mask": mask}

    return config, inputs


# family: (config and inputs, class in transformers, path of the module that hears)
FAMILIES: Mapping[str, tuple[Callable[[], Any], str, str]] = {
    "qwen3_asr": (_qwen3_asr, "Qwen3ASRForConditionalGeneration", "model.audio_tower"),
    "voxtral": (_voxtral, "VoxtralForConditionalGeneration", "model.audio_tower"),
    "granite_speech": (_granite_speech, "GraniteSpeechForConditionalGeneration", "model.encoder"),
    "audioflamingo3": (_audioflamingo3, "AudioFlamingo3ForConditionalGeneration", "model.audio_tower"),
    "musicflamingo": (_musicflamingo, "MusicFlamingoForConditionalGeneration", "model.audio_tower"),
    "glmasr": (_glmasr, "GlmAsrForConditionalGeneration", "model.audio_tower"),
    "phi4_multimodal": (_phi4_multimodal, "Phi4MultimodalForCausalLM", "model.embed_tokens_extend.audio_embed.encoder"),
    "gemma3n": (_gemma3n, "Gemma3nForConditionalGeneration", "model.audio_tower"),
    "gemma4": (_gemma4, "Gemma4ForConditionalGeneration", "model.audio_tower"),
    "vibevoice_asr": (_vibevoice_asr, "VibeVoiceAsrForConditionalGeneration", "model.acoustic_tokenizer_encoder"),
    "whisper": (_whisper, "WhisperForConditionalGeneration", "model.encoder"),
    "moonshine": (_moonshine, "MoonshineForConditionalGeneration", "model.encoder"),
}


_from_config = transformers.AutoModel.from_config


def without_vision_tower(config: Any, **kwargs: Any) -> nn.Module:
    """`AutoModel.from_config`, but for Gemma 3n's vision tower: it needs timm, for inputs that speech never has."""
    return nn.Identity() if config.model_type == "gemma3n_vision" else _from_config(config, **kwargs)


def build(family: str, *, seed: int = 1, noise: float = 0.0) -> Tiny:
    """A tiny model of `family`; `noise` > 0 adds that much gaussian noise, relative to each weight's spread."""
    make, model_class, tower = FAMILIES[family]
    config, inputs = make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with patch.object(transformers.AutoModel, "from_config", without_vision_tower):
            model = getattr(transformers, model_class)(config).eval()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.data.normal_(0, _SPREAD)
        for weight in model.parameters():
            if noise and weight.numel() > 1:
                weight.data += noise * weight.std() * torch.randn_like(weight)
    # As after training, no placeholder is ever written: Phi-4's own generate would look for its audio again.
    model.get_output_embeddings().weight.data[AUDIO_ID] = 0
    model.generation_config.eos_token_id = None  # every caption runs to max_new_tokens
    return Tiny(model, inputs, model.get_submodule(tower))


_AUDIO_TOKEN = {"qwen3_asr": "<|audio_pad|>", "glmasr": "<|pad|>"}


def _whisper_extractor(hop_length: int = 333, name: str = "WhisperFeatureExtractor") -> Any:
    return getattr(transformers, name)(feature_size=8, chunk_length=1, hop_length=hop_length)


# family: what makes features for the tiny model
EXTRACTORS: Mapping[str, Callable[[], Any]] = {
    "qwen3_asr": lambda: _whisper_extractor(160, "Qwen3ASRFeatureExtractor"),  # 100 frames a second; the others 48
    **dict.fromkeys(("voxtral", "audioflamingo3", "musicflamingo", "glmasr", "whisper"), _whisper_extractor),
    "granite_speech": lambda: transformers.GraniteSpeechFeatureExtractor(n_mels=4),
    "phi4_multimodal": lambda: transformers.Phi4MultimodalFeatureExtractor(feature_size=16),
    "gemma3n": lambda: transformers.Gemma3nAudioFeatureExtractor(feature_size=16, hop_length_ms=20.0),
    "gemma4": lambda: transformers.Gemma4AudioFeatureExtractor(feature_size=128),
    "vibevoice_asr": lambda: transformers.VibeVoiceAcousticTokenizerFeatureExtractor(sampling_rate=1000),
    "moonshine": lambda: transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True),
}


def processor(family: str) -> Any:
    """A processor of `family` for its tiny model: one word a token, one second a window where there is one."""
    entry = family_of(family)
    assert entry is not None
    audio = _AUDIO_TOKEN.get(family, "<sound>")
    tokenizer = _whisper_tokenizer() if family == "whisper" else _tokenizer(audio)
    settings: dict[str, Any] = {
        "chat_template": "{% for part in messages[0]['content'] %}"
        f"{{% if part['type'] == 'audio' %}}{audio}{{% else %}} {{{{ part['text'] }}}}{{% endif %}}{{% endfor %}} w5",
    }
    if entry.is_encoder_decoder:
        settings = {}
    if family == "gemma3n":
        settings["audio_seq_length"] = 8
    if family == "vibevoice_asr":
        settings |= {
            f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("audio", "audio_bos", "audio_eos")
        }
    if family == "voxtral":
        tokenizer, settings = _MistralStandIn(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>"), {}
    made = processor_class(entry)(EXTRACTORS[family](), tokenizer, **settings)
    if family == "vibevoice_asr":
        made.audio_kwargs = {
            **made.audio_kwargs,
            "sampling_rate": 1000,
            "pad_to_multiple_of": 8,
        }  # the tiny model's hop
    if family == "voxtral":
        made.audio_kwargs = {**made.audio_kwargs, "pad_to_multiple_of": 16_000, "max_source_positions": 48}
    return made


class _MistralStandIn(transformers.PreTrainedTokenizerFast):
    """Where mistral-common is not installed: a chat template that reads WAV files in its messages."""

    def apply_chat_template(self, conversations: Any, **_: Any) -> dict[str, Any]:
        (((audio, text),),) = ([message["content"] for message in conversation] for conversation in conversations)
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["base64"])), dtype="float32")
        assert rate == 16_000
        ids = [AUDIO_ID] * 6 * -(-len(samples) // rate) + self.encode(text["text"]) + [5]
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "audio": [samples]}


def _whisper_tokenizer() -> Any:
    """Whisper's own, for its prompts."""
    tokenizer = transformers.WhisperTokenizer(
        vocab={**{f"w{i}": i for i in range(89)}, "<|endoftext|>": 89}, merges=[], unk_token="<|endoftext|>"
    )
    names = ("startoftranscript", "en", "transcribe", "translate", "startofprev", "notimestamps")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})  # from AUDIO_ID
    return tokenizer


def _tokenizer(audio: str) -> Any:
    words = Tokenizer(
        models.WordLevel({**{f"w{i}": i for i in range(88)}, "<unk>": 88, "<pad>": 89}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    added = (audio, "<|sound_bos|>", "<|sound_eos|>", "<|image|>")  # from AUDIO_ID
    words.add_special_tokens([AddedToken(text, special=True) for text in added])
    names = {"audio": 0, "audio_bos": 1, "audio_eos": 2, "boa": 1, "eoa": 2, "image": 3, "boi": 1, "eoi": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={f"{name}_token": added[index] for name, index in names.items()},
    )
