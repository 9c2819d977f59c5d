"""The growing cache: contents against a list, ragged rows against fresh forwards of each row alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    StaticCache,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.checkpoints import BUILDERS
from ugsd_fast.cache import GrowingCache, compact, enable_rollback, rollback, step_inputs
from ugsd_fast.errors import ModelError

VOCAB = 64
WINDOW = 6
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3n, shared keys": lambda: Gemma3nTextConfig(
        **SIZES | {"num_hidden_layers": 4},
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=4,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
}
CLASSES = {
    "gemma3n, shared keys": Gemma3nForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "gemma3": Gemma3ForCausalLM,
}


def build(family: str, attention: str) -> Any:
    config = CONFIGS[family]()
    config._attn_implementation = attention
    torch.manual_seed(0)
    return CLASSES[family](config).eval()


def growing(model: Any) -> GrowingCache:
    return GrowingCache(model.config, capacity=8, max_rollback=8)


def dynamic(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=128)


@torch.inference_mode()
def check_against_fresh(model: Any, cache: Any, *, batch: int, ragged: bool, padded: bool, rounds: int = 9) -> None:
    """Feed blocks of 5, 1 and 3 tokens, reject some, and compare every row's logits with those of the row alone."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, VOCAB, (batch, 11), generator=generator)
    mask = (torch.arange(11) >= torch.arange(batch)[:, None]).long() if padded else None
    rows = [prompt[row, row * padded :].tolist() for row in range(batch)]
    model(prompt, past_key_values=cache, **step_inputs(model, cache, prompt, mask))
    enable_rollback(cache)
    for turn in range(rounds):
        count = (5, 1, 3)[turn % 3]
        block = torch.randint(0, VOCAB, (batch, count), generator=generator)
        logits = model(block, past_key_values=cache, **step_inputs(model, cache, block, mask)).logits
        for row in range(batch):
            alone = torch.tensor([rows[row] + block[row].tolist()])
            places = torch.arange(alone.shape[1])[None]
            fresh = model(alone, position_ids=places, use_cache=False).logits[0, -count:]
            scale = max(1.0, fresh.abs().max().item())  # float32 rounds in proportion to the largest terms
            torch.testing.assert_close(logits[row], fresh, rtol=0, atol=1e-5 * scale)
        rejected = torch.randint(0, count + 1, (batch,), generator=generator)
        if not ragged:
            rejected[:] = rejected[0]
            rollback(cache, int(rejected[0]))
        elif isinstance(cache, GrowingCache):
            rollback(cache, rejected)
        else:
            length, known = int(cache.get_seq_length()), 0 if mask is None else mask.shape[1]
            mask = prompt.new_ones(batch, 0) if mask is None else mask
            mask = nn.functional.pad(mask, (0, length - known), value=1)
            rollback(cache, rejected, mask=mask)
            mask = mask[:, : int(cache.get_seq_length())]
            if turn % 4 == 3 and isinstance(cache, DynamicCache):
                mask = compact(cache, mask)
        for row in range(batch):
            rows[row] += block[row, : count - int(rejected[row])].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("batch", "ragged", "padded"),
    [(1, False, False), (1, True, False), (4, False, True), (4, True, False), (4, True, True)],
    ids=["one", "one by tensor", "batch padded", "ragged", "ragged padded"],
)
def test_rolled_back_rows_equal_fresh_forwards(
    family: str, attention: str, batch: int, ragged: bool, padded: bool
) -> None:
    model = build(family, attention)
    check_against_fresh(model, growing(model), batch=batch, ragged=ragged, padded=padded)


@torch.inference_mode()
def test_a_deep_copy_has_memory_of_its_own() -> None:
    cache = GrowingCache(capacity=8)
    states = torch.randn(2, 2, 6, 4)
    for layer in range(2):
        cache.update(states[:, :, :5], states[:, :, :5], layer)
        cache.update(states[:, :, 5:], states[:, :, 5:], layer)  # a step: views of the next ones are made
    cache.rollback([1, 0])
    other = copy.deepcopy(cache)
    assert (other.lengths, other.get_seq_length()) == ([5, 6], 6)
    other.rollback(2)
    for layer in range(2):
        other.update(-states[:, :, :1], -states[:, :, :1], layer)
    assert (cache.lengths, other.lengths) == ([5, 6], [4, 5])
    for layer in cache.layers:
        torch.testing.assert_close(layer.keys[1], states[1], rtol=0, atol=0)
    for layer in other.layers:
        torch.testing.assert_close(layer.keys[1, :, :4], states[1, :, :4], rtol=0, atol=0)
        torch.testing.assert_close(layer.keys[1, :, 4], -states[1, :, 0], rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "thinker"),
    [
        ("qwen2_audio", Qwen2AudioForConditionalGeneration),
        ("qwen2_5_omni", Qwen2_5OmniThinkerForConditionalGeneration),
        ("qwen3_omni", Qwen3OmniMoeThinkerForConditionalGeneration),
    ],
)
def test_audio_families_take_ragged_rows(family: str, thinker: Any, attention: str, tmp_path: Path) -> None:
    path = BUILDERS[family](tmp_path / family)
    model = thinker.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()
    check_against_fresh(model, growing(model), batch=4, ragged=True, padded=True, rounds=4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [dynamic, static])
def test_holes_in_the_mask_equal_fresh_forwards(cache: Callable[[Any], Any], attention: str) -> None:
    model = build("qwen2", attention)
    check_against_fresh(model, cache(model), batch=4, ragged=True, padded=True)


@pytest.mark.parametrize("cache", [dynamic, static])
def test_other_caches_roll_all_rows_back(cache: Callable[[Any], Any]) -> None:
    model = build("qwen2", "sdpa")
    check_against_fresh(model, cache(model), batch=2, ragged=False, padded=False)


def test_windows_of_transformers_roll_all_rows_back() -> None:
    model = build("gemma3", "sdpa")
    check_against_fresh(model, dynamic(model), batch=2, ragged=False, padded=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@torch.inference_mode()
def test_encoder_decoder_caches_roll_the_decoder_back(own: bool, ragged: bool, attention: str) -> None:
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=10, init_std=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    encoded = model.model.encoder(torch.randn(4, 8, 20)).last_hidden_state
    cache = EncoderDecoderCache(GrowingCache() if own else DynamicCache(), DynamicCache())
    prompt = torch.randint(4, VOCAB, (4, 7))
    model(encoder_outputs=(encoded,), decoder_input_ids=prompt, past_key_values=cache)
    enable_rollback(cache)
    rows, mask = prompt.tolist(), None if own or not ragged else torch.ones(4, 7).long()
    for rejected in ([2, 0, 4, 1], [0, 0, 1, 0], [5, 1, 3, 0], [1, 1, 1, 1]):
        block = torch.randint(4, VOCAB, (4, 5))
        step = step_inputs(model, cache, block, mask)
        places = {"decoder_attention_mask": step["attention_mask"], "decoder_position_ids": step["position_ids"]}
        fed = {"encoder_outputs": (encoded,), "decoder_input_ids": block, "past_key_values": cache}
        logits = model(**fed, **places).logits
        for row in range(4):
            alone = torch.tensor([rows[row] + block[row].tolist()])
            fresh = model(encoder_outputs=(encoded[row : row + 1],), decoder_input_ids=alone, use_cache=False).logits
            torch.testing.assert_close(logits[row], fresh[0, -5:], rtol=1e-5, atol=1e-5)
        counts = rejected if ragged else [rejected[0]] * 4
        if mask is not None:
            mask = nn.functional.pad(mask, (0, 5), value=1)
        assert rollback(cache, torch.tensor(counts), mask=mask) is cache
        mask = None if mask is None else mask[:, : cache.get_seq_length()]
        rows = [row + new[: 5 - count] for row, new, count in zip(rows, block.tolist(), counts, strict=True)]
    assert cache.cross_attention_cache.get_seq_length() == 10


def states(rows: list[list[float]]) -> Tensor:
    """[B, 2, q, 3] whose elements all say the token."""
    return torch.tensor(rows).view(len(rows), 1, -1, 1).expand(-1, 2, -1, 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), window=st.sampled_from([None, 1, 2, 5]))
def test_any_sequence_of_appends_and_rollbacks_leaves_what_lists_hold(
    data: st.DataObject, batch: int, window: int | None
) -> None:
    cache = GrowingCache(Gemma3TextConfig(**SIZES | {"num_hidden_layers": 1}, sliding_window=window,
        layer_types=["sliding_attention" if window else "full_attention"]), capacity=1, max_rollback=4)  # fmt: skip
    rows: list[list[float]] = [[] for _ in range(batch)]
    token = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        count = data.draw(st.integers(1, 4) if rows[0] else st.integers(1, 30))
        new = [[token + 100 * row + i / 64 for i in range(count)] for row in range(batch)]
        token += 1
        before = [len(row) for row in rows]
        sizes = cache.get_mask_sizes(count, 0)
        keys, values = cache.update(states(new), -states(new), 0)
        assert (keys.shape[2], max(before) + count) == (sizes[0], sum(sizes))
        assert torch.equal(keys, -values)
        for row in range(batch):
            rows[row] += new[row]
            first = max(before[row] - window + 1, 0) if window else 0
            assert keys[row, 1, first - sizes[1] : len(rows[row]) - sizes[1], 2].tolist() == rows[row][first:]
        rejected = [data.draw(st.integers(0, min(4, count))) for _ in range(batch)]
        same = len(set(rejected)) == 1 and data.draw(st.booleans())
        rollback(cache, rejected[0] if same else torch.tensor(rejected))
        rows = [row[: len(row) - k] for row, k in zip(rows, rejected, strict=True)]
        assert cache.lengths == [len(row) for row in rows]


def test_growth_doubles_and_steps_write_in_place() -> None:
    cache = GrowingCache(capacity=4)
    where, capacities = set(), []
    for token in range(100):
        keys, _ = cache.update(states([[float(token)]]), states([[float(token)]]), 0)
        assert keys[0, 0, :, 0].tolist() == list(range(token + 1))
        where.add(keys.data_ptr())
        capacities.append(cache.layers[0].capacity)
    assert sorted(set(capacities)) == [4, 8, 16, 32, 64, 128]
    assert len(where) <= 6


def test_windows_do_not_grow() -> None:
    cache = GrowingCache(CONFIGS["gemma3"](), max_rollback=8)
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 300, 3), torch.zeros(1, 2, 300, 3), layer)
    for _ in range(700):
        for layer in range(3):
            cache.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), layer)
    assert cache.layers[0].capacity <= 64
    assert cache.layers[1].capacity == 1024
    assert cache.get_seq_length() == 1000


def test_a_window_holds_its_tokens_over_many_moves() -> None:
    config = Gemma3TextConfig(**SIZES | {"num_hidden_layers": 1}, sliding_window=3, layer_types=["sliding_attention"])
    cache, row = GrowingCache(config, capacity=1, max_rollback=4), list[float]()
    generator = torch.Generator().manual_seed(5)
    for token in range(600):
        count, rejected = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        row += [token + i / 8 for i in range(count)]
        keys, values = cache.update(states([row[-count:]]), -states([row[-count:]]), 0)
        assert keys[0, 1, :, 2].tolist() == row[max(len(row) - count - 2, 0) :]
        assert torch.equal(keys, -values)
        rejected = min(rejected, count) * (token % 3 > 0)
        rollback(cache, rejected)
        del row[len(row) - rejected :]
    assert cache.layers[0].capacity <= 32


def test_a_window_refuses_to_bring_back_what_it_dropped() -> None:
    cache = GrowingCache(CONFIGS["gemma3"](), capacity=8, max_rollback=4)
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 300, 3), torch.zeros(1, 2, 300, 3), layer)
    assert rollback(cache, 4).get_seq_length() == 296
    with pytest.raises(ValueError, match="window of 6, expected at most max_rollback=4"):
        rollback(cache, 40)
    assert {layer.get_seq_length() for layer in cache.layers} == {296}


def test_rows_leave_and_repeat() -> None:
    cache = GrowingCache()
    cache.update(states([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), states([[0.0] * 2] * 3), 0)
    rollback(cache, torch.tensor([0, 1, 1]))
    cache.batch_select_indices(torch.tensor([False, True, True]))
    assert cache.lengths == [1, 1]
    assert not cache.is_ragged
    cache.batch_repeat_interleave(2)
    keys, _ = cache.update(states([[9.0]] * 4), states([[9.0]] * 4), 0)
    assert keys[:, 0, :, 0].tolist() == [[3.0, 9.0], [3.0, 9.0], [5.0, 9.0], [5.0, 9.0]]
    cache.reset()
    assert (cache.get_seq_length(), cache.lengths) == (0, [])


def test_generate_takes_it() -> None:
    model = build("gemma3", "sdpa")
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, past_key_values=growing(model), **options)
    assert torch.equal(ours, model.generate(ids, **options))


def test_modes_mix() -> None:
    cache = GrowingCache()
    with torch.inference_mode():
        cache.update(states([[1.0]]), states([[1.0]]), 0)
        cache.update(states([[2.0]]), states([[2.0]]), 0)
    keys, _ = cache.update(states([[3.0]]), states([[3.0]]), 0)
    assert keys[0, 0, :, 0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="require grad"):
        cache.update(torch.ones(1, 2, 2, 3, requires_grad=True), torch.ones(1, 2, 2, 3), 0)


def test_errors_say_what_was_expected() -> None:
    cache = GrowingCache()
    cache.update(states([[1.0, 2.0]] * 2), states([[1.0, 2.0]] * 2), 0)
    with pytest.raises(ValueError, match=r"rejected is 3, expected 0 to 2"):
        rollback(cache, 3)
    with pytest.raises(ValueError, match=r"rejected is -1 of row 1, expected 0 to 2"):
        rollback(cache, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"rejected has 3 numbers, expected 2"):
        rollback(cache, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"states have shape \(1, 2, 1, 3\), expected \[2, 2, q, 3\]"):
        cache.update(states([[1.0]]), states([[1.0]]), 0)
    config = Qwen2Config(**SIZES)
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="layer 1 is a LinearAttentionLayer"):
        GrowingCache(config)
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    config.attention_chunk_size = 4
    assert not GrowingCache.supports(config)
    with pytest.raises(ModelError, match="layer 1 is a DynamicSlidingWindowLayer of attention in chunks"):
        GrowingCache(config)


def test_ragged_rows_are_refused_where_the_attention_takes_no_mask() -> None:
    model = build("qwen2", "sdpa")
    cache = growing(model)
    for layer in range(3):
        cache.update(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), layer)
    rollback(cache, torch.tensor([0, 2]))
    model.config._attn_implementation = "flash_attention_2"
    assert step_inputs(model, cache, torch.zeros(2, 1))["attention_mask"].shape == (2, 6)
    with pytest.raises(ModelError, match="'flash_attention_2' takes none"):
        step_inputs(model, cache, torch.zeros(2, 3))
