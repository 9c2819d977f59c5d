"""Audio and prompt on their way into a verifier: what a device computes of them, and what a server makes of that."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ugsd_fast.audio import Audio, load_audio
from ugsd_fast.errors import AudioError, ModelError, UGSDError
from ugsd_fast.models import DEFAULT_PROMPT, AudioLM
from ugsd_fast.serving.prefill import audio_rows, prompt_embeddings
from ugsd_fast.serving.protocol import Open, Quantized, Uplink
from ugsd_fast.serving.quantize import dequantize, quantize

# Feature extractors that a device can have: what they compute follows from their settings alone.
_EXTRACTORS = frozenset(
    {"WhisperFeatureExtractor", "Qwen3ASRFeatureExtractor", "GraniteSpeechFeatureExtractor"}
    | {"Phi4MultimodalFeatureExtractor", "Gemma3nAudioFeatureExtractor", "Gemma4AudioFeatureExtractor"}
)
# Ways in which processors call them: the first that gives what a verifier's processor gives is described to devices.
_CALLS: tuple[dict[str, Any], ...] = (
    {"padding": "max_length", "return_attention_mask": True},
    {"return_attention_mask": True},
    {},
)


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
            self._call = dict(settings.get("call", _CALLS[0]))
            self._name = str(settings.get("input", "input_features"))
            self._window = int(settings.get("window", 0))  # samples
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(
                "uplink: the server describes no feature extractor, expected one for level 'features'"
            ) from None
        if name not in _EXTRACTORS:
            raise ModelError(f"uplink: feature extractor {name}, expected one of {', '.join(sorted(_EXTRACTORS))}")
        self._extractor = getattr(transformers, name)(**config)

    @staticmethod
    def describe(model: AudioLM, template: Callable[[int], Tensor]) -> str:
        """The feature extractor of a model's processor as JSON; empty where devices cannot have it.

        Parameters
        ----------
        model : AudioLM
            The model.
        template : callable
            Samples -> what the model's processor makes of so long a tone.
        """
        family, extractor = model.family, model.extractor
        if family is None or family.audio == "input_values" or type(extractor).__name__ not in _EXTRACTORS:
            return ""
        config = {k: v for k, v in extractor.to_dict().items() if isinstance(v, (int, float, bool, str))}
        config = {k: v for k, v in config.items() if not k.endswith(("_type", "_class"))}
        lengths = [model.sampling_rate, int(0.37 * model.sampling_rate)]
        windows = {0, getattr(extractor, "n_samples", 0)}
        if model.max_audio_seconds is None:
            lengths.append(int(2.3 * (max(windows) or model.sampling_rate)))
        theirs = {length: template(length).float().cpu().numpy() for length in lengths}
        for call in _CALLS:
            for window in sorted(windows):
                description = json.dumps(
                    {
                        "class": type(extractor).__name__, "config": config, "trims": family.trims_features,
                        "call": call, "input": family.audio, "window": window,
                    },
                    sort_keys=True,
                )  # fmt: skip
                if LogMel(description)._agrees(theirs):
                    return description
        return ""

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Features [rows, columns] of samples at the verifier's rate."""
        window = self._window or len(samples)
        parts = [self._extract(samples[at : at + window]) for at in range(0, len(samples), window)]
        return np.concatenate(parts).reshape(-1, parts[0].shape[-1])

    def _extract(self, samples: np.ndarray) -> np.ndarray:
        made = self._extractor(
            [samples], sampling_rate=self._extractor.sampling_rate, return_tensors="np", **self._call
        )
        features = np.asarray(made[self._name])
        return features[..., : int(made["attention_mask"].sum())] if self._trims else features

    def _agrees(self, theirs: Mapping[int, np.ndarray]) -> bool:
        """Whether it makes of tones what the processor makes of them."""
        for length, wanted in theirs.items():
            try:
                ours = self(tone(length))
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, ImportError):
                return False
            if ours.shape[-1] != wanted.shape[-1] or ours.size != wanted.size:
                return False
            if not np.allclose(ours.reshape(wanted.shape), wanted, atol=1e-2):
                return False
        return True


def tone(samples: int) -> np.ndarray:
    """A clip of this length."""
    return np.sin(np.arange(samples, dtype=np.float32) + 1)


def encode_flac(audio: Audio) -> bytes:
    """24-bit FLAC: exact for samples of up to 24 bits within full scale."""
    import soundfile

    held = io.BytesIO()
    soundfile.write(held, audio.samples, audio.rate, format="FLAC", subtype="PCM_24")
    return held.getvalue()


def encode_embeddings(encoder: AudioLM, audio: Audio) -> Quantized:
    """What the verifier's own audio encoder, on the device, makes of a clip."""
    return quantize(audio_rows(encoder, encoder.prepare(audio)).float().cpu().numpy())


class PromptMaker:
    """Makes a verifier's prompt of what a device sent.

    Parameters
    ----------
    model : AudioLM
        The verifier.

    Attributes
    ----------
    levels : tuple of str
        Uplink levels that the verifier can be served at, from the least revealing.
    reason : str
        Why there is none.
    description : str
        Of the feature extractor; see `LogMel`.
    """

    def __init__(self, model: AudioLM):
        self.model = model
        self.levels: tuple[Uplink, ...] = ()
        self.reason = self.description = ""
        self.sampling_rate = 16_000
        family = model.family
        if family is None:
            if model.tokenizer is None:
                self.reason = "it has no tokenizer for prompts"
            else:
                self.levels = ("none",)
            return
        if model.processor is None:
            self.reason = "it has no processor to prepare audio with"
            return
        self.sampling_rate = model.sampling_rate
        try:
            inputs = self._template(self.sampling_rate, None)
        except (UGSDError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            self.reason = f"its processor prepares no audio ({type(error).__name__}: {error})"
            return
        levels: list[Uplink] = []
        if prompt_embeddings(model.model, inputs, family.forward_kwargs) is not None:
            levels.append("embeddings")
        self.description = LogMel.describe(model, lambda samples: self._template(samples, None)[family.audio])
        if self.description:
            levels.append("features")
        self.levels = (*levels, "audio")

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
        return self.model.prepare((tone(samples), self.sampling_rate), prompt)

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


def pack_draft_logits(logits: Tensor) -> bytes:
    """The finite ones of a drafter's logits [1, K, V], as `protocol.Verify` carries them."""
    parts = []
    for row in logits[0].float().cpu():
        ids = torch.nonzero(row > -torch.inf)[:, 0]
        parts += [len(ids).to_bytes(4, "little"), ids.numpy().astype("<u4").tobytes(), row[ids].numpy().tobytes()]
    return b"".join(parts)
