"""A sequence whose end only the device knows goes on as one that was cut on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import FAMILIES, build
from ugsd_fast import AudioLM
from ugsd_fast.cache import GrowingCache
from ugsd_fast.errors import ModelError
from ugsd_fast.models.packed import forward_packed
from ugsd_fast.models.sequence import CachedSequence

WINDOWED = ("gemma3n", "gemma4")


def begun(family: str, attention: str = "sdpa") -> tuple[CachedSequence, CachedSequence]:
    """Two sequences of the same seven tokens behind the same prompt."""
    tiny = build(family)
    if attention != "sdpa":
        tiny.model.set_attn_implementation(attention)
    inputs: dict[str, Any] = tiny.inputs(0)
    if family == "moonshine":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    pair = AudioLM(tiny.model).open(dict(inputs)), AudioLM(tiny.model).open(dict(inputs))
    for sequence in pair:
        sequence.forward(torch.tensor([[7, 30, 5, 9, 11, 4, 8]]))
    return pair


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WINDOWED])
def test_steps_behind_an_open_end(family: str, attention: str) -> None:
    """Alone, and packed with a sequence whose end is known; two tokens of which one stands, then one, then closed."""
    read, unread = begun(family, attention)
    beside, _ = begun(family, attention)
    assert unread.can_be_open
    read.rollback(3)
    unread.rollback_unread(torch.tensor([3]))
    new = torch.tensor([[12, 40]])
    want = read.forward(new[:, :1])
    got = unread.forward(new, keep=2)[:, :1]
    tolerance = {"rtol": 0, "atol": 1e-5 * float(want.abs().max())}
    torch.testing.assert_close(got, want, **tolerance)
    unread.rollback_unread(torch.tensor([1]))
    want = read.forward(new[:, 1:])
    got = forward_packed([beside, unread], [new, new[:, 1:]], [1, 1])[1:]
    torch.testing.assert_close(got, want[0], **tolerance)
    assert unread.length > read.length
    unread.close(read.length)
    torch.testing.assert_close(unread.forward(new), read.forward(new), **tolerance)
    unread.rollback(2)
    assert unread.length == read.length - 2


def test_the_cache_grows_behind_an_open_end() -> None:
    read, unread = begun("voxtral")
    read.rollback(2)
    unread.rollback_unread(torch.tensor([2]))
    for token in range(3, 60):
        new = torch.tensor([[token]])
        want, got = read.forward(new), unread.forward(new)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_an_open_end_allows_nothing_but_forwards() -> None:
    sequence, _ = begun("voxtral")
    sequence.rollback_unread(torch.tensor([2]))
    for call, what in ((lambda: sequence.rollback(1), "rolled back"), (sequence.fork, "copied")):
        with pytest.raises(ModelError, match=f"only the device knows is {what}, expected close"):
            call()
    for length in (-1, sequence.length + 1):
        with pytest.raises(ValueError, match=f"close: length is {length}, expected 0 to {sequence.length}"):
            sequence.close(length)
    sequence.close(sequence.length - 2)
    sequence.rollback(1)
    assert not GrowingCache().can_be_open


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_refused(family: str) -> None:
    sequence, _ = begun(family)
    assert not sequence.can_be_open
    with pytest.raises(ModelError, match="several rows or a window"):
        sequence.rollback_unread(torch.tensor([1]))
