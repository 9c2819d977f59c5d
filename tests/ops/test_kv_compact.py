"""`kv_compact` on every backend against a gather written out slot by slot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops

pytestmark = cases.on_backends("kv_compact")

KEYS = torch.zeros(2, 1, 3, 4)
MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "all": lambda b, t: torch.ones(b, t, dtype=torch.bool),
    "none": lambda b, t: torch.zeros(b, t, dtype=torch.bool),
    "random": lambda b, t: torch.rand(b, t, generator=cases.generator(1)) < 0.5,
    "holes": lambda b, t: torch.rand(b, t, generator=cases.generator(2)) < 0.95,
    "tail": lambda b, t: torch.arange(t) < t - torch.arange(b)[:, None] % (t + 1),
    "last-alone": lambda b, t: (torch.arange(t) == t - 1).expand(b, t),
    "first-dropped": lambda b, t: (torch.arange(t) > 0).expand(b, t),
    "alternating": lambda b, t: (torch.arange(t) % 2 == 1).expand(b, t),
}


def layer(batch: int, heads: int, slots: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(batch, heads, slots, width, generator=cases.generator(seed)).mul(100).to(dtype)


def compacted(tensor: Tensor, mask: Tensor, align: str) -> tuple[Tensor, Tensor]:
    """The kept slots in their places, and which places those are: one copy a slot."""
    batch, _, slots, _ = tensor.shape
    out, kept = tensor.clone(), torch.zeros(batch, slots, dtype=torch.bool)
    for b in range(batch):
        sources = [t for t in range(slots) if mask[b, t]]
        first = 0 if align == "left" else slots - len(sources)
        for place, source in enumerate(sources, first):
            out[b, :, place] = tensor[b, :, source]
            kept[b, place] = True
    return out, kept


def assert_compacts(kv: list[Tensor], keep: Tensor, mask: Tensor, align: str) -> None:
    expected = [compacted(tensor, mask, align) for tensor in kv]
    addresses = [tensor.data_ptr() for tensor in kv]
    kept = ops.kv_compact(kv, keep, align=align)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, mask.sum(-1))
    assert [tensor.data_ptr() for tensor in kv] == addresses
    for i, (tensor, (values, places)) in enumerate(zip(kv, expected, strict=True)):
        where = places[:, None, :, None].expand_as(tensor)
        assert torch.equal(tensor[where], values[where]), f"tensor {i}"


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("slots", [1, 2, 7, 64, 333])
def test_every_layer_and_dtype_by_mask(slots: int, name: str, align: str) -> None:
    kv = [
        layer(3, 2, slots, 16, torch.float32, 0),
        layer(3, 2, slots, 128, torch.bfloat16, 1),
        layer(3, 5, slots, 3, torch.float16, 2),  # odd row lengths, other heads
        layer(3, 1, slots, 1, torch.int8, 3),  # rows of one byte
        layer(3, 2, slots, 7, torch.float64, 4),
        layer(3, 2, slots, 64, torch.bfloat16, 5),
        layer(3, 2, slots, 52, torch.bfloat16, 6),  # whole and partial vectors
    ]
    mask = MASKS[name](3, slots)
    assert_compacts(kv, mask, mask, align)


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_lengths_keep_the_leading_slots(dtype: torch.dtype, align: str) -> None:
    kv = [layer(4, 2, 9, 8, torch.float32, seed) for seed in range(4)]
    lengths = torch.tensor([0, 9, 4, 1], dtype=dtype)
    assert_compacts(kv, lengths, torch.arange(9) < lengths[:, None], align)


@pytest.mark.parametrize("align", ["left", "right"])
def test_lengths_are_held_to_the_cache(align: str) -> None:
    kv = [layer(3, 2, 5, 4, torch.float32, 0)]
    lengths = torch.tensor([-1, 6, 2**40])
    assert_compacts(kv, lengths, torch.arange(5) < lengths.clamp(0, 5)[:, None], align)


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("layout", ["preallocated", "slots-before-heads", "heads-side-by-side", "every-other-batch"])
def test_strided_caches_leave_what_is_around_them(layout: str, align: str) -> None:
    buffer = torch.full((6, 4, 40, 24), -777.0)
    values = layer(3, 2, 20, 16, torch.float32, 0)
    if layout == "preallocated":
        view = buffer[:3, :2, 5:25, 4:20]
    elif layout == "slots-before-heads":
        view = buffer.view(6, 40, 4, 24).transpose(1, 2)[:3, :2, 5:25, 4:20]
    elif layout == "heads-side-by-side":
        view = buffer.view(6, 40, 4, 24)[:3, 5:25, 1:3, :].view(3, 20, 2, 24)[..., :24].transpose(1, 2)
        values = layer(3, 2, 20, 24, torch.float32, 0)
    else:
        view = buffer[::2, ::2, 1::2, :16]
    view.copy_(values)
    mask = MASKS["random"](3, 20)
    view.fill_(-777.0)
    around = buffer.clone()
    view.copy_(values)
    assert_compacts([view], mask, mask, align)
    view.fill_(-777.0)
    assert torch.equal(buffer, around)


def test_mask_of_any_strides() -> None:
    mask = MASKS["random"](3, 12)
    wide = torch.ones(3, 24, dtype=torch.bool)
    wide[:, ::2] = mask
    for view in (wide[:, ::2], mask.T.contiguous().T, mask[:1].expand(3, 12)):
        assert_compacts([layer(3, 2, 12, 8, torch.float32, 0)], view, view.clone(), "left")


def test_lengths_of_any_strides() -> None:
    lengths = torch.tensor([3, 99, 5, 99])[::2]
    assert_compacts([layer(2, 2, 7, 8, torch.float32, 0)], lengths, torch.arange(7) < lengths[:, None], "right")


def test_twice_is_once() -> None:
    mask = MASKS["random"](3, 50)
    kv = [layer(3, 2, 50, 8, torch.float32, 0)]
    kept = ops.kv_compact(kv, mask)
    once = kv[0].clone()
    assert torch.equal(ops.kv_compact(kv, kept), kept)
    for b in range(3):
        assert torch.equal(kv[0][b, :, : kept[b]], once[b, :, : kept[b]])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 0, 5, 4), (2, 2, 5, 0)], ids=str)
@pytest.mark.parametrize("align", ["left", "right"])
def test_empty_caches(shape: tuple[int, ...], align: str) -> None:
    batch, _, slots, _ = shape
    mask = MASKS["alternating"](batch, slots)
    assert ops.kv_compact([torch.empty(shape)], mask, align=align).tolist() == mask.sum(-1).tolist()


def test_many_layers() -> None:
    kv = [layer(2, 2, 33, 16, torch.bfloat16, seed) for seed in range(56)]
    mask = MASKS["holes"](2, 33)
    assert_compacts(kv, mask, mask, "left")


def test_one_odd_layer_among_like_ones() -> None:
    """Layers that look alike are checked and described once: none may pass for its neighbours."""
    like = [torch.zeros(2, 1, 3, 4) for _ in range(7)]
    keep = torch.ones(2, 3, dtype=torch.bool)
    for odd, message in (
        (torch.zeros(2, 1, 4, 4), "has shape"),
        (torch.zeros(2, 1, 3, 8)[..., ::2], "has stride 2 in D"),
        (torch.zeros(1, 1, 3, 4).expand(2, 1, 3, 4), "has strides"),
        (torch.zeros(2, 1, 3, 4, device="meta"), "is on meta"),
    ):
        for i in (0, 3, 7):
            with pytest.raises(ValueError, match=rf"^kv_compact: kv\[\d\] {message}"):
                ops.kv_compact([*like[:i], odd, *like[i:]], keep)
    wide = torch.zeros(2, 1, 3, 9)[..., :4]
    for other in (wide, torch.zeros(2, 1, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 3, 4)):
        kv = [*like[:3], other, *like[3:]]
        for tensor in kv:
            tensor.copy_(torch.arange(3.0)[:, None].expand_as(tensor))
        ops.kv_compact(kv, torch.tensor([[False, True, True]] * 2))
        assert all((tensor[:, :, :2] == torch.tensor([[1.0], [2.0]])).all() for tensor in kv)


def test_empty_tensors_may_share_an_address() -> None:
    kv = [torch.empty(2, 0, 3, 4), torch.empty(2, 0, 3, 4), torch.empty(2, 0, 3, 4)]
    assert ops.kv_compact(kv, torch.tensor([1, 2])).tolist() == [1, 2]


def test_layers_of_two_row_lengths_in_turn() -> None:
    kv = [layer(2, 2, 33, width, torch.bfloat16, width) for width in (128, 64, 128, 128, 3, 3)]
    for align in ("left", "right"):
        assert_compacts(kv, MASKS["random"](2, 33), MASKS["random"](2, 33), align)


def test_kv_may_be_a_tuple() -> None:
    keys = layer(1, 1, 4, 2, torch.float32, 0)
    expected = keys[:, :, 2:].clone()
    assert ops.kv_compact((keys,), torch.tensor([[False, False, True, True]])).tolist() == [2]
    assert torch.equal(keys[:, :, :2], expected)


@pytest.mark.parametrize("align", ["left", "right"])
def test_thread_count_changes_no_bit(align: str) -> None:
    mask = MASKS["random"](4, 512)
    results = []
    for count in (1, 2, 3):
        with cases.threads(count):
            kv = [layer(4, 2, 512, 64, torch.float32, seed) for seed in range(4)]
            ops.kv_compact(kv, mask, align=align)
            results.append([compacted_part(tensor, mask, align) for tensor in kv])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def compacted_part(tensor: Tensor, mask: Tensor, align: str) -> Tensor:
    kept = mask.sum(-1)
    slots = tensor.shape[2]
    parts = [tensor[b, :, :n] if align == "left" else tensor[b, :, slots - n :] for b, n in enumerate(kept)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv": []}, "kv is empty, expected at least one tensor"),
        ({"kv": [torch.zeros(2, 3, 4)]}, r"kv\[0\] has shape \(2, 3, 4\), expected"),
        (
            {"kv": [torch.zeros(2, 1, 3, 4), torch.zeros(3, 1, 3, 4)]},
            r"kv\[1\] has shape \(3, 1, 3, 4\), expected \[2, H, 3, D\]",
        ),
        (
            {"kv": [torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 4, 4)]},
            r"kv\[1\] has shape \(2, 1, 4, 4\), expected \[2, H, 3, D\]",
        ),
        ({"kv": [torch.zeros(2, 1, 3, 8)[..., ::2]]}, r"kv\[0\] has stride 2 in D, expected 1"),
        (
            {"kv": [torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 3, 4).expand(2, 1, 3, 4)]},
            r"kv\[1\] has strides \(0, 12, 4, 1\) for shape \(2, 1, 3, 4\), expected each to step over all",
        ),
        (
            {"kv": [torch.zeros(2, 1, 3, 4).expand(2, 5, 3, 4)]},
            r"kv\[0\] has strides \(12, 0, 4, 1\) for shape \(2, 5, 3, 4\), expected each to step over all",
        ),
        (
            {"kv": [torch.zeros(99).as_strided((2, 1, 3, 4), (12, 1, 2, 1))]},
            r"kv\[0\] has strides \(12, 1, 2, 1\) for shape \(2, 1, 3, 4\), expected each to step over all",
        ),
        (
            {"kv": [torch.zeros(2, 1, 3, 4), KEYS, KEYS[..., :2]]},
            r"kv\[2\] starts at the address of kv\[1\], expected tensors that share no memory",
        ),
        ({"kv": [torch.zeros(2, 1, 3, 4, device="meta")]}, r"kv\[0\] is on meta, expected cpu"),
        ({"keep": torch.ones(2, 4).bool()}, r"keep has shape \(2, 4\), expected \(2, 3\)"),
        ({"keep": torch.ones(2, 3).long()}, r"keep has shape \(2, 3\), expected \(2,\)"),
        ({"keep": torch.ones(2, 3)}, "keep has dtype torch.float32, expected int64 or int32"),
        ({"align": "middle"}, "align is 'middle', expected one of 'left', 'right'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, object], message: str) -> None:
    valid = {"kv": [torch.zeros(2, 1, 3, 4)], "keep": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"^kv_compact: {message}"):
        ops.kv_compact(**{**valid, **arguments})


@pytest.mark.parametrize("align", ["left", "right"])
def test_more_than_caches_hold(align: str) -> None:
    """A gather of many bytes, three heads a tensor: stores may go past the caches, in several heads at a time."""
    batch, heads, slots = 2, 3, 16000
    generator = cases.generator(7)
    kv = [torch.randint(-(2**62), 2**62, (batch, heads, slots, 32), generator=generator) for _ in range(2)]
    kv.append(torch.randint(-100, 100, (batch, heads, slots, 200), generator=generator, dtype=torch.int8))
    keep = torch.rand(batch, slots, generator=generator) < 0.6
    expected = [[tensor[b, :, keep[b]] for b in range(batch)] for tensor in kv]
    kept = ops.kv_compact(kv, keep, align=align)
    for tensor, rows in zip(kv, expected, strict=True):
        for b in range(batch):
            count = int(kept[b])
            got = tensor[b, :, :count] if align == "left" else tensor[b, :, slots - count :]
            assert torch.equal(got, rows[b])
