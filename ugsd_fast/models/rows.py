"""One request's inputs out of a batch's: the padding left out, and of the audio each row's own clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from ugsd_fast.errors import ModelError
from ugsd_fast.models.audio_lm import AudioLM, without_padding
from ugsd_fast.models.encoder_decoder import row_of
from ugsd_fast.models.sequence import CLIP_INPUTS

_OF_CLIPS = CLIP_INPUTS | {"audio_feature_lengths"}
_HEARD = {"encoder_outputs", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}


def split_rows(model: AudioLM, inputs: Mapping[str, Any], *, keep_padding: bool = False) -> list[dict[str, Any]]:
    """Inputs of one row each.

    Parameters
    ----------
    model : AudioLM
        Whose inputs they are.
    inputs : mapping of str to Tensor
        ``input_ids`` [B, P], left-padded by ``attention_mask`` [B, P], and the audio tensors of the family, one entry a
        clip; or an encoder-decoder's, one entry a row, of which ``encoder_outputs`` may stand for what was heard.
    keep_padding : bool
        Leave prompts as long as they are, each with its mask.

    Returns
    -------
    list of dict
        Batches of one, without what is None.

    Raises
    ------
    ModelError
        If a prompt is padded on the right, an input is none of the family's, or the clips do not fit the placeholders.

    Examples
    --------
    >>> import torch
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
    >>> model = AudioLM(Qwen2ForCausalLM(Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes)))
    >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    >>> rows = split_rows(model, {"input_ids": torch.tensor([[0, 4, 5], [6, 7, 8]]), "attention_mask": mask})
    >>> [row["input_ids"].tolist() for row in rows]
    [[[4, 5]], [[6, 7, 8]]]
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    decodes = model.family is not None and model.family.is_encoder_decoder
    return _heard_rows(model, inputs, keep_padding) if decodes else _prompted_rows(model, inputs, keep_padding)


def _prompted_rows(model: AudioLM, inputs: dict[str, Any], keep_padding: bool) -> list[dict[str, Any]]:
    ids: Tensor = inputs["input_ids"]
    clips = {name: inputs.pop(name) for name in _OF_CLIPS & inputs.keys()}
    _check_padding(inputs.get("attention_mask"))
    foreign = [name for name, value in inputs.items() if getattr(value, "shape", None) != ids.shape]
    if foreign:
        raise ModelError(f"{type(model.model).__name__}: got {min(foreign)}, expected inputs of audio and text only")
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(ids.shape[0])]
    if not keep_padding:
        rows = [without_padding(row) for row in rows]
    if clips:
        for row, own in zip(rows, _clips_of(model, clips, rows), strict=True):
            row.update({name: value[own] for name, value in clips.items()} if own.start < own.stop else {})
    return rows


def _clips_of(model: AudioLM, clips: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> list[slice]:
    """Which clips fill each row's placeholders."""
    family, config = model.family, model.model.config
    count = next(iter(clips.values())).shape[0]
    if family is None or family.audio_tokens is None:
        raise ModelError(f"{type(model.model).__name__}: got {min(clips)}, expected no audio for a model of no family")
    end, found = 0, []
    for row in rows:
        start = end
        wanted = int((row["input_ids"] == family.audio_token_id(config)).sum())
        while end < count and _filled(family, config, clips, slice(start, end)) < wanted:
            end += 1
        found.append(slice(start, end))
    if end < count:
        raise ModelError(
            f"{type(model.model).__name__}: the prompts have placeholders for {end} of {count} clips, expected for all"
        )
    return found


def _filled(family: Any, config: Any, clips: Mapping[str, Tensor], own: slice) -> int:
    return family.audio_tokens(config, {name: value[own] for name, value in clips.items()})


def _heard_rows(model: AudioLM, inputs: dict[str, Any], keep_padding: bool) -> list[dict[str, Any]]:
    assert model.family is not None
    foreign = inputs.keys() - _HEARD - {model.family.audio}
    if foreign:
        raise ModelError(f"{type(model.model).__name__}: got {min(foreign)}, expected inputs of audio and text only")
    count = next(iter(value[0] if isinstance(value, ModelOutput) else value for value in inputs.values())).shape[0]
    mask = inputs.pop("decoder_attention_mask", None)
    _check_padding(mask)
    if keep_padding and mask is not None and not bool(mask.all()):
        raise ModelError("an encoder-decoder's prompts have padding, expected prompts of one length")
    rows = [{name: row_of(value, row) for name, value in inputs.items()} for row in range(count)]
    for row, own in zip(rows, [] if mask is None else mask.split(1)):
        prompt = {"input_ids": row["decoder_input_ids"], "attention_mask": own}
        row["decoder_input_ids"] = without_padding(prompt)["input_ids"]
    return rows


def _check_padding(mask: Tensor | None) -> None:
    """Refuse prompts that are padded elsewhere than on the left."""
    if mask is None:
        return
    wrong = (mask.bool().int().diff(dim=1) < 0).any(1) | (mask[:, -1] == 0)
    if bool(wrong.any()):
        raise ModelError(
            f"row {int(wrong.int().argmax()) + 1} of {len(mask)}: the attention mask has zeros behind the prompt's "
            "first token, expected left padding only"
        )
