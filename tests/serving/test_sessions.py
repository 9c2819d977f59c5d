"""What a server answers, frame by frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.serving.fakes import MODEL, FakeBackend, greedy
from ugsd_fast.serving import protocol
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.protocol import (
    Close,
    Error,
    Generate,
    Open,
    Opened,
    Quantized,
    Resume,
    Rules,
    Token,
    Verdict,
    Verify,
)
from ugsd_fast.serving.sessions import REPLIES_KEPT, Connection, Hub

OPEN = Open(protocol.VERSION, "none", Rules(), "p")
RIGHT = greedy("p", 40)


class Client:
    """A connection with no network in between."""

    def __init__(self, hub: Hub, owner: str = "me"):
        self.replies: list[Any] = []
        self.connection = Connection(hub, owner, self._keep)

    async def _keep(self, data: bytes) -> None:
        self.replies.append(protocol.decode_server(data))

    async def raw(self, data: bytes) -> Any:
        self.replies.clear()
        self.stays = await self.connection.receive(data)
        if self.connection._generation is not None:
            await self.connection._generation
        return self.replies[0] if len(self.replies) == 1 else list(self.replies)

    async def __call__(self, frame: Any) -> Any:
        return await self.raw(protocol.encode(frame))


def verify(seq: int, base: int, draft: list[int], committed: list[int] | None = None, **more: Any) -> Verify:
    return Verify(seq, base, committed or [], draft, True, seq, **more)


def conversation(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test with a hub of its own and a client with an open session."""

    def run() -> None:
        async def talk() -> None:
            hub = Hub(FakeBackend())
            client = Client(hub)
            opened = await client(OPEN)
            assert isinstance(opened, Opened)
            assert (len(opened.session), opened.next_seq) == (16, 0)
            client.id = opened.session  # type: ignore[attr-defined]
            await test(hub, client)

        asyncio.run(talk())

    run.__name__ = test.__name__
    return run


@conversation
async def test_a_repeated_frame_gets_the_same_reply_and_costs_nothing(hub: Hub, client: Client) -> None:
    frame = verify(0, 0, [*RIGHT[:2], 49])
    first = await client(frame)
    assert first == Verdict(0, 2, RIGHT[2])
    assert await client(frame) == first
    assert await client(verify(1, 3, RIGHT[3:5])) == Verdict(1, 2, RIGHT[5])
    assert await client(frame) == first
    assert hub.backend.calls == 2  # type: ignore[attr-defined]
    assert hub.metrics.repeats._value.get() == 2


@conversation
async def test_a_gap_says_what_is_missing(hub: Hub, client: Client) -> None:
    await client(verify(0, 0, RIGHT[:2]))
    error = await client(verify(3, 3, RIGHT[3:4]))
    assert error == Error("gap", "frames 1 to 2 are missing before frame 3, expected number 1", 3, 1)
    assert client.stays
    # Numbers that the client gave up are no gap.
    assert await client(verify(3, 3, RIGHT[3:4], abandoned=2)) == Verdict(3, 1, RIGHT[4])


@conversation
async def test_a_number_used_for_another_frame_is_stale(hub: Hub, client: Client) -> None:
    await client(verify(0, 0, RIGHT[:2]))
    error = await client(verify(0, 0, RIGHT[:3]))
    assert (error.code, error.seq, error.expected) == ("stale", 0, 1)
    frames = [verify(seq, 3, RIGHT[3:5]) for seq in range(1, REPLIES_KEPT + 2)]
    for frame in frames:
        assert await client(frame) == Verdict(frame.seq, 2, RIGHT[5])
    assert (await client(verify(0, 0, RIGHT[:2]))).code == "stale"  # its reply is not kept any more


@conversation
async def test_what_was_committed_without_the_verifier_comes_first(hub: Hub, client: Client) -> None:
    assert await client(verify(0, 0, RIGHT[4:6], committed=RIGHT[:4])) == Verdict(0, 2, RIGHT[6])
    # A reply that the client never saw: its next frame builds on the base that it knows.
    assert await client(verify(1, 0, [RIGHT[1], 3], committed=RIGHT[:1])) == Verdict(1, 1, RIGHT[2])
    error = await client(verify(2, 9, RIGHT[:1]))
    assert (error.code, error.message) == ("bad_frame", "base is 9, expected 0 to 3 (the tokens known here)")


@conversation
async def test_a_session_goes_on_over_another_connection(hub: Hub, client: Client) -> None:
    frame = verify(0, 0, RIGHT[:2])
    first = await client(frame)
    other = Client(hub)
    assert await other(Resume(1, client.id)) == Opened(client.id, 1)  # type: ignore[attr-defined]
    assert await other(frame) == first
    assert (await client(verify(1, 3, RIGHT[3:4]))).code == "unknown_session"  # taken over
    assert not client.stays
    assert (await Client(hub, "another")(Resume(1, client.id))).code == "unknown_session"  # type: ignore[attr-defined]
    await client.connection.ended()
    assert await other(verify(1, 3, RIGHT[3:4])) == Verdict(1, 1, RIGHT[4])


@conversation
async def test_generation_is_streamed_and_repeated(hub: Hub, client: Client) -> None:
    frame = Generate(0, 0, RIGHT[:2], 5, [0], 0)
    tokens = [Token(0, index, RIGHT[2 + index], index == 4) for index in range(5)]
    assert await client(frame) == tokens
    assert await client(frame) == tokens
    assert hub.backend.calls == 5  # type: ignore[attr-defined]
    assert await client(Generate(1, 7, [], 9, [RIGHT[8]], 5)) == [
        Token(1, 0, RIGHT[7], False),
        Token(1, 1, RIGHT[8], True),
    ]


@conversation
async def test_another_frame_stops_generation(hub: Hub, client: Client) -> None:
    hub.backend.delay = 0.001  # type: ignore[attr-defined]
    await client.connection.receive(protocol.encode(Generate(0, 0, [], 1000, [0], 0)))
    await asyncio.sleep(0.02)
    client.replies.clear()
    await client.connection.receive(protocol.encode(verify(1, 2, RIGHT[2:4])))
    assert client.replies[-1] == Verdict(1, 2, RIGHT[4])
    calls = hub.backend.calls  # type: ignore[attr-defined]
    assert calls < 100
    await asyncio.sleep(0.02)
    assert hub.backend.calls == calls  # type: ignore[attr-defined]


@conversation
async def test_a_failed_forward_leaves_the_session_as_it_was(hub: Hub, client: Client) -> None:
    hub.backend.fail_next = 1  # type: ignore[attr-defined]
    frame = verify(0, 0, RIGHT[:2])
    assert (await client(frame)).code == "failed"
    assert await client(frame) == Verdict(0, 2, RIGHT[2])


@conversation
async def test_close_frees_the_session(hub: Hub, client: Client) -> None:
    state = next(iter(hub.sessions.values())).state
    await client(Close())
    assert state.released
    assert not hub.sessions
    assert (await client(verify(0, 0, RIGHT[:1]))).code == "unknown_session"
    assert (await client(Resume(1, client.id))).code == "unknown_session"  # type: ignore[attr-defined]


@conversation
async def test_the_verifiers_best_tokens_on_request(hub: Hub, client: Client) -> None:
    verdict = await client(verify(0, 0, RIGHT[:1], top_k=1))
    assert verdict.top == [[(RIGHT[1], 0.0)]]


REFUSED = {
    "version": (Open(9, "none", Rules(), "p"), "version"),
    "level": (Open(1, "audio", Rules(), "p", 16_000, None, b"fLaC"), "refused"),
    "payload of another level": (Open(1, "none", Rules(), "p", 0, Quantized(1, 1, b"\0" * 4, b"\0")), "bad_frame"),
    "long prompt": (Open(1, "none", Rules(), "p" * 9000), "refused"),
    "block too long": (verify(0, 0, [1] * 300), "refused"),
    "caption too long": (verify(0, 0, [1], committed=[1] * 8192), "refused"),
    "endless generation": (Generate(0, 0, [], 10**9, [], 0), "refused"),
    "nothing to generate": (Generate(0, 0, [], 0, [], 0), "refused"),
    "negative number": (verify(-1, 0, [1]), "bad_frame"),
    "huge draw": (Verify(0, 0, [], [1], True, 2**63), "bad_frame"),
    "token id": (verify(0, 0, [1], committed=[-1]), "bad_frame"),
    "top_k": (verify(0, 0, [1], top_k=1000), "refused"),
    "not a frame": (b"\xc1", "bad_frame"),
    "a server's frame": (protocol.encode(Opened(b"", 0)), "bad_frame"),
    "huge array": (b"\xdd\xff\xff\xff\xff", "bad_frame"),
    "oversized": (b"\0" * (65 << 10), "refused"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    frame, code = REFUSED[case]

    async def talk() -> None:
        client = Client(Hub(FakeBackend()))
        if not isinstance(frame, Open):
            await client(OPEN)
        error = await client.raw(frame if isinstance(frame, bytes) else protocol.encode(frame))
        assert error.code == code, error

    asyncio.run(talk())


def test_sessions_and_rates_are_limited_by_token() -> None:
    async def talk() -> None:
        limits = Limits(max_sessions=3, max_sessions_per_token=2, frames_per_second=1, frame_burst=6)
        hub = Hub(FakeBackend(), limits)
        clients = [Client(hub, "greedy") for _ in range(4)]
        replies = [await client(OPEN) for client in clients]
        assert [type(reply) for reply in replies] == [Opened, Opened, Error, Error]
        assert (replies[2].code, replies[2].retry_after) == ("busy", limits.retry_after)
        assert isinstance(await Client(hub, "modest")(OPEN), Opened)
        assert (await Client(hub, "late")(OPEN)).message == "all sessions are taken"
        assert isinstance(await clients[0](verify(0, 0, RIGHT[:1])), Verdict)
        assert isinstance(await clients[0](verify(1, 0, RIGHT[:1])), Verdict)
        throttled = await clients[0](verify(2, 0, RIGHT[:1]))
        assert throttled.code == "busy"
        assert 0 < throttled.retry_after <= 1
        # Closing makes room.
        await clients[1].connection.ended()
        hub.close(next(iter(hub.sessions.values())))
        assert isinstance(await Client(hub, "modest")(OPEN), Opened)

    asyncio.run(talk())


def test_audio_is_limited_by_token_and_session() -> None:
    async def talk() -> None:
        model = protocol.Model("fake", ["audio"], [0], "", 16_000, 30.0, 1 << 16)
        hub = Hub(FakeBackend(model), Limits(audio_seconds_per_minute=60, max_audio_seconds=40))

        def clip(seconds: float) -> Open:
            return Open(1, "audio", Rules(), "p", int(16_000 * seconds), None, b"fLaC")

        assert (await Client(hub)(clip(31))).code == "refused"
        assert (await Client(hub)(clip(0))).code == "refused"
        assert isinstance(await Client(hub)(clip(30)), Opened)
        assert isinstance(await Client(hub)(clip(30)), Opened)
        error = await Client(hub)(clip(30))
        assert error.code == "busy"
        assert 25 < error.retry_after <= 30
        assert isinstance(await Client(hub, "another")(clip(30)), Opened)

    asyncio.run(talk())


def test_sessions_that_nobody_comes_back_to_end() -> None:
    async def talk() -> None:
        hub = Hub(FakeBackend(), Limits(resume_seconds=0.0))
        client = Client(hub)
        await client(OPEN)
        hub.expire()
        assert len(hub.sessions) == 1  # connected
        await client.connection.ended()
        await asyncio.sleep(0.001)
        hub.expire()
        assert not hub.sessions

    asyncio.run(talk())


def test_the_server_has_another_session_for_each_connection() -> None:
    assert MODEL.uplinks == ["none"]

    async def talk() -> None:
        hub = Hub(FakeBackend())
        one, two = Client(hub), Client(hub)
        await one(OPEN)
        await two(Open(1, "none", Rules(), "another prompt"))
        assert await one(verify(0, 0, RIGHT[:2])) == Verdict(0, 2, RIGHT[2])
        other = greedy("another prompt", 3)
        assert await two(verify(0, 0, other[:2])) == Verdict(0, 2, other[2])
        assert (await one(OPEN)).code == "bad_frame"

    asyncio.run(talk())
