"""A tiny deterministic verifier, and connections in memory on which everything goes wrong that can."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from ugsd_fast import UGSDConfig
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.serving import protocol
from ugsd_fast.serving.client import Patience
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.link import Busy, LinkLost
from ugsd_fast.serving.sessions import Call, Connection, Hub, Judged, Refusal
from ugsd_fast.verifier.remote import RemoteVerifier

VOCABULARY = 50
MODEL = protocol.Model("fake", ["none"], [0], "", 16_000, 30.0, 1 << 16)
IMPATIENT = Patience(deadline=0.5, attempt=0.02, first_delay=0.0005, longest_delay=0.002, failures=10**9)


def next_token(prompt: str, tokens: Sequence[int]) -> int:
    """The fake verifier's greedy choice: depends on every token before it; never the end-of-sequence token."""
    return 1 + zlib.crc32(repr((prompt, list(tokens))).encode()) % (VOCABULARY - 1)


def greedy(prompt: str, count: int) -> list[int]:
    """Its caption."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(next_token(prompt, tokens))
    return tokens


class FakeState:
    """A session: the prompt, and a cache that has to be told of everything once."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.released = False


class FakeBackend:
    """Judges by `next_token`."""

    def __init__(self, model: protocol.Model = MODEL):
        self.model = model
        self.calls = 0
        self.delay = 0.0
        self.fail_next = 0
        self.closed = False

    async def prepare(self, request: protocol.Open) -> FakeState:
        return FakeState(request.prompt or "")

    async def judge(self, state: FakeState, call: Call) -> Judged:
        await asyncio.sleep(self.delay)
        assert not state.released
        self.calls += 1
        if self.fail_next:
            self.fail_next -= 1
            raise Refusal("failed", "the model failed")
        tokens = list(call.final)
        for position, token in enumerate(call.draft):
            right = next_token(state.prompt, tokens)
            if token != right:
                return Judged(position, right)
            tokens.append(token)
        top = [[(next_token(state.prompt, tokens), 0.0)]] if call.top_k else []
        return Judged(len(call.draft), next_token(state.prompt, tokens) if call.bonus else -1, top)

    def release(self, state: FakeState) -> None:
        state.released = True

    def close(self) -> None:
        self.closed = True


class Net:
    """Servers in memory and the connections to them; `faults` are consumed one by one by the frames that pass."""

    def __init__(self, *, limits: Limits | None = None, servers: int = 1):
        self.limits = limits or Limits(frames_per_second=1e9, frame_burst=10**9, opens_per_second=1e9, open_burst=10**9)
        self.hubs = [Hub(FakeBackend(), self.limits) for _ in range(servers)]
        self.up = [True] * servers
        self.faults: list[str] = []
        self.links: list[MemoryLink] = []
        self.random = Random(0)
        self.happened: list[str] = []

    async def connect(self, url: str) -> MemoryLink:
        index = int(url)
        fault = self.take("refuse", "busy")
        if not self.up[index] or fault == "refuse":
            raise LinkLost("nobody listens")
        if fault == "busy":
            raise Busy("full", 0.001)
        link = MemoryLink(self, self.hubs[index])
        self.links.append(link)
        return link

    def take(self, *kinds: str) -> str | None:
        """The next fault, if it is of one of these kinds."""
        if self.faults and self.faults[0] in kinds:
            self.happened.append(self.faults[0])
            return self.faults.pop(0)
        return None

    def cut(self) -> None:
        """End all connections."""
        for link in self.links:
            link.cut()
        self.links.clear()

    def restart(self, index: int = 0) -> None:
        """Kill a server and start another in its place: it has forgotten everything."""
        self.cut()
        self.hubs[index] = Hub(FakeBackend(), self.limits)
        self.up[index] = True

    def evict(self) -> None:
        """Have every server forget its sessions."""
        for hub in self.hubs:
            for session in list(hub.sessions.values()):
                hub.close(session)

    def verifier(self, **settings: Any) -> RemoteVerifier:
        return RemoteVerifier(
            [str(index) for index in range(len(self.hubs))],
            connect=self.connect,
            **{"patience": IMPATIENT, **settings},
        )


class MemoryLink:
    """A connection: frames of both directions pass `Net.faults`."""

    def __init__(self, net: Net, hub: Hub):
        self._net = net
        self._to_client: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._to_server: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._held: list[bytes] = []  # overtaken by the next frame
        self._alive = True
        self._connection = Connection(hub, "tester", self._reply)
        self._server = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self._connection.greet()
            while self._alive:
                data = await self._to_server.get()
                if data is None or not await self._connection.receive(data):
                    break
        except LinkLost:
            pass
        finally:
            self.cut()
            await self._connection.ended()

    async def _reply(self, data: bytes) -> None:
        if not self._alive:
            raise LinkLost("cut")
        fault = self._net.take("lose-reply", "duplicate-reply", "truncate-reply", "delay-reply", "cut-reply")
        if fault == "lose-reply":
            return
        if fault == "cut-reply":
            self.cut()
            raise LinkLost("cut")
        if fault == "delay-reply":
            await asyncio.sleep(0.03)
        self._to_client.put_nowait(data[: len(data) // 2] if fault == "truncate-reply" else data)
        if fault == "duplicate-reply":
            self._to_client.put_nowait(data)

    async def send(self, data: bytes) -> None:
        if not self._alive:
            raise LinkLost("cut")
        fault = self._net.take("lose", "duplicate", "truncate", "delay", "cut", "reorder", "cut-mid-frame")
        if fault == "lose":
            return
        if fault == "reorder":
            self._held.append(data)
            return
        if fault == "delay":
            await asyncio.sleep(0.03)
        if fault in ("truncate", "cut-mid-frame"):
            self._to_server.put_nowait(data[: self._net.random.randrange(len(data))])
        else:
            self._to_server.put_nowait(data)
        if fault == "duplicate":
            self._to_server.put_nowait(data)
        for held in self._held:
            self._to_server.put_nowait(held)
        self._held.clear()
        if fault in ("cut", "cut-mid-frame"):
            self.cut()
            raise LinkLost("cut")

    async def recv(self) -> bytes:
        data = await self._to_client.get()
        if data is None:
            self._to_client.put_nowait(None)
            raise LinkLost("cut")
        return data

    async def close(self) -> None:
        self.cut()

    def cut(self) -> None:
        """End the connection; frames on their way to the client still arrive, as they do on a network."""
        if self._alive:
            self._alive = False
            self._to_client.put_nowait(None)
            self._to_server.put_nowait(None)


UPLINK_FAULTS = ("lose", "duplicate", "truncate", "delay", "cut", "reorder", "cut-mid-frame")
DOWNLINK_FAULTS = ("lose-reply", "duplicate-reply", "truncate-reply", "delay-reply", "cut-reply")
CONNECT_FAULTS = ("refuse", "busy")
FAULTS = (*UPLINK_FAULTS, *DOWNLINK_FAULTS, *CONNECT_FAULTS)


def block(tokens: Sequence[int]) -> DraftBlock:
    """A drafted block."""
    drafted = torch.tensor([list(tokens)], dtype=torch.long).reshape(1, -1)
    return DraftBlock(drafted, None, tuple(tokens), (0.0,) * len(tokens), 0.0, True)


GREEDY = UGSDConfig(always_escalate=True, rule="greedy", on_verifier_failure="wait")


class FakeDrafter:
    """Drafts what the fake verifier would say, and errs now and then."""

    def __init__(self, prompt: str, *, seed: int, error: float = 0.2):
        self._prompt, self._error = prompt, error
        self._random = Random(seed)
        self.tokens: list[int] = []

    def draft(self, length: int) -> list[int]:
        drafted: list[int] = []
        for _ in range(length):
            right = next_token(self._prompt, [*self.tokens, *drafted])
            drafted.append(right if self._random.random() >= self._error else self._random.randrange(1, VOCABULARY))
        return drafted
