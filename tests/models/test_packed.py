"""One forward over several requests' new tokens equals a forward of each, for every family, mask and cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.reads import HostReads
from tests.models.tiny import FAMILIES, Tiny, build
from ugsd_fast import AudioLM
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.sequence import CachedSequence

ROUNDS = 8


def text_model(attention: str = "sdpa", **settings: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "initializer_range": 0.3}
    config = Qwen2Config(**sizes, **heads, **settings)
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config).eval()


def check_equal(model: Any, opened: Callable[[int], CachedSequence], rows: int = 3, first: int = 1) -> None:
    """Ragged appends and rollbacks, packed and each alone; the prompts in `first` forwards, then one a turn."""
    generator = torch.Generator().manual_seed(0)
    packed, alone = [[opened(row) for row in range(rows)] for _ in range(2)]
    calls = [0]
    for turn in range(ROUNDS):
        counts = torch.randint(0 if turn == 0 else 1, 6, (rows,), generator=generator).tolist()
        tokens = [torch.randint(3, 60, (1, count), generator=generator) for count in counts]
        keep = [int(torch.randint(1, count + 2 - (turn > 0), (), generator=generator)) for count in counts]
        calls[0] = 0
        hook = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        got = forward_packed(packed, tokens, keep)
        hook.remove()
        assert calls[0] == (first if turn == 0 else 1)
        want = [one.forward(new, keep=k)[0] for one, new, k in zip(alone, tokens, keep, strict=True)]
        torch.testing.assert_close(got, torch.cat(want), rtol=0, atol=1e-5 * float(torch.cat(want).abs().max()))
        for row, count in enumerate(counts):
            rejected = int(torch.randint(0, count + 1, (), generator=generator))
            packed[row].rollback(rejected)
            alone[row].rollback(rejected)
    assert [one.length for one in packed] == [one.length for one in alone]
    assert [one.forwards for one in packed] == [ROUNDS] * rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_forward_equals_one_of_each(family: str) -> None:
    tiny = build(family)
    audio_lm = AudioLM(tiny.model)
    check_equal(tiny.model, lambda clip: audio_lm.open(tiny.inputs(clip)))


@pytest.mark.parametrize("family", ["whisper", "moonshine"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_decoders_begin_together_where_their_clips_have_one_length(family: str, attention: str) -> None:
    tiny = build(family)
    tiny.model.set_attn_implementation(attention)
    audio_lm, name = AudioLM(tiny.model), "input_features" if family == "whisper" else "input_values"
    heard = tiny.model.get_encoder()(tiny.inputs(1)[name])

    def inputs(clip: int) -> dict[str, Any]:
        made = {name: tiny.inputs(clip)[name], "decoder_input_ids": torch.arange(3, 5 + clip)[None]}
        if clip >= 3:  # what another has heard for it
            return {"encoder_outputs": heard, "decoder_input_ids": made["decoder_input_ids"]}
        if family == "moonshine":
            made["attention_mask"] = torch.ones_like(made[name], dtype=torch.long)
            if clip == 2:
                made = {key: value[:, :-300] if key != "decoder_input_ids" else value for key, value in made.items()}
        return made

    clips: list[int] = []
    hook = tiny.model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: clips.append(len(args[0] if args else kwargs[name])), with_kwargs=True
    )
    check_equal(tiny.model, lambda row: audio_lm.open(inputs(row)), rows=5, first=3 if family == "moonshine" else 2)
    hook.remove()
    alone = [1, 1, 1]  # of the sequences that `check_equal` compares with
    assert clips == ([2, 1] if family == "moonshine" else [3]) + alone


# Of a clip's 4000 samples, those that are sound; the encoder puts out a position for every 384.
AUDIO = [range(3000), range(4000), range(1500), [*range(700), *range(2000, 3500)], range(800, 4000)]


def padded(tiny: Tiny, *clips: int) -> dict[str, Tensor]:
    """A batch of clips, padded as `AUDIO` says."""
    batch: dict[str, Tensor] = {"input_values": torch.cat([tiny.inputs(clip)["input_values"] for clip in clips])}
    batch["attention_mask"] = torch.zeros(batch["input_values"].shape, dtype=torch.long)
    for row, clip in enumerate(clips):
        batch["attention_mask"][row, list(AUDIO[clip])] = 1
    return batch


def moonshine(attention: str) -> Tiny:
    tiny = build("moonshine")
    tiny.model.set_attn_implementation(attention)
    return tiny


@torch.inference_mode()
def own_logits(model: Any, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What transformers' own forward makes of them, without a cache and with the masks that it builds."""
    return model(**batch, decoder_input_ids=nn.functional.pad(tokens, (1, 0), value=1), use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_audio_of_an_encoder_decoder_shares_forwards(attention: str) -> None:
    """Wherever its padding lies, and whether the encoder runs in the shared forward or has run before."""
    tiny = moonshine(attention)
    audio_lm = AudioLM(tiny.model)
    rows, clips = range(len(AUDIO)), []
    hook = tiny.model.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: clips.append(len(args[0] if args else kwargs["input_values"])), with_kwargs=True
    )
    check_equal(tiny.model, lambda row: audio_lm.open(padded(tiny, row)), rows=5)
    hook.remove()
    assert clips == [5, 1, 1, 1, 1, 1]  # together; then, to compare with, alone

    heard = [tiny.model.get_encoder()(**padded(tiny, row)) for row in rows]
    inputs = {"decoder_input_ids": torch.ones(1, 1, dtype=torch.long)}
    given = [{**inputs, "encoder_outputs": one, "attention_mask": padded(tiny, 0)["attention_mask"]} for one in heard]
    given[1]["attention_mask"] = given[1]["attention_mask"][:, :-7]  # of no use any more
    check_equal(tiny.model, lambda row: audio_lm.open(given[row]), rows=5)
    assert [one.attention_mask.shape[1] for one in heard] == [9] * 5, "left as they came"

    tokens = [torch.tensor([[7, 11, 30][: 1 + row % 3]]) for row in rows]
    packed = [audio_lm.open(padded(tiny, row)) for row in rows]
    got = forward_packed(packed, tokens, [new.shape[1] + 1 for new in tokens])
    want = torch.cat([own_logits(tiny.model, padded(tiny, row), new)[0] for row, new in enumerate(tokens)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    positions = [int(one.attention_mask.sum()) for one in heard]
    assert [one.cache.cross_attention_cache.layers[0].keys.shape[2] for one in packed] == positions
    assert len(set(positions)) > 3


def test_whispers_encoder_hears_padding_too() -> None:
    """Its mask is for training: what transformers makes of a clip with one is what it makes of it without."""
    tiny = build("whisper")
    masks = [(torch.arange(48)[None] < 48 - 10 * row).long() for row in range(3)]
    audio_lm = AudioLM(tiny.model)
    check_equal(tiny.model, lambda row: audio_lm.open({**tiny.inputs(row), "attention_mask": masks[row]}))
    tokens = torch.tensor([[7, 11]])
    bare, masked = (audio_lm.open({**tiny.inputs(), **more}) for more in ({}, {"attention_mask": masks[2]}))
    assert torch.equal(masked.forward(tokens), bare.forward(tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("clips", [(0, 1, 3), (2, 2)], ids=["masks of their own", "one mask"])
def test_a_batch_of_padded_clips_in_one_sequence(attention: str, clips: tuple[int, ...]) -> None:
    tiny = moonshine(attention)
    batch = padded(tiny, *clips)
    sequence = AudioLM(tiny.model).open(batch)
    tokens = torch.randint(3, 60, (len(clips), 8), generator=torch.Generator().manual_seed(0))
    got = torch.cat([sequence.forward(tokens[:, start : start + 4]) for start in (0, 4)], 1)
    want = own_logits(tiny.model, batch, tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with HostReads() as reads:
        sequence.forward(tokens[:, :2])
    assert not reads.ops


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_and_its_origin_go_on_apart(family: str) -> None:
    """Rolled back and continued in turn, in forwards that both share, each is as if there were no other."""
    tiny = build(family)
    audio_lm = AudioLM(tiny.model)
    inputs = tiny.inputs(0)
    origin, alone, other = (audio_lm.open(dict(inputs)) for _ in range(3))
    begun = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    for sequence in (origin, alone, other):
        sequence.forward(begun, keep=1)
    fork = origin.fork()
    for turn, rejected in enumerate((2, 0, 1)):
        fork.rollback(rejected)
        other.rollback(rejected)
        new = [torch.tensor([[7 + turn, 11]]), torch.tensor([[30 + turn, 5, 9]])]
        got = forward_packed([origin, fork], new, [2, 3])
        want = torch.cat([alone.forward(new[0])[0], other.forward(new[1])[0]])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert (origin.length, fork.length) == (alone.length, other.length)
    assert (origin.forwards, fork.forwards) == (4, 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window 4"])
def test_both_attentions_with_and_without_a_window(attention: str, window: int | None) -> None:
    settings = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = text_model(attention, **settings)
    check_equal(model, lambda row: CachedSequence(model, {"input_ids": torch.arange(3, 6 + 4 * row)[None]}), rows=4)


def test_flash_attention_is_asked_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention aligns its causal mask to the newest key by itself; here a stand-in does."""

    def flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        assert attention_mask is None or attention_mask.dim() == 2
        assert kwargs.get("position_ids") is None or kwargs["position_ids"].shape[0] == query.shape[0]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask[None, None], **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = text_model()
    model.config._attn_implementation = "flash_attention_2"
    try:
        check_equal(model, lambda row: CachedSequence(model, {"input_ids": torch.arange(3, 6 + row)[None]}))
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("ugsd|flash_attention_2", None)


def test_the_model_stays_itself_for_everybody_else() -> None:
    model, untouched = text_model(), text_model()
    two = [CachedSequence(model, {"input_ids": torch.arange(3, 6 + row)[None]}) for row in range(2)]
    for _ in range(2):
        forward_packed(two, [torch.tensor([[7]])] * 2, [1, 1])
    prompt = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (prompt > 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), untouched.generate(prompt, **settings))
    assert "_attn_implementation" not in model.config.to_json_string()


def test_padded_prompts_take_a_forward_of_their_own() -> None:
    model = text_model()
    ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])

    def opened() -> list[CachedSequence]:
        return [
            CachedSequence(model, {"input_ids": ids, "attention_mask": mask}),
            CachedSequence(model, {"input_ids": ids[:, 2:]}),
        ]

    packed = opened()
    new = [torch.tensor([[9, 4]])] * 2
    for _ in range(2):
        got = forward_packed(packed, new, [2, 2])
    torch.testing.assert_close(got[:2], got[2:], rtol=0, atol=1e-5)
    assert packed[0].pack_key(new[0]) is None
