"""Streamed text is final, and adds up."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from ugsd_fast.decoding.text import IncrementalText


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40), st.lists(st.integers(1, 5), max_size=60))
def test_pieces_of_utf8_add_up(text: str, sizes: list[int]) -> None:
    tokens = list(text.replace("\ufffd", "").encode())
    stream = IncrementalText(lambda ids: bytes(ids).decode(errors="replace"))
    pieces, position = [], 0
    for size in sizes:
        pieces.append(stream.extend(tokens[position : position + size]))
        position += size
        assert "\ufffd" not in pieces[-1]
        assert text.replace("\ufffd", "").startswith("".join(pieces))
    pieces.append(stream.extend(tokens[position:], final=True))
    assert "".join(pieces) == text.replace("\ufffd", "") == stream.text


def test_bytes_that_never_complete_come_with_the_end() -> None:
    stream = IncrementalText(lambda ids: bytes(ids).decode(errors="replace"))
    assert stream.extend([72, 0xE4]) == "H"
    assert stream.extend([], final=True) == "\ufffd"


def test_what_was_handed_out_is_not_repeated() -> None:
    def decode(ids: Sequence[int]) -> str:  # as decoders with byte fallback: all or nothing
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    stream = IncrementalText(decode)
    tokens = "很高".encode()
    assert [stream.extend(tokens[:3]), stream.extend(tokens[3:4]), stream.extend(tokens[4:])] == ["很", "", "高"]
