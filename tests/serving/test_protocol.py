"""The frames and the bytes that docs/protocol.md shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ugsd_fast.serving import protocol
from ugsd_fast.serving.protocol import (
    Close,
    Error,
    Generate,
    Model,
    Open,
    Opened,
    Quantized,
    Resume,
    Rules,
    Token,
    Verdict,
    Verify,
    Welcome,
)
from ugsd_fast.serving.quantize import dequantize, quantize

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
SESSION = bytes(range(16))
MATRIX = Quantized(2, 3, np.array([0.5, 0.25], "<f4").tobytes(), bytes([1, 255, 127, 0, 2, 129]), 4, -1.0)
FRAMES: dict[str, Any] = {
    "Welcome": Welcome(1, Model("qwen", ["features", "audio"], [1], "", 16_000, 30.0, 65_536)),
    "Open": Open(1, "features", Rules("greedy"), "Hi", 16_000, MATRIX),
    "Open, text only": Open(1, "none", Rules("rank", 20), "Hi"),
    "Opened": Opened(SESSION, 0),
    "Resume": Resume(1, SESSION),
    "Verify": Verify(3, 12, [17, 300], [5, 70_000, 9], True, 3),
    "Verdict": Verdict(3, 2, 151_643),
    "Verdict, top 1": Verdict(3, 0, 9, [[(9, -0.5)]]),
    "Generate": Generate(4, 17, [], 128, [1], 4),
    "Token": Token(4, 0, 42, False),
    "Error": Error("gap", "missing", 7, 5),
    "Close": Close(),
}
EXAMPLES = {name: (frame, protocol.encode(frame)) for name, frame in FRAMES.items()}


def documented() -> dict[str, bytes]:
    """The examples of the document: a heading in bold, then a block of hexadecimal bytes with comments."""
    found = {}
    for part in DOCUMENT.read_text(encoding="utf-8").split("\n**Example: ")[1:]:
        name, _, rest = part.partition("**")
        lines = rest.split("```")[1].splitlines()[1:]
        found[name] = bytes.fromhex("".join(line.partition("|")[0] for line in lines))
    return found


def test_the_document_shows_the_bytes_of_every_frame() -> None:
    assert documented() == {name: data for name, (_, data) in EXAMPLES.items()}
    text = DOCUMENT.read_text(encoding="utf-8")
    for frame in (*protocol.FromClient.__args__, *protocol.FromServer.__args__, Rules, Model, Quantized):
        for field in frame.__struct_fields__:
            assert f"`{field}`" in text, (frame, field)
    assert f"`{protocol.SUBPROTOCOL}`" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames_come_back_from_their_bytes(name: str) -> None:
    frame, data = EXAMPLES[name]
    decode = protocol.decode_client if isinstance(frame, protocol.FromClient) else protocol.decode_server
    assert decode(data) == frame
    for length in range(len(data)):
        if length or data[:1] != data:
            with pytest.raises(protocol.BadFrame):
                decode(data[:length])
    with pytest.raises(protocol.BadFrame):
        decode(data + b"\0")


def test_unknown_fields_behind_the_known_are_ignored() -> None:
    data = bytearray(protocol.encode(Token(4, 0, 42, False)))
    data[0] += 1  # one more element
    assert protocol.decode_server(bytes(data) + b"\xa3new") == Token(4, 0, 42, False)


def test_int8_keeps_half_a_step_of_each_row() -> None:
    matrix = np.random.default_rng(0).normal(size=(80, 200)).astype(np.float32) * np.logspace(-4, 4, 80)[:, None]
    matrix = matrix.astype(np.float32)
    matrix[:, 150:] = matrix.min()
    packed = quantize(matrix)
    assert (packed.columns, packed.width) == (150, 200)
    error = np.abs(dequantize(packed, matrix.shape) - matrix)
    assert (error <= np.abs(matrix[:, :150]).max(1, keepdims=True) / 254 * 1.001).all()
    assert not error[:, 150:].any()


@pytest.mark.parametrize(
    "packed",
    [
        Quantized(2, 3, b"\0" * 8, b"\0" * 6, 1 << 40),
        Quantized(1 << 40, 3, b"", b"", 4),
        Quantized(2, 5, b"\0" * 8, b"\0" * 10, 4),
        Quantized(2, 3, b"\0" * 4, b"\0" * 6, 4),
        Quantized(2, 3, b"\0" * 8, b"\0" * 5, 4),
        Quantized(2, 3, b"\0\0\xc0\x7f" * 2, b"\0" * 6, 4),
        Quantized(2, 3, b"\0" * 8, b"\0" * 6, 4, float("inf")),
        Quantized(-2, -3, b"", b"", 4),
    ],
)
def test_matrices_that_do_not_fit_are_refused(packed: Quantized) -> None:
    with pytest.raises(protocol.BadFrame, match="matrix"):
        dequantize(packed, (2, 4))
