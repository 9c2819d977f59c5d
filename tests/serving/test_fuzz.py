"""100,000 mutated frames: no crash, no other session touched, memory flat."""

from __future__ import annotations

import asyncio
import gc
import sys
from random import Random
from typing import Any

from tests.serving.fakes import FakeBackend, greedy
from tests.serving.test_protocol import EXAMPLES
from tests.serving.test_sessions import OPEN, Client, verify
from ugsd_fast.serving import protocol
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.protocol import Error, Opened, Verdict
from ugsd_fast.serving.sessions import Hub

FRAMES = 100_000
SEEDS = [
    *(data for frame, data in EXAMPLES.values() if isinstance(frame, protocol.FromClient)),
    *map(protocol.encode, (verify(0, 0, [17, 300]), verify(0, 0, [5, 9], [17, 300]), verify(1, 1, [2]))),
    protocol.encode(protocol.Generate(0, 0, [7], 3, [1], 0)),
]
MARKS = (b"\x00", b"\x7f", b"\x80", b"\x90", b"\x9f", b"\xc0", b"\xc1", b"\xc4\xff", b"\xc6\xff\xff\xff\xff",
         b"\xca\x7f\xc0\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\xdb\xff\xff\xff\xff",
         b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 500)  # fmt: skip


def mutate(data: bytes, random: Random) -> bytes:
    """A few of: a bit flipped, a byte replaced, bytes cut out, put in, doubled, or the end cut off."""
    frame = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(frame) + 1)
        kind = random.randrange(6)
        if kind == 0 and at < len(frame):
            frame[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(frame):
            frame[at] = random.randrange(256)
        elif kind == 2:
            del frame[at : at + random.randrange(1, 5)]
        elif kind == 3:
            frame[at:at] = random.choice(MARKS)
        elif kind == 4:
            frame[at:at] = frame[at : at + random.randrange(1, 9)]
        else:
            del frame[at:]
    return bytes(frame)


def test_mutated_frames() -> None:
    async def attack() -> dict[str, int]:
        limits = Limits(frames_per_second=1e9, frame_burst=10**9, opens_per_second=1e9, open_burst=10**9)
        hub = Hub(FakeBackend(), limits)
        victim, right = Client(hub, "victim"), greedy("p", 3)
        await victim(OPEN)
        random = Random(6)
        outcomes: dict[str, int] = {}
        attacker: Client | None = None
        sizes = []
        for number in range(FRAMES):
            if attacker is None or not attacker.stays:
                if attacker is not None:
                    await attacker.connection.ended()
                attacker = Client(hub, "attacker")
                attacker.stays = True
                if random.random() < 0.9:
                    await attacker(OPEN)
            replies: Any = await attacker.raw(mutate(random.choice(SEEDS), random))
            for reply in replies if isinstance(replies, list) else [replies]:
                name = reply.code if isinstance(reply, Error) else type(reply).__name__
                outcomes[name] = outcomes.get(name, 0) + 1
            if number % 500 == 0:  # its verdicts are as if it were alone
                assert await victim(verify(number // 500, 0, right[:2])) == Verdict(number // 500, 2, right[2])
                for session in list(hub.sessions.values()):
                    if session.owner == "attacker" and session.connection is not attacker.connection:
                        hub.close(session)
            if number % (FRAMES // 10) == FRAMES // 10 - 1:
                gc.collect()
                sizes.append(sys.getallocatedblocks())
        # From the first tenth to the last: not a block for every hundred frames is left behind.
        assert sizes[-1] - sizes[0] < FRAMES // 100, sizes
        return outcomes

    outcomes = asyncio.run(attack())
    # The mutations reach every layer: undecodable, decodable but refused, and valid.
    assert outcomes["bad_frame"] > FRAMES // 10
    assert {"refused", "gap", "stale", "version", "Verdict", "Token", Opened.__name__} <= outcomes.keys(), outcomes
