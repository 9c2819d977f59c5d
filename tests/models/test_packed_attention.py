"""The extension's attention over many requests, on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ugsd_fast.ops.backend import extension

# heads, heads of keys, width, width of values: plain, grouped and of odd widths, all on one, one lane, wide
SHAPES = [(4, 4, 32, 32), (4, 2, 20, 24), (6, 1, 64, 1), (1, 1, 1, 3), (2, 2, 128, 128)]
# slots, tokens in them, new ones: the first token, an odd block, more than four queries, a prompt, a prompt's end
REQUESTS = [(64, 1, 1), (128, 70, 3), (64, 64, 6), (64, 40, 40), (256, 200, 33)]


@pytest.fixture(params=extension.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = extension.isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("isa")
def test_packed_attention(shape: tuple[int, int, int, int], threads: int) -> None:
    heads, kv_heads, width, value_width = shape
    torch.manual_seed(0)
    total = sum(count for _, _, count in REQUESTS)
    query, keys, values = (
        torch.randn(1, total, number, columns).transpose(1, 2)  # strided, as modules give them
        for number, columns in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    )
    held = [[torch.randn(1, kv_heads, slots, columns) for columns in (width, value_width)] for slots, _, _ in REQUESTS]
    for (key, value), (_, tokens, _) in zip(held, REQUESTS, strict=True):
        key[:, :, tokens:] = value[:, :, tokens:] = torch.nan  # never read
    expected = [[one.clone() for one in pair] for pair in held]
    requests = [
        number
        for (key, value), given in zip(held, REQUESTS, strict=True)
        for number in (key.data_ptr(), value.data_ptr(), *given)
    ]
    out = torch.full((1, total, heads, value_width), torch.nan)
    extension.append_slots(keys, values, requests)
    extension.packed_attention(query, out, requests, kv_heads, 0.3, threads)
    at = 0
    for (_, tokens, count), pair, wanted in zip(REQUESTS, held, expected, strict=True):
        new = slice(at, at + count)
        for got, want, states in zip(pair, wanted, (keys, values), strict=True):
            want[:, :, tokens - count : tokens] = states[:, :, new]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        reference = _attend(query[:, :, new], *(one[:, :, :tokens] for one in wanted))
        torch.testing.assert_close(out[:, new].double(), reference, rtol=1e-4, atol=2e-5)
        at += count


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    groups, tokens, count = query.shape[1] // keys.shape[1], keys.shape[2], query.shape[2]
    keys, values = (one.double().repeat_interleave(groups, 1) for one in (keys, values))
    mask = torch.arange(tokens) <= torch.arange(tokens - count, tokens)[:, None]
    return nn.functional.scaled_dot_product_attention(query.double(), keys, values, mask, scale=0.3).transpose(1, 2)
