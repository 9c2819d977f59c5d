"""Counter-based uniforms: published vectors, layout of the counter, and what losslessness needs of the streams."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from tests.ops.cases import chi_square
from tests.reference import definitions
from ugsd_fast.reference import Stream, philox4x32, uniform

# Random123's kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
STREAMS = {
    "draft": int(Stream.DRAFT),
    "accept-0": Stream.ACCEPT.at(0),
    "accept-1": Stream.ACCEPT.at(1),
    "residual": int(Stream.RESIDUAL),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def run(counter: list[int], key: list[int]) -> list[int]:
    return [int(word) for word in philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_published_known_answers(name: str) -> None:
    counter, key, expected = map(words, KNOWN_ANSWERS[name])
    assert run(counter, key) == expected
    assert definitions.philox4x32(counter, key) == expected


def test_random_counters_match_integer_arithmetic() -> None:
    rng = random.Random(0)
    for _ in range(200):
        counter = [rng.getrandbits(32) for _ in range(4)]
        key = [rng.getrandbits(32) for _ in range(2)]
        assert run(counter, key) == definitions.philox4x32(counter, key)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**32, -1])
def test_uniform_is_53_bits_of_the_counter(seed: int, offset: int) -> None:
    row, stream = 5, Stream.ACCEPT.at(3)
    counter = [offset % 2**32, offset % 2**64 // 2**32, row, stream]
    first, second, *_ = definitions.philox4x32(counter, [seed % 2**32, seed % 2**64 // 2**32])
    expected = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    assert uniform(seed, offset, torch.tensor([row]), stream).tolist() == [expected]


def test_seeds_and_offsets_as_tensors_are_the_numbers_they_hold() -> None:
    rows = torch.arange(4)
    seeds, offsets = torch.tensor([3, -1, 2**63 - 1, 0]), torch.tensor([0, 1, 2**40, -5])
    drawn = uniform(seeds, offsets, rows, 0)
    for i in range(4):
        assert drawn[i] == uniform(int(seeds[i]), int(offsets[i]), rows[i : i + 1], 0)[0]
    assert torch.equal(uniform(torch.tensor(7), 0, rows, 0), uniform(7, 0, rows, 0))


def test_no_uniform_rounds_to_one() -> None:
    largest = ((2**32 - 1 >> 5) * 2**26 + (2**32 - 1 >> 6)) * 2.0**-53
    assert largest == definitions.HIGH < 1.0
    drawn = uniform(0, 0, torch.arange(1_000_000), 0)
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() < 1e-5 < 1 - 1e-5 < drawn.max() < 1


def test_streams_of_a_block_never_share_a_counter() -> None:
    stream_words = [int(Stream.DRAFT), int(Stream.RESIDUAL), *(Stream.ACCEPT.at(i) for i in range(4096))]
    assert len(set(stream_words)) == len(stream_words)
    assert max(stream_words) < 2**32


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("axis", ["seed", "offset", "row"])
def test_each_counter_word_gives_uniforms(stream: int, axis: str) -> None:
    count = torch.arange(200_000)
    zeros = torch.zeros_like(count)
    seeds, offsets, rows = (count if axis == name else zeros for name in ("seed", "offset", "row"))
    drawn = uniform(seeds, offsets, rows, stream)
    observed = torch.histc(drawn, 256, 0, 1)
    assert chi_square(observed, torch.full_like(observed, 1 / 256)) > 1e-3
    pairs = torch.histogramdd(torch.stack([drawn[:-1], drawn[1:]], -1), [16, 16], [0.0, 1.0, 0.0, 1.0]).hist.flatten()
    assert chi_square(pairs, torch.full_like(pairs, 1 / 256)) > 1e-3, "successive uniforms depend on each other"


@pytest.mark.parametrize(("first", "second"), list(combinations(STREAMS, 2)))
def test_streams_of_one_seed_and_offset_are_independent(first: str, second: str) -> None:
    rows = torch.arange(200_000)
    draws = torch.stack([uniform(11, 7, rows, STREAMS[name]) for name in (first, second)], -1)
    joint = torch.histogramdd(draws, [16, 16], [0.0, 1.0, 0.0, 1.0]).hist.flatten()
    assert chi_square(joint, torch.full_like(joint, 1 / 256)) > 1e-3
    assert torch.corrcoef(draws.T)[0, 1].abs() < 4 / len(rows) ** 0.5
