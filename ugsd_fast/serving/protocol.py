"""The frames that travel between a device and a verifier: MessagePack arrays, each begun by its type's number.

docs/protocol.md describes them byte by byte. A frame is one binary WebSocket message. Fields are added at the end only,
with a default: an older peer ignores what it does not know. Anything else is another `VERSION`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

VERSION = 1
SUBPROTOCOL = "ugsd.v1"

Uplink = Literal["none", "embeddings", "features", "audio"]
UPLINKS: tuple[Uplink, ...] = ("none", "embeddings", "features", "audio")  # from the least revealing

ErrorCode = Literal[
    "bad_frame",  # not a frame, or one that has no meaning here
    "version",  # another protocol version
    "refused",  # a limit, a rule or an uplink level that this server does not take
    "busy",  # no room now: try again after `retry_after` seconds
    "gap",  # frames before this one are missing: the next expected number is `expected`
    "stale",  # a repeated number whose content differs, or whose reply is no longer kept
    "unknown_session",  # expired, evicted, closed, or of another server: open one and replay
    "failed",  # the model failed on this frame; the session stays as it was
]


class Rules(msgspec.Struct, array_like=True, frozen=True):
    """How blocks of a session are judged: the fields of `UGSDConfig` that the verifier needs."""

    rule: str = "greedy"
    rank: int = 20
    epsilon: float = 0.09
    delta: float = 0.3
    top_n: int = 10
    relax_delta: float = 0.6
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Quantized(msgspec.Struct, array_like=True, frozen=True):
    """An int8 matrix with one scale a row: value[r, c] = data[r, c] · scales[r].

    ``scales`` holds ``rows`` little-endian float32, ``data`` ``rows · columns`` int8, row by row. Columns from
    ``columns`` up to ``width`` all have the value ``fill`` and are not sent.
    """

    rows: int
    columns: int
    scales: bytes
    data: bytes
    width: int = 0
    fill: float = 0.0


class Open(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Start a session. ``uplink`` says which of ``matrix`` (embeddings, features) and ``flac`` (audio) is there.

    ``samples`` is the length of the clip at the verifier's sampling rate.
    """

    version: int
    uplink: Uplink
    rules: Rules
    prompt: str | None = None
    samples: int = 0
    matrix: Quantized | None = None
    flac: bytes | None = None


class Resume(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Go on with a session after the connection was lost; ``session`` is what `Opened` gave."""

    version: int
    session: bytes


class Verify(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Judge a block.

    The caption that the block follows is the session's first ``base`` tokens, which both sides know from verdicts, and
    ``committed`` after them. ``draw`` counts verdicts, for the random numbers of sampling rules. ``abandoned`` says how
    many numbers directly before ``seq`` nobody waits for any more. ``top_k`` > 0 asks for the verifier's best tokens.
    ``logits`` holds, for rules that compare distributions, the drafter's: for each draft token a little-endian uint32
    count, as many uint32 ids and float32 logits.
    """

    seq: int
    base: int
    committed: list[int]
    draft: list[int]
    bonus: bool
    draw: int
    abandoned: int = 0
    top_k: int = 0
    logits: bytes = b""


class Generate(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Write up to ``count`` tokens alone, each sent as it is known; ends behind a token of ``eos``."""

    seq: int
    base: int
    committed: list[int]
    count: int
    eos: list[int]
    draw: int
    abandoned: int = 0


class Close(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Free the session."""


class Model(msgspec.Struct, array_like=True, frozen=True):
    """What a device has to know of the verifier.

    ``uplinks`` are the levels that it accepts. ``vocabulary`` is the fingerprint of its text tokens, empty where it has
    no tokenizer. ``front_end`` is the JSON of its feature extractor, for the level ``features``.
    """

    name: str
    uplinks: list[Uplink]
    eos: list[int]
    vocabulary: str
    sampling_rate: int
    max_audio_seconds: float
    max_verify_bytes: int
    front_end: str = ""


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=16):
    """The first frame of a connection."""

    version: int
    model: Model


class Opened(msgspec.Struct, array_like=True, frozen=True, tag=17):
    """A session is there. ``next_seq`` is the number it expects next."""

    session: bytes
    next_seq: int


class Verdict(msgspec.Struct, array_like=True, frozen=True, tag=18):
    """The judgement of a block: draft tokens that stand, and the token that follows (-1: none).

    ``top``, on request: for each position judged, pairs of a token and its log-probability, the best first.
    """

    seq: int
    num_accepted: int
    next_token: int
    top: list[list[tuple[int, float]]] = []


class Token(msgspec.Struct, array_like=True, frozen=True, tag=19):
    """One generated token, ``index`` counted from 0; ``last`` ends the reply to `Generate`."""

    seq: int
    index: int
    token: int
    last: bool


class Error(msgspec.Struct, array_like=True, frozen=True, tag=20):
    """Why a frame has no other reply; ``seq`` is its number, -1 where it has none."""

    code: ErrorCode
    message: str
    seq: int = -1
    expected: int = -1
    retry_after: float = 0.0


FromClient: TypeAlias = Open | Resume | Verify | Generate | Close
FromServer: TypeAlias = Welcome | Opened | Verdict | Token | Error

encode = msgspec.msgpack.Encoder().encode
_decode_client = msgspec.msgpack.Decoder(FromClient).decode
_decode_server = msgspec.msgpack.Decoder(FromServer).decode


class BadFrame(ValueError):
    """Bytes that are no frame of this protocol."""


def decode_client(data: bytes) -> FromClient:
    """The frame of a device.

    Raises
    ------
    BadFrame
        If `data` is none.
    """
    return _checked(_decode_client, data)


def decode_server(data: bytes) -> FromServer:
    """The frame of a server; see `decode_client`."""
    return _checked(_decode_server, data)


def _checked(decode, data):  # type: ignore[no-untyped-def]
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise BadFrame(f"not a frame of {SUBPROTOCOL}: {error}") from None
