"""A Hugging Face audio-language model with its processor: prepares inputs, opens sequences, decodes text."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from ugsd_fast.audio import load_audio
from ugsd_fast.errors import ModelError
from ugsd_fast.models.attention import best_attention
from ugsd_fast.models.encoder_decoder import EncoderDecoderSequence, decoder_prompt
from ugsd_fast.models.families import FAMILIES, REFUSED, Family, family_of, refuse_unsupported
from ugsd_fast.models.processors import load_processor
from ugsd_fast.models.sequence import CachedSequence

_OF_IMAGES = ("token_type_ids", "mm_token_type_ids")  # where attention is bidirectional: never for speech
DEFAULT_PROMPT = "Describe the emotion of the speaker and how it can be heard in the voice."


class AudioLM:
    """An audio-language model, as drafter or as verifier.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model of one of `FAMILIES`, or another decoder-only model with a language-model head; put into eval mode.
    processor : transformers.ProcessorMixin, optional
        Makes model inputs of audio and prompt. Without one, only prepared inputs can be decoded, and ``result.text``
        stays empty.

    Raises
    ------
    ModelError
        If the model keeps a recurrent state, which cannot be rolled back, streams its audio through a codec, or is an
        encoder-decoder of no known family.

    Examples
    --------
    >>> from ugsd_fast.demo import load_pair
    >>> draft = load_pair().draft
    >>> draft.vocab_size
    800
    """

    def __init__(self, model: Any, processor: Any = None):
        refuse_unsupported(model)
        self.model = model.eval()
        self.processor = processor
        self.family: Family | None = family_of(model.config.model_type)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        attn_implementation: str | None = "auto",
        **kwargs: Any,
    ) -> AudioLM:
        """Load a model and its processor from the Hugging Face hub, or from a folder in the same layout.

        Parameters
        ----------
        name_or_path : str or path
            Hub id, such as ``Qwen/Qwen2.5-Omni-3B``, or a folder.
        dtype : str or torch.dtype, optional
            Of the weights. By default what the checkpoint was saved in; on a CPU, float16 becomes float32, because a
            CPU has no fast float16 matrix product.
        device : str or torch.device, optional
            Where the model runs; by default a GPU if there is one.
        attn_implementation : str, optional
            ``"auto"`` takes FlashAttention 3 or 2 where it is installed and model, device and dtype allow it, SDPA
            otherwise; where a part of the model has neither, transformers chooses. Everything else, None too, goes to
            transformers.
        **kwargs
            Passed on to transformers' ``from_pretrained`` (``quantization_config``, ``revision``, ``device_map`` …).

        Raises
        ------
        ModelError
            If there is no such model, it is damaged, or it is of a family that is not supported.
        """
        name = os.fspath(name_or_path)
        target = torch.device(device) if device is not None else _default_device()
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        try:
            config, _ = transformers.PreTrainedConfig.get_config_dict(name, **hub)
            if not config:
                raise ModelError(f"cannot load model {name}: it has no config.json")
            model_type = config.get("model_type", "")
            family = family_of(model_type)
            if model_type in REFUSED:
                raise ModelError(f"{name}: model type {model_type!r} is not supported: {REFUSED[model_type]}")
            if family is None:
                raise ModelError(
                    f"{name}: model type is {config.get('model_type')!r}, expected one of "
                    f"{', '.join(family.model_types[0] for family in FAMILIES)}"
                )
            model_class = getattr(transformers, family.model_class)
            if attn_implementation == "auto":
                mixes = family.mixes_attention
                attn_implementation = None if mixes else best_attention(model_class, config, dtype, target)
            if kwargs.get("quantization_config") is not None:
                kwargs.setdefault("device_map", {"": target})  # quantised weights are made where they stay
            model, loading = model_class.from_pretrained(
                name,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **kwargs,
            )
            processor = load_processor(family, name, **hub)
        except ModelError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise ModelError(f"cannot load model {name}: {_first_line(error)}") from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ModelError(
                f"cannot load model {name}: the checkpoint has no {missing[0]} ({len(missing)} weights are missing), "
                f"expected all weights of {family.model_class}"
            )
        if dtype is None and target.type == "cpu" and model.dtype == torch.float16:
            model = model.float()
        if "device_map" not in kwargs:
            model = model.to(target)
        return cls(model, processor)

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, None without a processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation: the generation config's, or else the model's or the tokenizer's own."""
        config = self.model.config
        for owner in (
            self.model.generation_config,
            config,
            config.get_text_config(decoder=True),
            self.tokenizer,
        ):
            named = getattr(owner, "eos_token_id", None)
            if named is not None:
                return frozenset([named] if isinstance(named, int) else named)
        return frozenset()

    @property
    def max_audio_seconds(self) -> float | None:
        """Length of the audio encoder's window, None where there is no such limit."""
        if self.processor is None or self.family is None or self.family.window is None:
            return None
        return self.family.window(self.extractor) / self.sampling_rate

    @property
    def sampling_rate(self) -> int:
        """Samples a second of what the processor takes."""
        return int(self.extractor.sampling_rate)

    @property
    def extractor(self) -> Any:
        """What makes features of samples."""
        return getattr(self.processor, "feature_extractor", None) or self.processor.audio_processor

    def prepare(self, audio: Any, prompt: str | None = None) -> dict[str, Tensor]:
        """Model inputs for one clip and a prompt, through the model's own processor and chat template.

        Parameters
        ----------
        audio : path, (array, rate) or Audio
            What `ugsd_fast.audio.load_audio` reads; resampled to the model's rate.
        prompt : str, optional
            The instruction, `DEFAULT_PROMPT` if not given. An encoder-decoder needs none; Whisper takes it as the text
            before the clip's.

        Returns
        -------
        dict of str to Tensor
            ``input_ids`` [1, P], ``attention_mask`` [1, P] and the audio tensors of the family, on the model's device;
            of an encoder-decoder the audio tensors and, where it takes a prompt, ``decoder_input_ids`` [1, P].

        Raises
        ------
        AudioError
            If the audio cannot be read, or is longer than the model's audio encoder takes.
        ModelError
            If the model has no processor, takes no prompt, or its prompt has no room for the clip.
        """
        if self.processor is None or self.family is None:
            raise ModelError(
                f"AudioLM: {type(self.model).__name__} has no processor, expected one to caption audio "
                "(pass prepared model inputs instead: generate(inputs=...))"
            )
        rate = self.sampling_rate
        clip = load_audio(audio, max_seconds=self.max_audio_seconds).resampled(rate)
        heard = {"audio": [clip.samples], "sampling_rate": rate, "return_tensors": "pt"}
        if self.family.is_encoder_decoder:
            return self.to_device({**self.processor(**heard), **self._decoder_prompt(prompt)})
        wav = base64.b64encode(clip.wav()).decode() if self.family.template_hears else None
        content = [
            {"type": "audio", "audio": clip.name} if wav is None else {"type": "audio", "base64": wav},
            {"type": "text", "text": prompt or DEFAULT_PROMPT},
        ]
        messages = [{"role": "user", "content": content}]
        if self.family.template_hears:
            given = self.processor.apply_chat_template(messages)
        else:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            given = self.processor(text=text, **heard)
        inputs = {name: value for name, value in given.items() if name not in _OF_IMAGES}
        self.check_placeholders(inputs)
        if self.family.trims_features:
            frames = int(inputs["feature_attention_mask"].sum(-1).max())
            for name in ("input_features", "feature_attention_mask"):
                inputs[name] = inputs[name][..., :frames]
        return self.to_device(inputs)

    def _decoder_prompt(self, prompt: str | None) -> dict[str, Tensor]:
        """What an encoder-decoder's text begins with."""
        assert self.family is not None
        if self.family.decoder_prompt is not None:
            ids = self.family.decoder_prompt(self.model, self.tokenizer, prompt)
            return {"decoder_input_ids": torch.tensor([ids])}
        if prompt is not None:
            raise ModelError(
                f"AudioLM: prompt is {prompt!r}, expected None ({type(self.model).__name__} takes no prompt)"
            )
        return {}

    def prompt_ids(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Token ids [1, P] that generated tokens follow: ``input_ids``, or what an encoder-decoder starts with."""
        if self.family is not None and self.family.is_encoder_decoder:
            return decoder_prompt(self.model, inputs)
        return inputs["input_ids"]

    def to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `inputs` on the model's device, floating-point ones in the model's dtype."""
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def open(self, inputs: dict[str, Tensor]) -> CachedSequence:
        """Start a sequence of its own on prepared inputs; nothing is computed yet.

        Raises
        ------
        ModelError
            If the prompt has not as many audio placeholders as the audio needs.
        """
        self.check_placeholders(inputs)
        heard = inputs.get("encoder_outputs")
        inputs = self.to_device(inputs)
        if self.family is not None and self.family.is_encoder_decoder:
            return EncoderDecoderSequence(self.model, inputs, heard)
        return CachedSequence(self.model, without_padding(inputs), self.family)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def check_placeholders(self, inputs: Mapping[str, Any]) -> None:
        """Compare the prompt's audio placeholders with the tokens that the audio will fill.

        Raises
        ------
        ModelError
            If they differ: some families would silently drop the rest of the audio.
        """
        family, config = self.family, self.model.config
        if family is None or family.audio_tokens is None or inputs.get(family.audio) is None:
            return
        placeholders = int((inputs["input_ids"] == family.audio_token_id(config)).sum())
        features = family.audio_tokens(config, inputs)
        if placeholders != features or not placeholders:
            raise ModelError(
                f"AudioLM: the prompt has {placeholders} audio placeholders, expected {features} for {family.audio} "
                f"{list(inputs[family.audio].shape)} (does the processor belong to {type(self.model).__name__}?)"
            )


def without_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of one row without the columns that its ``attention_mask`` masks at the left."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape[0] > 1 or bool(mask.all()):
        return inputs
    first = int(mask[0].to(torch.uint8).argmax())
    ids = inputs["input_ids"].shape
    return {name: value[:, first:] if value.shape == ids else value for name, value in inputs.items()}


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
