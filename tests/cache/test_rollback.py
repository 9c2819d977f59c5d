"""Rolling back transformers' caches."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicSlidingWindowLayer,
    Fp8QuantizedLayer,
    LinearAttentionLayer,
    QuantizedLayer,
)

from ugsd_fast.cache import enable_rollback, rollback
from ugsd_fast.errors import ModelError


def filled(length: int, *, batch: int = 1, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        states = torch.arange(length, dtype=torch.float32).view(1, 1, -1, 1).expand(batch, 3, -1, 4) + 100 * layer
        cache.update(states, -states, layer)
    return cache


@pytest.mark.parametrize("rejected", [0, 1, 6, 7])
def test_rollback_forgets_the_newest_tokens_of_every_layer(rejected: int) -> None:
    cache = filled(7)
    assert rollback(cache, rejected) is cache
    for index, layer in enumerate(cache.layers):
        expected = torch.arange(7 - rejected, dtype=torch.float32) + 100 * index
        assert layer.keys[0, 0, :, 0].tolist() == expected.tolist()
        assert layer.values[0, 2, :, 3].tolist() == (-expected).tolist()


def test_rollback_is_a_view() -> None:
    cache = filled(7)
    before = cache.layers[0].keys.data_ptr()
    rollback(cache, 3)
    assert cache.layers[0].keys.data_ptr() == before


def test_rollback_takes_one_number_for_all_rows() -> None:
    cache = filled(7, batch=2)
    assert rollback(cache, torch.tensor([3, 3])).get_seq_length() == 4
    with pytest.raises(ValueError, match=r"rejected is \[1, 2\], expected one number.* or a mask"):
        rollback(cache, torch.tensor([1, 2]))


@pytest.mark.parametrize("rejected", [-1, 8])
def test_rollback_checks_its_range(rejected: int) -> None:
    with pytest.raises(ValueError, match=f"rejected is {rejected}, expected 0 to 7"):
        rollback(filled(7), rejected)


def sliding_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


@torch.inference_mode()
def test_sliding_windows_roll_back_exactly_and_do_not_grow() -> None:
    model = sliding_model()
    cache = DynamicCache(config=model.config)
    assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    generator = torch.Generator().manual_seed(1)
    final = torch.randint(0, 64, (1, 11), generator=generator)
    model(input_ids=final, past_key_values=cache, use_cache=True)
    enable_rollback(cache)
    for rejected in (2, 0, 5, 1, 4, 3):
        block = torch.randint(0, 64, (1, 5), generator=generator)
        positions = torch.arange(final.shape[1], final.shape[1] + 5)[None]
        logits = model(input_ids=block, position_ids=positions, past_key_values=cache, use_cache=True).logits
        fresh = model(input_ids=torch.cat([final, block], 1)).logits[:, -5:]
        torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-4)
        rollback(cache, rejected)
        final = torch.cat([final, block[:, : 5 - rejected]], dim=1)
        assert max(layer.keys.shape[-2] for layer in cache.layers if layer.is_sliding) <= 6


def test_caches_that_cannot_forget_are_refused_by_name() -> None:
    sliding = StaticCache(config=sliding_model().config, max_cache_len=32)
    with pytest.raises(ModelError, match="layer 1 of StaticCache is a StaticSlidingWindowLayer.*window overwrites"):
        enable_rollback(sliding)
    for kind in (Fp8QuantizedLayer, QuantizedLayer):
        cache = filled(3)
        cache.layers.append(object.__new__(type("Layer", (kind,), dict.fromkeys(kind.__abstractmethods__))))
        with pytest.raises(ModelError, match="quantised storage cannot be cut"):
            rollback(cache, 1)
    cache = filled(3)
    cache.layers.append(DummyLayer())
    enable_rollback(cache)
    assert rollback(cache, 2).get_seq_length() == 1
    cache = filled(3)
    recurrent = LinearAttentionLayer.__new__(LinearAttentionLayer)
    cache.layers.append(recurrent)
    with pytest.raises(ModelError, match="layer 2 .* LinearAttentionLayer.*recurrent state"):
        enable_rollback(cache)


@torch.inference_mode()
def test_windows_refuse_what_is_not_exact() -> None:
    model = sliding_model()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(2, 11, dtype=torch.long), past_key_values=cache)
    enable_rollback(cache)
    with pytest.raises(ModelError, match="layer 1 is a DynamicSlidingWindowLayer.*holes would push"):
        rollback(cache, torch.tensor([1, 0]), mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match="rejected is 3, expected at most 0"):
        rollback(cache, 3)
