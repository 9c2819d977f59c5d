"""Audio and prompt on their way into a verifier: what a device computes of them, and what a server makes of that."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ugsd_fast.audio import Audio, load_audio
from ugsd_fast.errors import AudioError, ModelError
from ugsd_fast.models import DEFAULT_PROMPT, AudioLM, Family
from ugsd_fast.serving.prefill import audio_rows, prompt_embeddings
from ugsd_fast.serving.protocol import Open, Quantized, Uplink
from ugsd_fast.serving.quantize import dequantize, quantize

_EXTRACTORS = {"WhisperFeatureExtractor"}


class LogMel:
    """The log-mel features of a verifier, computed without it.

    Parameters
    ----------
    description : str
        What `describe` made of the verifier's processor.

    Raises
    ------
    ModelError
        If the description is of a feature extractor that is not known here.
    """

    def __init__(self, description: str):
        try:
            settings = json.loads(description)
            name, config, self._trims = settings["class"], settings["config"], bool(settings["trims"])
        except (ValueError, KeyError, TypeError):
            raise ModelError(
                "uplink: the server describes no feature extractor, expected one for level 'features'"
            ) from None
        if name not in _EXTRACTORS:
            raise ModelError(f"uplink: feature extractor {name}, expected one of {', '.join(sorted(_EXTRACTORS))}")
        self._extractor = getattr(transformers, name)(**config)

    @staticmethod
    def describe(model: AudioLM) -> str:
        """The feature extractor of a model's processor as JSON; empty where devices cannot have it."""
        extractor: Any = getattr(model.processor, "feature_extractor", None)
        if model.family is None or not _templated(model.family) or type(extractor).__name__ not in _EXTRACTORS:
            return ""
        config = {k: v for k, v in extractor.to_dict().items() if isinstance(v, (int, float, bool, str))}
        config = {k: v for k, v in config.items() if not k.endswith(("_type", "_class"))}
        described = {"class": type(extractor).__name__, "config": config, "trims": model.family.trims_features}
        return json.dumps(described, sort_keys=True)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Features [mel, frames] of samples at the verifier's rate."""
        made = self._extractor(
            samples,
            sampling_rate=self._extractor.sampling_rate,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="np",
        )
        features = made["input_features"][0]
        return features[:, : int(made["attention_mask"].sum())] if self._trims else features


def encode_flac(audio: Audio) -> bytes:
    """24-bit FLAC: exact for samples of up to 24 bits within full scale."""
    import soundfile

    held = io.BytesIO()
    soundfile.write(held, audio.samples, audio.rate, format="FLAC", subtype="PCM_24")
    return held.getvalue()


def encode_embeddings(encoder: AudioLM, audio: Audio) -> Quantized:
    """What the verifier's own audio encoder, on the device, makes of a clip."""
    return quantize(audio_rows(encoder, encoder.prepare(audio)).float().cpu().numpy())


def _templated(family: Family) -> bool:
    """Whether the chat template writes a prompt that features can be put into."""
    return not family.is_encoder_decoder and not family.template_hears and family.audio == "input_features"


class PromptMaker:
    """Makes a verifier's prompt of what a device sent.

    Parameters
    ----------
    model : AudioLM
        The verifier.
    """

    def __init__(self, model: AudioLM):
        self.model = model
        self.description = LogMel.describe(model)
        self.sampling_rate = 16_000 if model.family is None else model.sampling_rate

    def possible(self) -> list[Uplink]:
        """Levels that the verifier can be served at, from the least revealing."""
        family = self.model.family
        if family is None:
            return ["none"]
        if not _templated(family):
            return []
        levels: list[Uplink] = []
        inputs = self._template(self.sampling_rate, None)
        if prompt_embeddings(self.model.model, inputs, family.forward_kwargs) is not None:
            levels.append("embeddings")
        if self.description and self._features_agree():
            levels.append("features")
        return [*levels, "audio"]

    @torch.inference_mode()
    def prepare(self, request: Open) -> dict[str, Tensor]:
        """Model inputs of a session: as `AudioLM.prepare` makes them, or ``inputs_embeds`` [1, P, D].

        Raises
        ------
        AudioError, ModelError, BadFrame
            If they cannot be made.
        """
        model, prompt = self.model, request.prompt
        if request.uplink == "none":
            return self._text_prompt(prompt)
        if request.uplink == "audio":
            assert request.flac is not None
            audio = load_audio(request.flac, max_seconds=request.samples / self.sampling_rate)
            if audio.rate != self.sampling_rate:
                raise AudioError(f"audio of {audio.rate} Hz, expected {self.sampling_rate}")
            return model.prepare(audio, prompt)
        assert request.matrix is not None
        assert model.family is not None
        inputs = self._template(request.samples, prompt)
        if request.uplink == "features":
            shape = inputs[model.family.audio].shape
            features = dequantize(request.matrix, (int(np.prod(shape[:-1])), shape[-1]))
            inputs[model.family.audio] = torch.from_numpy(features).reshape(shape)
            return model.to_device(inputs)
        placeholders = inputs["input_ids"] == model.family.audio_token_id(model.model.config)
        embeddings = model.model.get_input_embeddings()(inputs["input_ids"])
        rows = dequantize(request.matrix, (int(placeholders.sum()), embeddings.shape[-1]))
        embeddings[placeholders] = torch.from_numpy(rows).to(embeddings)
        return {"inputs_embeds": embeddings}

    def _template(self, samples: int, prompt: str | None) -> dict[str, Tensor]:
        """The prompt of a clip of this length, which is not there."""
        tone = np.sin(np.arange(samples, dtype=np.float32) + 1)
        return self.model.prepare((tone, self.sampling_rate), prompt)

    def _text_prompt(self, prompt: str | None) -> dict[str, Tensor]:
        tokenizer, text = self.model.tokenizer, prompt or DEFAULT_PROMPT
        if tokenizer is None:
            raise ModelError("a verifier without a tokenizer cannot take a prompt, expected one with a tokenizer")
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if not ids.shape[1]:
            raise ModelError("the prompt is empty, expected at least one token")
        return self.model.to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def _features_agree(self) -> bool:
        """Whether `LogMel` makes of a tone what the processor makes of it."""
        tone = np.sin(np.arange(self.sampling_rate, dtype=np.float32) + 1)
        inputs: Mapping[str, Any] = self._template(len(tone), None)
        assert self.model.family is not None
        theirs = inputs[self.model.family.audio].float().cpu().numpy()
        ours = LogMel(self.description)(tone)
        return ours.size == theirs.size and bool(np.allclose(ours.reshape(theirs.shape), theirs, atol=1e-2))


def pack_draft_logits(logits: Tensor) -> bytes:
    """The finite ones of a drafter's logits [1, K, V], as `protocol.Verify` carries them."""
    parts = []
    for row in logits[0].float().cpu():
        ids = torch.nonzero(row > -torch.inf)[:, 0]
        parts += [len(ids).to_bytes(4, "little"), ids.numpy().astype("<u4").tobytes(), row[ids].numpy().tobytes()]
    return b"".join(parts)
