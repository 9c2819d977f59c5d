"""What differs between model families, as data: no family has a decoding loop of its own.

Each entry names the classes to load, the tensors that carry the audio, and how many placeholder tokens the prompt needs
for them: a prompt with too few is silently cut short of audio by some families and fails deep inside others, so the
count is checked before a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ugsd_fast.errors import ModelError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family of audio-language models.

    Attributes
    ----------
    model_types : tuple of str
        ``config.model_type`` of the checkpoint and of the model that is loaded from it.
    model_class, processor_class : str
        Names in transformers.
    audio : str
        The input that carries the audio.
    audio_tokens : callable, optional
        (model config, inputs) -> placeholders in the prompt; None for encoder-decoders, whose prompt has none.
    audio_token_id : callable
        Model config -> id of the placeholder.
    forward_kwargs : mapping
        Given to the forward that hears the audio.
    toggles_adapter : bool
        Whether a LoRA adapter of the checkpoint belongs to requests with audio only.
    rope_switch : callable
        Model config -> number of positions behind which the rotary frequencies of *all* positions change, or None.
    text_alone : bool
        Whether behind the audio the model is its text decoder and LM head, with nothing around or behind them that
        changes a logit (no scaling, no inputs by layer).
    mixes_attention : bool
        Whether a part of the model has eager attention only: transformers then chooses for each part.
    template_hears : bool
        Whether the chat template reads the audio itself, in a message, and gives the model's inputs.
    trims_features : bool
        Whether mel frames that are only padding can be cut off before the audio tower.
    window : callable, optional
        Feature extractor -> samples behind which the processor silently cuts a clip; None where it never does.
    decoder_prompt : callable, optional
        (model, tokenizer, prompt or None) -> token ids that an encoder-decoder's text begins with; None where it takes
        no prompt.
    has_vision : bool
        Whether the processor has image and video parts as well.
    """

    model_types: tuple[str, ...]
    model_class: str
    processor_class: str
    audio: str = "input_features"
    audio_tokens: Callable[[Any, Inputs], int] | None = None
    audio_token_id: Callable[[Any], int] = lambda config: config.audio_token_id
    forward_kwargs: Mapping[str, Any] = field(default_factory=dict)
    toggles_adapter: bool = False
    rope_switch: Callable[[Any], int | None] = lambda config: None
    text_alone: bool = False
    mixes_attention: bool = False
    template_hears: bool = False
    trims_features: bool = False
    window: Callable[[Any], int] | None = None
    decoder_prompt: Callable[[Any, Any, str | None], list[int]] | None = None
    has_vision: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the audio reaches the text through cross-attention, not through placeholders."""
        return self.audio_tokens is None


def _frames(inputs: Inputs) -> list[int]:
    """Mel frames of each clip that are not padding."""
    for name in ("feature_attention_mask", "input_features_mask"):
        if name in inputs:
            return inputs[name].sum(-1).tolist()
    features = inputs["input_features"]
    return [features.shape[-1]] * features.shape[0]


def _halved(length: int, times: int) -> int:
    """Length behind convolutions of stride 2."""
    for _ in range(times):
        length = (length - 1) // 2 + 1
    return length


def _pooled(_: Any, inputs: Inputs) -> int:
    """A convolution of stride 2, then average pooling of 2: 25 tokens a second."""
    return sum((_halved(frames, 1) - 2) // 2 + 1 for frames in _frames(inputs))


def _windowed(config: Any, inputs: Inputs) -> int:
    """Three convolutions of stride 2 within windows of mel frames: 13 tokens a second."""
    window = 2 * config.audio_config.n_window
    return sum(frames // window * _halved(window, 3) + _halved(frames % window, 3) for frames in _frames(inputs))


def _whole_windows(config: Any, inputs: Inputs) -> int:
    """Every clip fills whole windows of the encoder; the projector takes several positions at a time."""
    audio = config.audio_config
    return inputs["input_features"].shape[0] * audio.max_source_positions * audio.hidden_size // audio.intermediate_size


def _queries(config: Any, inputs: Inputs) -> int:
    """A Q-Former gives a few queries a window; the mask is over them."""
    if "input_features_mask" in inputs:
        return int(inputs["input_features_mask"].sum())
    clips, frames = inputs["input_features"].shape[:2]
    return clips * -(-frames // config.window_size) * (config.window_size // config.downsample_rate)


def _merged_by_four(_: Any, inputs: Inputs) -> int:
    """A convolution of stride 2, then four positions a token."""
    return sum((_halved(frames, 1) - 4) // 4 + 1 for frames in _frames(inputs))


def _quartered(_: Any, inputs: Inputs) -> int:
    """Two convolutions of stride 2."""
    return sum(_halved(frames, 2) for frames in _frames(inputs))


def _hops(config: Any, inputs: Inputs) -> int:
    """One token for each begun hop of samples."""
    hop = config.acoustic_tokenizer_encoder_config.hop_length
    values = inputs["input_values"]
    mask = inputs.get("padding_mask")
    samples = [values.shape[-1]] * values.shape[0] if mask is None else mask.sum(-1).tolist()
    return sum(-(-count // hop) for count in samples)


def _whisper_prompt(model: Any, tokenizer: Any, prompt: str | None) -> list[int]:
    """The text before, and the tokenizer's own beginning; a language that nobody named is left to the model."""
    start = list(tokenizer.prefix_tokens)
    if getattr(model.generation_config, "is_multilingual", False) and tokenizer.language is None:
        start = start[:1]
    return [*(tokenizer.get_prompt_ids(prompt).tolist() if prompt else ()), *start]


def _longrope_switch(config: Any) -> int | None:
    is_longrope = (config.rope_parameters or {}).get("rope_type") == "longrope"
    return config.original_max_position_embeddings if is_longrope else None


FAMILIES = (
    Family(
        model_types=("qwen2_audio",),
        model_class="Qwen2AudioForConditionalGeneration",
        processor_class="Qwen2AudioProcessor",
        text_alone=True,
        audio_tokens=_pooled,
        window=lambda extractor: extractor.n_samples,
    ),
    Family(
        model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
        model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        processor_class="Qwen2_5OmniProcessor",
        text_alone=True,
        audio_tokens=_pooled,
        trims_features=True,
        window=lambda extractor: extractor.n_samples,
        has_vision=True,
    ),
    Family(
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        processor_class="Qwen3OmniMoeProcessor",
        text_alone=True,
        audio_tokens=_windowed,
        has_vision=True,
    ),
    Family(
        model_types=("qwen3_asr",),
        model_class="Qwen3ASRForConditionalGeneration",
        processor_class="Qwen3ASRProcessor",
        text_alone=True,
        audio_tokens=_windowed,
    ),
    Family(
        model_types=("voxtral",),
        model_class="VoxtralForConditionalGeneration",
        processor_class="VoxtralProcessor",
        text_alone=True,
        audio_tokens=_whole_windows,
        template_hears=True,
    ),
    Family(
        model_types=("granite_speech",),
        model_class="GraniteSpeechForConditionalGeneration",
        processor_class="GraniteSpeechProcessor",
        audio_tokens=_queries,
        toggles_adapter=True,
    ),
    Family(
        model_types=("audioflamingo3",),
        model_class="AudioFlamingo3ForConditionalGeneration",
        processor_class="AudioFlamingo3Processor",
        text_alone=True,
        audio_tokens=_pooled,
    ),
    Family(
        model_types=("musicflamingo",),
        model_class="MusicFlamingoForConditionalGeneration",
        processor_class="MusicFlamingoProcessor",
        text_alone=True,
        audio_tokens=_pooled,
    ),
    Family(
        model_types=("glmasr",),
        model_class="GlmAsrForConditionalGeneration",
        processor_class="GlmAsrProcessor",
        text_alone=True,
        audio_tokens=_merged_by_four,
    ),
    Family(
        model_types=("phi4_multimodal",),
        model_class="Phi4MultimodalForCausalLM",
        processor_class="Phi4MultimodalProcessor",
        audio="audio_input_features",
        audio_tokens=lambda _, inputs: int(inputs["audio_embed_sizes"].sum()),
        audio_token_id=lambda config: config.audio_config.audio_token_id,
        rope_switch=_longrope_switch,
        has_vision=True,
    ),
    Family(
        model_types=("gemma3n",),
        model_class="Gemma3nForConditionalGeneration",
        processor_class="Gemma3nProcessor",
        audio_tokens=lambda config, inputs: inputs["input_features"].shape[0] * config.audio_soft_tokens_per_image,
        window=lambda _: 480_000,
        has_vision=True,
    ),
    Family(
        model_types=("gemma4",),
        model_class="Gemma4ForConditionalGeneration",
        processor_class="Gemma4Processor",
        audio_tokens=_quartered,
        window=lambda _: 480_000,
        has_vision=True,
        mixes_attention=True,
    ),
    Family(
        model_types=("vibevoice_asr",),
        model_class="VibeVoiceAsrForConditionalGeneration",
        processor_class="VibeVoiceAsrProcessor",
        text_alone=True,
        audio="input_values",
        audio_tokens=_hops,
        forward_kwargs={"sample": False},  # noise on the audio would make two passes over one clip disagree
        mixes_attention=True,
    ),
    Family(
        model_types=("whisper",),
        model_class="WhisperForConditionalGeneration",
        processor_class="WhisperProcessor",
        window=lambda extractor: extractor.n_samples,
        decoder_prompt=_whisper_prompt,
    ),
    Family(
        model_types=("moonshine",),
        model_class="MoonshineForConditionalGeneration",
        processor_class="Wav2Vec2Processor",
        audio="input_values",
    ),
)

_STREAMING = "it takes audio and text in step through a streaming codec, not a clip and then its text"
REFUSED = {
    **dict.fromkeys(("kyutai_speech_to_text", "moshi", "voxtral_realtime", "moonshine_streaming"), _STREAMING),
    **dict.fromkeys(("nemotron_asr_streaming", "nemotron3_5_asr"), _STREAMING),
    **dict.fromkeys(("csm", "dia", "higgs_audio_v2", "vibevoice"), "it writes audio codes, not text"),
}

_RECURRENT = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid"})


def family_of(model_type: str) -> Family | None:
    """The family of a ``config.model_type``, None where there is no entry for it."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def refuse_unsupported(model: Any) -> None:
    """Refuse a model that speculative decoding cannot drive.

    Raises
    ------
    ModelError
        Naming the model and the reason.
    """
    config, name = model.config, type(model).__name__
    if config.model_type in REFUSED:
        raise ModelError(f"AudioLM: {name} is not supported: {REFUSED[config.model_type]}")
    text = config.get_text_config(decoder=True)
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    if getattr(model, "_is_stateful", False) or kinds & _RECURRENT:
        raise ModelError(
            f"AudioLM: {name} keeps a recurrent state, expected a key/value cache "
            "(rejected draft tokens cannot be taken back out of a recurrent state)"
        )
    family = family_of(config.model_type)
    if config.is_encoder_decoder and (family is None or not family.is_encoder_decoder):
        raise ModelError(
            f"AudioLM: {name} is an encoder-decoder of no known family, expected a decoder-only model, or one of "
            f"{', '.join(entry.model_types[0] for entry in FAMILIES if entry.is_encoder_decoder)}"
        )
