"""Two network namespaces and the link between them: ``tc netem`` where the kernel has it, else the same in user space.

The stand-in joins a TUN device of each namespace: every IP packet is delayed, dropped at random, and queued at the rate
of the link. TCP runs through both kernels' stacks as ever: losses are retransmitted and windows grow as on a network.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EDGE, CLOUD = "ugsd-edge", "ugsd-cloud"
EDGE_ADDRESS, CLOUD_ADDRESS = "10.77.0.1", "10.77.0.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_QUEUE_SECONDS = 0.5  # what waits longer for the link is dropped


@dataclass(frozen=True)
class Condition:
    """Of the network: round trip in ms, loss in percent of the packets each way, Mbit/s each way."""

    rtt: float = 50.0
    loss: float = 0.0
    rate: float = 20.0

    def __str__(self) -> str:
        return f"{self.rtt:g} ms, {self.loss:g}% loss, {self.rate:g} Mbit/s"


def run(*command: str) -> None:
    """Run a command; raises with what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class NetemLink:
    """A veth pair with ``tc netem`` on both ends."""

    name = "tc netem"

    def __init__(self) -> None:
        run("ip", "link", "add", "ugsd0", "netns", EDGE, "type", "veth", "peer", "name", "ugsd0", "netns", CLOUD)
        for namespace, address in ((EDGE, EDGE_ADDRESS), (CLOUD, CLOUD_ADDRESS)):
            run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "ugsd0")
            run("ip", "-n", namespace, "link", "set", "ugsd0", "up")
        self.set(Condition())

    def set(self, condition: Condition) -> None:
        """Change what the network is like."""
        netem = ["delay", f"{condition.rtt / 2}ms", "loss", f"{condition.loss}%", "rate", f"{condition.rate}mbit"]
        for namespace in (EDGE, CLOUD):
            command = ["tc", "qdisc", "replace", "dev", "ugsd0", "root", "netem", *netem, "limit", "1000"]
            run("ip", "netns", "exec", namespace, *command)

    def close(self) -> None:
        """Nothing: the devices go with their namespaces."""


class TunLink:
    """A TUN device in each namespace, joined by a thread that does what netem does."""

    name = "user-space netem over TUN (this kernel has no sch_netem)"

    def __init__(self) -> None:
        self._condition = Condition()
        self._random = random.Random(0)
        self._ends = []
        for namespace, address, peer in ((EDGE, EDGE_ADDRESS, CLOUD_ADDRESS), (CLOUD, CLOUD_ADDRESS, EDGE_ADDRESS)):
            device = namespace.replace("ugsd-", "ugsd")
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
            run("ip", "link", "set", device, "netns", namespace)
            run("ip", "-n", namespace, "addr", "add", address, "peer", peer, "dev", device)
            run("ip", "-n", namespace, "link", "set", device, "up")
            self._ends.append(end)
        self._closed = False
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def set(self, condition: Condition) -> None:
        """Change what the network is like."""
        self._condition = condition

    def close(self) -> None:
        """Stop forwarding."""
        self._closed = True
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _forward(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # due, order, to, packet
        free = [0.0, 0.0]  # when each direction's link has sent what it has
        order = 0
        while not self._closed:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, end, packet = heapq.heappop(waiting)
                os.write(self._ends[end], packet)
            timeout = min(waiting[0][0] - now, 0.1) if waiting else 0.1
            ready, _, _ = select.select(self._ends, [], [], max(timeout, 0))
            condition, now = self._condition, time.monotonic()
            for source in ready:
                direction = self._ends.index(source)
                while True:
                    try:
                        packet = os.read(source, 65536)
                    except BlockingIOError:
                        break
                    begins = max(now, free[direction])
                    if begins - now > _QUEUE_SECONDS or self._random.random() < condition.loss / 100:
                        continue
                    free[direction] = begins + 8 * len(packet) / (1e6 * condition.rate)
                    order += 1
                    due = free[direction] + condition.rtt / 2000
                    heapq.heappush(waiting, (due, order, 1 - direction, packet))


@contextmanager
def network() -> Iterator[NetemLink | TunLink]:
    """Both namespaces and their link; gone afterwards. Needs root."""
    for namespace in (EDGE, CLOUD):
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
    link: NetemLink | TunLink | None = None
    try:
        try:
            link = NetemLink()
        except RuntimeError:
            subprocess.run(["ip", "-n", EDGE, "link", "del", "ugsd0"], capture_output=True)
            link = TunLink()
        yield link
    finally:
        if link is not None:
            link.close()
        for namespace in (EDGE, CLOUD):
            run("ip", "netns", "del", namespace)
