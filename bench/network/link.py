"""A link of two network namespaces whose packets are delayed, lost and paced in this process.

The kernel's ``netem`` does the same where it is built (``CONFIG_NET_SCH_NETEM``); `Link` needs only TUN devices. TCP on
both sides is the kernel's own and meets the losses as on a real path.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICE, CLOUD = "ugsd-device", "ugsd-cloud"  # namespaces
ADDRESSES = {DEVICE: "10.77.0.2", CLOUD: "10.77.0.1"}
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_QUEUE = 1000  # packets, as netem's


@dataclass(frozen=True)
class Conditions:
    """Of a link: round-trip time in milliseconds, loss in percent each way, rate in Mbit/s each way (0: unbounded)."""

    rtt: float = 0.0
    loss: float = 0.0
    rate: float = 0.0


class Direction:
    """One way of a link: when a packet arrives at the other side, None where it is lost.

    Examples
    --------
    >>> way = Direction(Conditions(rtt=50, rate=10))
    >>> [round(1e3 * way.arrival(0.0, 1250), 3) for _ in range(2)]  # a millisecond to send each
    [26.0, 27.0]
    """

    def __init__(self, conditions: Conditions, seed: int = 0):
        self._conditions = conditions
        self._random = random.Random(seed)
        self._free = 0.0  # when the last packet has been sent
        self._waiting: list[float] = []

    def arrival(self, now: float, size: int) -> float | None:
        """Of a packet of `size` bytes handed over at `now`."""
        conditions = self._conditions
        if self._random.random() < conditions.loss / 100:
            return None
        self._waiting = [sent for sent in self._waiting if sent > now]
        if len(self._waiting) >= _QUEUE:
            return None
        self._free = max(self._free, now)
        if conditions.rate:
            self._free += 8 * size / (1e6 * conditions.rate)
            self._waiting.append(self._free)
        return self._free + conditions.rtt / 2e3


def environment() -> dict[str, str]:
    """Of processes that run this package's modules from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts, into a network namespace."""
    with open(f"/run/netns/{namespace}") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"network namespace {namespace} cannot be entered")


def netem() -> str:
    """Why the kernel's netem is not used; empty where it could be."""
    command = ["ip", "netns", "exec", DEVICE, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return tried.stderr.strip()


class Link:
    """The link; `set` changes its conditions."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def set(self, conditions: Conditions) -> None:
        """From now on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(conditions)) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the link has ended")


@contextmanager
def linked() -> Iterator[Link]:
    """Two namespaces, `DEVICE` and `CLOUD`, with a link between them; needs root."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    made = []
    try:
        for namespace in (DEVICE, CLOUD):
            ip("netns", "add", namespace)
            made.append(namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "tuntap", "add", "tun0", "mode", "tun")
            ip("-n", namespace, "addr", "add", f"{ADDRESSES[namespace]}/24", "dev", "tun0")
            ip("-n", namespace, "link", "set", "tun0", "up")
        command = [sys.executable, "-m", "bench.network.link"]
        with subprocess.Popen(command, env=environment(), stdin=-1, stdout=-1, text=True) as process:
            link = Link(process)
            link.set(Conditions())
            try:
                yield link
            finally:
                process.kill()
    finally:
        for namespace in made:
            ip("netns", "del", namespace)


def _tun(namespace: str) -> int:
    enter(namespace)
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return handle


def main() -> None:
    """Carry packets between the namespaces' devices; every line on stdin is new conditions."""
    ends = [_tun(DEVICE), _tun(CLOUD)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    ways = {end: Direction(Conditions(), seed) for seed, end in enumerate(ends)}
    flying: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        now = time.monotonic()
        while flying and flying[0][0] <= now:
            _, _, end, packet = heapq.heappop(flying)
            with suppress(OSError):
                os.write(end, packet)
        wait = max(flying[0][0] - now, 0.0) if flying else None
        readable, _, _ = select.select([*ends, 0], [], [], wait)
        for end in readable:
            if end == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                ways = {end: Direction(Conditions(**json.loads(line)), seed) for seed, end in enumerate(ends)}
                print("set", flush=True)
                continue
            with suppress(BlockingIOError):
                while True:
                    packet = os.read(end, 65536)
                    arrival = ways[end].arrival(time.monotonic(), len(packet))
                    if arrival is not None:
                        count += 1
                        heapq.heappush(flying, (arrival, count, other[end], packet))


if __name__ == "__main__":
    main()
