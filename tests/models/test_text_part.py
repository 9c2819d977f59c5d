"""Forwards behind the audio go to the text decoder alone, where nobody can tell the difference."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.models.tiny import FAMILIES, build
from ugsd_fast import AudioLM
from ugsd_fast.models.families import FAMILIES as ALL_FAMILIES
from ugsd_fast.models.families import family_of
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.sequence import CachedSequence, last_logits
from ugsd_fast.models.text_part import text_part

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]
NOTHING = torch.zeros(1, 0, dtype=torch.long)
TINY = [name for name in FAMILIES if any(name in family.model_types and family.text_alone for family in ALL_FAMILIES)]


def calls_of(module: nn.Module, count: list[int]) -> Any:
    return module.register_forward_pre_hook(lambda *_: count.append(1))


def check_same_logits(model: Any, opened: Callable[[], CachedSequence]) -> None:
    """The same logits bit by bit, one request and several, with the whole model and with its text part."""
    logits = []
    for whole in (True, False):
        count: list[int] = []
        hook = model.register_forward_hook(lambda *_, count=count: count.append(1)) if whole else None
        sequences = [opened() for _ in range(2)]
        for sequence in sequences:
            sequence.forward(NOTHING)
        count.clear()
        tokens = [torch.tensor([[7, 11, 3]]), torch.tensor([[5]])]
        new = [forward_packed(sequences, tokens, [2, 1])]
        new += [sequences[0].forward(torch.tensor([ids])) for ids in ([4, 9], [6], [8])]
        logits.append(new)
        assert len(count) == (4 if whole else 0)
        if hook is not None:
            hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(*logits, strict=True))


@pytest.mark.parametrize("family", TINY)
def test_the_text_part_has_the_whole_models_logits(family: str) -> None:
    tiny = build(family)
    check_same_logits(
        tiny.model,
        lambda: CachedSequence(tiny.model, tiny.inputs(clip=0), family_of(tiny.model.config.model_type)),
    )


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni"])
def test_of_checkpoints_too(family: str, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    inputs = model.prepare(speech)
    check_same_logits(model.model, lambda: model.open(inputs))


def test_every_family_that_says_so_is_tested() -> None:
    said = {name for family in ALL_FAMILIES if family.text_alone for name in family.model_types}
    assert said == {
        *TINY,
        "qwen2_audio",
        "qwen2_5_omni",
        "qwen2_5_omni_thinker",
        "qwen3_omni_moe",
        "qwen3_omni_moe_thinker",
    }


@pytest.mark.parametrize("name", ["", "model"])
def test_who_looks_at_the_modules_around_sees_every_forward(name: str) -> None:
    model = build("voxtral").model
    around = model.get_submodule(name)
    assert text_part(model) is not None
    for hook in (around.register_forward_hook, around.register_forward_pre_hook):
        handle = hook(lambda *_: None)
        assert text_part(model) is None
        handle.remove()
    around.forward = around.forward  # as an offloading or a profiling library replaces it
    assert text_part(model) is None
    del around.forward
    assert text_part(model) is not None
    around.compile()
    assert text_part(model) is None


def test_who_looks_at_the_decoder_sees_its_forwards_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("voxtral").model
    sequence = CachedSequence(model, build("voxtral").inputs(clip=0), family_of("voxtral"))
    sequence.forward(NOTHING)
    part = text_part(model)
    assert part is not None
    step, count = torch.tensor([[7]]), [0]
    plain = sequence.forward(step)

    def looks(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return decorated(*args, **kwargs)

    decorated = type(part.decoder).forward
    for number, owner in enumerate((part.decoder, type(part.decoder)), 1):
        with monkeypatch.context() as patches:
            method = functools.partial(looks, part.decoder) if owner is part.decoder else looks
            patches.setattr(owner, "forward", method, raising=True)
            sequence.rollback(1)
            assert torch.equal(sequence.forward(step), plain)
        assert count == [number]
    handle = part.decoder.register_forward_hook(lambda *_: count.append(1))
    sequence.forward(step)
    handle.remove()
    sequence.forward(step)
    assert count == [2, 1]


def test_ready_masks_are_for_full_attention_alone(audio_lm: LoadModel) -> None:
    for family, takes in (("qwen2_audio", True), ("qwen2_5_omni", True)):
        part = text_part(audio_lm(family).model)
        assert part is not None
        assert part.takes_masks is takes
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    for windows in (False, True):
        config = Qwen2Config(
            **settings,
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            use_sliding_window=windows,
            sliding_window=4,
            max_window_layers=1,
        )
        part = text_part(Qwen2ForCausalLM(config).eval())
        assert part is not None
        assert part.takes_masks is not windows


def test_a_model_that_nobody_uses_is_freed() -> None:
    model = build("voxtral").model
    assert text_part(model) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_head_that_was_replaced_is_the_one_that_is_called() -> None:
    model = build("voxtral").model
    assert text_part(model) is not None
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    model.set_output_embeddings(head)
    part = text_part(model)
    assert part is not None
    assert part.head is head


def test_a_forward_that_others_replaced_does_not_keep_its_model() -> None:
    model = build("voxtral").model
    whole = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda owner, *args, **kwargs: None, model), whole)
    with last_logits(model, 1) as extra:
        assert extra == {"logits_to_keep": 1}
    gone = weakref.ref(model)
    del model, whole
    gc.collect()
    assert gone() is None
