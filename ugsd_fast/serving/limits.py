"""What a server takes on: sizes, counts and rates, all checked before anything is allocated or computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Parameters
    ----------
    max_sessions, max_sessions_per_token : int
        Open sessions, of all clients and of one token.
    opens_per_second, open_burst : float, int
        Connections and sessions that one token may begin, on average and at once.
    frames_per_second, frame_burst : float, int
        Frames of one token, over all its sessions.
    audio_seconds_per_minute : float
        Audio that one token may upload.
    max_audio_seconds : float
        Of one session; the verifier's own limit holds where it is shorter.
    max_open_bytes, max_verify_bytes : int
        Size of the frame that opens a session, and of every other. A WebSocket message longer than the former is
        refused by its header.
    max_prompt_chars, max_block, max_tokens : int
        Of a prompt, a draft block, and a caption.
    max_waiting : int
        Verify frames that wait for the model before new ones are answered "busy".
    kv_bytes : int
        Keys and values of all sessions together, claimed before they are computed; idle sessions are evicted, the
        longest unused first.
    token_budget : int
        New tokens in one forward pass.
    prefill_chunk : int
        Positions of prompts in one forward pass.
    max_wait : float
        Seconds that a verify frame may wait for company, five times as long while prompts queue.
    resume_seconds : float
        How long a session outlives its connection.
    retry_after : float
        Seconds that a busy server asks for.
    """

    max_sessions: int = 256
    max_sessions_per_token: int = 128
    opens_per_second: float = 20.0
    open_burst: int = 100
    frames_per_second: float = 500.0
    frame_burst: int = 1000
    audio_seconds_per_minute: float = 6000.0
    max_audio_seconds: float = 300.0
    max_open_bytes: int = 16 << 20
    max_verify_bytes: int = 64 << 10
    max_prompt_chars: int = 8192
    max_block: int = 256
    max_tokens: int = 8192
    max_waiting: int = 1024
    kv_bytes: int = 1 << 30
    token_budget: int = 2048
    prefill_chunk: int = 512
    max_wait: float = 0.002
    resume_seconds: float = 120.0
    retry_after: float = 0.5


class Rate:
    """A token bucket for each of many keys; keys that are full again are forgotten.

    Examples
    --------
    >>> now = [0.0]
    >>> rate = Rate(2.0, 3, clock=lambda: now[0])
    >>> [rate.take("a") for _ in range(4)]
    [0.0, 0.0, 0.0, 0.5]
    >>> now[0] = 0.5
    >>> rate.take("a"), rate.take("b")
    (0.0, 0.0)
    """

    def __init__(
        self, per_second: float, burst: float, *, clock: Callable[[], float] = time.monotonic, max_keys: int = 4096
    ):
        self._per_second, self._burst = per_second, burst
        self._clock = clock
        self._max_keys = max_keys
        self._levels: dict[Hashable, tuple[float, float]] = {}  # what was left, and when

    def take(self, key: Hashable, amount: float = 1.0) -> float:
        """Take from a key's bucket: 0, or the seconds until there is enough and nothing is taken."""
        now = self._clock()
        left, then = self._levels.get(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._per_second)
        if left < amount:
            self._levels[key] = (left, now)
            return (amount - left) / self._per_second
        if key not in self._levels and len(self._levels) >= self._max_keys:
            self._forget(now)
        self._levels[key] = (left - amount, now)
        return 0.0

    def _forget(self, now: float) -> None:
        self._levels = {
            key: (left, then)
            for key, (left, then) in self._levels.items()
            if left + (now - then) * self._per_second < self._burst
        }
        while len(self._levels) >= self._max_keys:  # all are busy: the oldest gets a fresh start
            self._levels.pop(next(iter(self._levels)))
