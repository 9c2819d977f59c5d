"""Tiny random checkpoints in the layout of the Hugging Face hub, one builder a model family.

Each builder writes a folder that loads offline by its path: ``config.json``, ``generation_config.json``,
``model.safetensors``, tokenizer, front end and chat template. Weight names, config nesting and files are
those of the hub repositories (``Qwen/Qwen2-Audio-7B-Instruct``, ``Qwen/Qwen2.5-Omni-3B``,
``Qwen/Qwen3-Omni-30B-A3B-Instruct``), so what loads here loads there: the two Omni families are *full-model*
checkpoints, thinker weights under ``thinker.`` beside talker and vocoder keys that a thinker has to skip.

The tokenizers are byte-level BPEs trained here on ``CAPTIONS``. As on the hub, the families agree on the id
of every text token, of ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>``; the ids after these carry
different names; and the models pad their vocabularies to different sizes.

>>> from transformers import Qwen2_5OmniThinkerForConditionalGeneration  # doctest: +SKIP
>>> path = build_qwen2_5_omni(tmp_path, seed=1)  # doctest: +SKIP
>>> model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path)  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers
from torch import Tensor

_SPREAD = 0.15  # of the weights: at the usual 0.02 every context has the same next token
_HEAD_SCALE = 5.0  # spreads the entropies of next tokens from about 0.02 to 3 nats
TEXT_TOKENS = 448  # ids below this are text; the added tokens follow, as they follow 151643 on the hub

CAPTIONS = (
    "The speaker sounds happy and excited, talking quickly in a high, bright voice with wide pitch movement.",
    "A woman speaks slowly and softly; her low pitch and long pauses make her sound sad and tired.",
    "He is angry: the voice is loud and tense, the pace is fast, and the words are cut short.",
    "Calm and neutral speech at a moderate pace, with an even volume and little emotion in the tone.",
    "The young man's trembling voice, rising pitch and short breaths suggest that he is afraid.",
    "Surprised by the news, the girl raises her pitch sharply at the end of the sentence.",
    "With a flat, cold tone and slow delivery, the man expresses disgust and contempt.",
    "An old woman laughs gently while she speaks, her warm voice full of tenderness and joy.",
    "Describe the emotion of the speaker in one sentence. You are a helpful assistant.",
    "system user assistant Audio 1: Generate the caption in English:",
)

# In the order of their ids, which begin at TEXT_TOKENS.
_QWEN2_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>",
    "<|IMAGE|>", "<|VIDEO|>",
)  # fmt: skip
_QWEN3_NOT_SPECIAL = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
_QWEN3_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    *_QWEN3_NOT_SPECIAL,
    "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
    "<tts_text_bos_single>", "<|audio_pad|>",
)  # fmt: skip

_QWEN2_NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_QWEN3_NAMED = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}

_DEFAULT_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)


def _chat_template(audio: str, image: str, video: str, default_system: str) -> str:
    """The part of the families' templates that text, audio, image and video messages exercise."""
    return (
        "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
        f"{default_system}<|im_start|>{{{{ message['role'] }}}}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for content in message['content'] %}"
        f"{{% if content['type'] == 'image' or 'image' in content %}}{image}"
        "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
        f"{{% set audio_count.value = audio_count.value + 1 %}}{audio}"
        f"{{% elif content['type'] == 'video' or 'video' in content %}}{video}"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


_TEMPLATES = {
    "qwen2_audio": _chat_template(
        "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n", "", "", _DEFAULT_SYSTEM
    ),
    "qwen2_5_omni": _chat_template(
        "{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>",
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "<|vision_bos|><|VIDEO|><|vision_eos|>",
        _DEFAULT_SYSTEM,
    ),
    # Qwen3-Omni writes no system turn of its own.
    "qwen3_omni": _chat_template(
        "<|audio_start|><|audio_pad|><|audio_end|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
        "",
    ),
}


@functools.lru_cache(maxsize=1)
def _text_bpe() -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of the one BPE that all families share."""
    backend = transformers.Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=TEXT_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    if len(vocab) != TEXT_TOKENS:
        raise RuntimeError(f"checkpoints: the captions gave a BPE of {len(vocab)} tokens, expected {TEXT_TOKENS}")
    return vocab, merges


def _save_tokenizer(path: Path, family: str) -> dict[str, int]:
    """Write the tokenizer files and return the id of every added token by its text."""
    vocab, merges = _text_bpe()
    added = _QWEN3_ADDED if family == "qwen3_omni" else _QWEN2_ADDED
    named = {"qwen2_audio": {}, "qwen2_5_omni": _QWEN2_NAMED, "qwen3_omni": _QWEN3_NAMED}[family]
    ids = {text: TEXT_TOKENS + index for index, text in enumerate(added)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|endoftext|>" if family == "qwen2_audio" else "<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
        added_tokens_decoder={
            index: transformers.AddedToken(text, special=text not in _QWEN3_NOT_SPECIAL, normalized=False)
            for text, index in ids.items()
        },
        model_max_length=32_768,
    )
    if tokenizer.convert_tokens_to_ids(list(ids)) != list(ids.values()):
        raise RuntimeError(f"checkpoints: {family} tokenizer gave its added tokens other ids than {ids}")
    tokenizer.save_pretrained(path)
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("padding_side", None)  # the hub's files have none, and one here would win over the processor's "left"
    _write_json(config_path, config)
    return ids


def _save_front_end(path: Path, family: str, chunk_length: int) -> None:
    """Write preprocessor_config.json as the hub has it (one flat file) and the chat template."""
    front_end = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=chunk_length, return_attention_mask=True
    ).to_dict()
    front_end["processor_class"] = {
        "qwen2_audio": "Qwen2AudioProcessor",
        "qwen2_5_omni": "Qwen2_5OmniProcessor",
        "qwen3_omni": "Qwen3OmniMoeProcessor",
    }[family]
    if family != "qwen2_audio":
        front_end |= {
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "min_pixels": 3136,
            "max_pixels": 12_845_056,
            "patch_size": 16 if family == "qwen3_omni" else 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
    _write_json(path / "preprocessor_config.json", front_end)
    _write_json(path / "chat_template.json", {"chat_template": _TEMPLATES[family]})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _vocab_size(ids: Mapping[str, int], vocab_size: int) -> int:
    if vocab_size <= max(ids.values()):
        raise ValueError(f"checkpoints: vocab_size is {vocab_size}, expected more than {max(ids.values())}")
    return vocab_size


def _random_weights(model_class: type, config: Any, ids: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """State dict of a freshly initialised model; the caller's random state is left alone.

    Like a trained model it is sure of some tokens and unsure of others, ends its turn, and practically never
    writes a placeholder, a tag or a padding id: their rows of the head are zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = model_class(config).state_dict()
    (head,) = (tensor for name, tensor in weights.items() if name.endswith("lm_head.weight"))  # [V, D]
    ends = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    head.mul_(_HEAD_SCALE)
    kept = head[ends].clone()
    head[TEXT_TOKENS:] = 0
    head[ends] = kept
    return weights


def _text_config(vocab_size: int, hidden_size: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "initializer_range": _SPREAD,
        "use_sliding_window": False,
        **more,
    }


def _audio_config(hidden_size: int, **more: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 128,
        "d_model": hidden_size,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * hidden_size,
        "initializer_range": _SPREAD,
        **more,
    }


def build_qwen2_audio(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 544,
    hidden_size: int = 32,
    num_layers: int = 2,
    chunk_length: int = 4,
) -> Path:
    """Write a tiny ``Qwen2AudioForConditionalGeneration`` checkpoint.

    Parameters
    ----------
    path
        Folder to write; created when absent.
    seed
        Seed of the weights.
    vocab_size
        Columns of the embedding and of the head, above the tokenizer's ids mere padding (156032 on the hub).
    hidden_size, num_layers
        Width and depth of the language model; the audio encoder has one layer of the same width.
    chunk_length
        Seconds of audio in the Whisper window (30 on the hub): shorter audio is padded, longer audio is cut.

    Returns
    -------
    Path
        The folder.
    """
    path = _new_folder(path)
    ids = _save_tokenizer(path, "qwen2_audio")
    _save_front_end(path, "qwen2_audio", chunk_length)
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": ids["<|AUDIO|>"],
        "vocab_size": _vocab_size(ids, vocab_size),
        "audio_config": _audio_config(
            hidden_size, model_type="qwen2_audio_encoder", max_source_positions=50 * chunk_length
        ),
        "text_config": _text_config(
            vocab_size,
            hidden_size,
            num_layers,
            model_type="qwen2",
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        ),
    }
    _write_json(path / "config.json", config)
    _write_json(
        path / "generation_config.json",
        {
            "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "top_k": 20,
            "top_p": 0.5,
            "temperature": 0.7,
        },
    )
    model_config = transformers.Qwen2AudioConfig.from_pretrained(path)
    weights = _random_weights(transformers.Qwen2AudioForConditionalGeneration, model_config, ids, seed)
    _save_weights(path, {_qwen2_audio_hub_name(name): tensor for name, tensor in weights.items()})
    return path


def build_qwen2_5_omni(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 64,
    num_layers: int = 2,
    chunk_length: int = 12,
) -> Path:
    """Write a tiny Qwen2.5-Omni checkpoint, laid out as the full model is on the hub.

    Parameters
    ----------
    path
        Folder to write; created when absent.
    seed
        Seed of the weights.
    vocab_size
        Columns of the thinker's embedding and head (151936 in the 3B model, 152064 in the 7B one).
    hidden_size, num_layers
        Width and depth of the thinker's language model.
    chunk_length
        Seconds of audio to which the front end pads and cuts (300 on the hub).

    Returns
    -------
    Path
        The folder, for ``Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained``.
    """
    path = _new_folder(path)
    ids = _save_tokenizer(path, "qwen2_5_omni")
    _save_front_end(path, "qwen2_5_omni", chunk_length)
    head_dim = hidden_size // 4
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "user_token_id": 872 % TEXT_TOKENS,
        "position_id_per_seconds": 25,
        "initializer_range": _SPREAD,
        "seconds_per_chunk": 2,
        "audio_config": _audio_config(
            hidden_size,
            model_type="qwen2_5_omni_audio_encoder",
            n_window=100,
            max_source_positions=1500,
            output_dim=hidden_size,
        ),
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "fullatt_block_indexes": [0],
            "out_hidden_size": hidden_size,
        },
        "text_config": _text_config(
            _vocab_size(ids, vocab_size),
            hidden_size,
            num_layers,
            model_type="qwen2_5_omni_text",
            rope_scaling={"mrope_section": _mrope(head_dim), "rope_type": "default", "type": "default"},
            tie_word_embeddings=False,
        ),
    }
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 16, "num_hidden_layers": 1},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"_from_model_config": True})  # no eos: see the thinker config
    model_config = transformers.Qwen2_5OmniThinkerConfig.from_pretrained(path)
    weights = _random_weights(transformers.Qwen2_5OmniThinkerForConditionalGeneration, model_config, ids, seed)
    hub = {_thinker_hub_name(name): tensor for name, tensor in weights.items()}
    hub["talker.codec_head.weight"] = torch.zeros(8, 16)
    hub["token2wav.code2wav_dit_model.proj_out.weight"] = torch.zeros(8, 16)
    _save_weights(path, hub)
    return path


def build_qwen3_omni(
    path: str | Path,
    *,
    seed: int = 0,
    vocab_size: int = 528,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_experts: int = 4,
) -> Path:
    """Write a tiny Qwen3-Omni-MoE checkpoint, laid out as the full model is on the hub.

    Parameters
    ----------
    path
        Folder to write; created when absent.
    seed
        Seed of the weights.
    vocab_size
        Columns of the thinker's embedding and head (152064 on the hub).
    hidden_size, num_layers
        Width and depth of the thinker's language model.
    num_experts
        Experts a layer, two of which see each token (128 and 8 on the hub).

    Returns
    -------
    Path
        The folder, for ``Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained``.
    """
    path = _new_folder(path)
    ids = _save_tokenizer(path, "qwen3_omni")
    _save_front_end(path, "qwen3_omni", chunk_length=30)
    head_dim = hidden_size // 4
    thinker = {
        "model_type": "qwen3_omni_moe_thinker",
        "audio_token_id": ids["<|audio_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "audio_start_token_id": ids["<|audio_start|>"],
        "audio_end_token_id": ids["<|audio_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "user_token_id": 872 % TEXT_TOKENS,
        "position_id_per_seconds": 13,
        "initializer_range": _SPREAD,
        "seconds_per_chunk": 2,
        "audio_config": _audio_config(
            hidden_size,
            model_type="qwen3_omni_moe_audio_encoder",
            n_window=50,
            n_window_infer=800,
            conv_chunksize=500,
            downsample_hidden_size=8,
            max_source_positions=1500,
            output_dim=hidden_size,
        ),
        "vision_config": {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": hidden_size,
        },
        "text_config": _text_config(
            _vocab_size(ids, vocab_size),
            hidden_size,
            num_layers,
            model_type="qwen3_omni_moe_text",
            head_dim=head_dim,
            rope_scaling={
                "interleaved": True,
                "mrope_interleaved": True,
                "mrope_section": _mrope(head_dim),
                "rope_type": "default",
                "type": "default",
            },
            num_experts=num_experts,
            num_experts_per_tok=2,
            moe_intermediate_size=hidden_size,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            tie_word_embeddings=False,
        ),
    }
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        "im_start_token_id": ids["<|im_start|>"],
        "im_end_token_id": ids["<|im_end|>"],
        "tts_pad_token_id": ids["<tts_pad>"],
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "thinker_config": thinker,
        "talker_config": {"text_config": {"model_type": "qwen3_omni_moe_talker_text", "num_hidden_layers": 1}},
        "code2wav_config": {"num_hidden_layers": 1},
    }
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"talker_max_new_tokens": 4096})  # no eos anywhere but the tokenizer
    model_config = transformers.Qwen3OmniMoeThinkerConfig.from_pretrained(path)
    weights = _random_weights(transformers.Qwen3OmniMoeThinkerForConditionalGeneration, model_config, ids, seed)
    hub = {_thinker_hub_name(name): tensor for name, tensor in _one_tensor_an_expert(weights).items()}
    hub["talker.codec_head.weight"] = torch.zeros(8, 16)
    hub["code2wav.code_embedding.weight"] = torch.zeros(8, 16)
    _save_weights(path, hub)
    return path


BUILDERS: dict[str, Callable[..., Path]] = {
    "qwen2_audio": build_qwen2_audio,
    "qwen2_5_omni": build_qwen2_5_omni,
    "qwen3_omni": build_qwen3_omni,
}


def copy_checkpoint(source: str | Path, path: str | Path, *, noise: float = 0.0, seed: int = 0) -> Path:
    """Copy a checkpoint, with Gaussian noise on its weights if asked.

    Parameters
    ----------
    source
        Folder written by a builder.
    path
        Folder to write; created when absent.
    noise
        Standard deviation of the noise, in units of each tensor's own; 0 copies byte for byte. A drafter that
        is its verifier's copy has every token accepted; one with noise 0.02, 0.05, 0.1 or 0.2 agrees with it
        greedily on about 80, 55, 30 or 10 percent of the tokens.
    seed
        Seed of the noise.

    Returns
    -------
    Path
        The copy.
    """
    path = _new_folder(path)
    shutil.copytree(source, path, dirs_exist_ok=True)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        weights = load_file(path / "model.safetensors")
        for name, tensor in sorted(weights.items()):
            spread = tensor.std(correction=0) if tensor.numel() > 1 else tensor.abs().max()
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (noise * spread))
            weights[name] = tensor
        _save_weights(path, weights)
    return path


def _new_folder(path: str | Path) -> Path:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _mrope(head_dim: int) -> list[int]:
    """Rotary sections of time, height and width: half the head's size in all."""
    half = head_dim // 2
    side = 3 * half // 8
    return [half - 2 * side, side, side]


def _qwen2_audio_hub_name(name: str) -> str:
    if name.startswith("lm_head."):
        return "language_model." + name
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.")


def _thinker_hub_name(name: str) -> str:
    """The hub has the parts side by side; transformers nests towers and language model in ``model``."""
    towers = ("model.audio_tower.", "model.visual.")
    name = name.removeprefix("model.") if name.startswith(towers) else name
    return "thinker." + name.replace("model.language_model.", "model.", 1)


def _one_tensor_an_expert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the stacking of experts that transformers does while it loads."""
    unstacked: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, _, last = name.rpartition("experts.")
        if last == "gate_up_proj":  # [E, 2 I, H]
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                unstacked[f"{stem}experts.{index}.gate_proj.weight"] = gate
                unstacked[f"{stem}experts.{index}.up_proj.weight"] = up
        elif last == "down_proj":  # [E, H, I]
            for index, down in enumerate(tensor):
                unstacked[f"{stem}experts.{index}.down_proj.weight"] = down
        else:
            unstacked[name] = tensor
    return unstacked
