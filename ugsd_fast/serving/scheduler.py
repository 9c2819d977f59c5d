"""Two threads for one model: blocks that wait together share a forward pass, and so do prompts, beside them."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.sessions import Call, Judged, Refusal

_LEAST_PIECE = 16  # positions that a piece counts for at least: a forward has a cost of its own
_ACTIVE = 0.5  # seconds since a session's last block within which the next one is waited for
_GONE, _CLOSED = "the session has ended", "the server is closing"
_log = logging.getLogger(__name__)


class Schedulable(Protocol):
    """The state of a session in the model."""

    last_used: float

    @property
    def ready(self) -> bool:
        """Whether the prompt is in the cache."""

    @property
    def remaining(self) -> int:
        """Positions of the prompt that are not in the cache yet."""

    def needed(self, call: Call) -> int:
        """Tokens that a call's forward appends."""

    def evict(self) -> None:
        """Free the cache; `Judge.prefill` computes it again."""


class Judge(Protocol):
    """A model that hears prompts and judges blocks of many sessions at once; two threads call it."""

    def kv_bytes(self, state: Schedulable, call: Call | None = None) -> int:
        """Memory that a session's cache takes at most with its prompt, or with a call's caption and block behind it."""

    def prefill(self, pieces: Sequence[tuple[Schedulable, int]]) -> list[Exception | None]:
        """Compute up to so many positions of each prompt; what goes wrong with one of them is its own."""

    def judge(self, jobs: Sequence[tuple[Schedulable, Call]]) -> list[Judged | Exception]:
        """Judge blocks in one forward pass; what goes wrong with one of them is its own."""


class _Job:
    __slots__ = ("alone", "arrived", "call", "future", "state")

    def __init__(self, state: Schedulable, call: Call):
        self.state, self.call = state, call
        self.future: Future[Judged] = Future()
        self.arrived = time.monotonic()
        self.alone = False  # after a forward that failed: whose fault was it?

    def begin(self) -> bool:
        """Whether somebody still waits for the verdict; from then on it cannot be cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: Exception) -> None:
        """Answer with an error."""
        if self.begin():
            self.future.set_exception(error)


class Scheduler:
    """Runs the forwards of all sessions: one thread those of blocks, another those of prompts.

    Memory is claimed before a forward that may take it, so that all claims together never exceed the budget.

    Parameters
    ----------
    judge : Judge
        The model.
    limits : Limits
        Token budget, waiting times, memory.
    """

    def __init__(self, judge: Judge, limits: Limits, metrics: Metrics):
        self._judge, self._limits, self._metrics = judge, limits, metrics
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # what the thread of blocks waits for
        self._prompt_wanted = threading.Condition(lock)
        self._jobs: deque[_Job] = deque()
        self._prompts: deque[Schedulable] = deque()  # taken in turn
        self._states: dict[int, Schedulable] = {}
        self._computed: dict[int, Schedulable] = {}  # in a forward just now
        self._claims: dict[int, int] = {}  # bytes of keys and values
        self._free_since = 0.0  # when the last forward over blocks ended
        self._closed = False
        turns = {"ugsd-blocks": self._judge_some, "ugsd-prompts": self._prefill_some}
        self._threads = [
            threading.Thread(target=self._run, args=(turn,), name=name, daemon=True) for name, turn in turns.items()
        ]
        for thread in self._threads:
            thread.start()

    def add(self, state: Schedulable) -> None:
        """Begin a session: its prompt is computed from now on.

        Raises
        ------
        Refusal
            If its prompt alone takes more memory than there is for all sessions, or the scheduler is closed.
        """
        self._check_fits(state)
        with self._changed:
            if self._closed:
                raise _ended(_CLOSED)
            self._states[id(state)] = state
            self._want_prompt(state)

    def submit(self, state: Schedulable, call: Call) -> Future[Judged]:
        """Queue a block; raises `Refusal` where too many wait, or the memory for all sessions could not hold it."""
        self._check_fits(state, call)
        with self._changed:
            if self._closed or id(state) not in self._states:
                raise _ended(_CLOSED if self._closed else _GONE)
            if len(self._jobs) >= self._limits.max_waiting:
                message = f"{len(self._jobs)} blocks are waiting"
                raise Refusal("busy", message, retry_after=self._limits.retry_after)
            job = _Job(state, call)
            self._jobs.append(job)
            self._want_prompt(state)
            self._metrics.waiting.set(len(self._jobs))
            self._changed.notify()
        return job.future

    def remove(self, state: Schedulable) -> None:
        """End a session; blocks of it that wait are dropped."""
        with self._changed:
            self._end(state, _GONE)
            self._changed.notify()  # of those left, all may be waiting

    def close(self) -> None:
        """End all sessions and stop the threads: a forward in flight is the last, and what waits is refused at once."""
        with self._changed:
            self._closed = True
            for state in list(self._states.values()):
                self._end(state, _CLOSED)
            self._changed.notify()
            self._prompt_wanted.notify()
        for thread in self._threads:
            thread.join()

    def _end(self, state: Schedulable, why: str) -> None:
        self._states.pop(id(state), None)
        if state in self._prompts:
            self._prompts.remove(state)
        if id(state) not in self._computed:
            self._forget(state)
        self._fail(state, _ended(why))

    def _run(self, turn: Callable[[], None]) -> None:
        while not self._closed:
            turn()

    def _judge_some(self) -> None:
        """One forward over blocks, or a wait for some."""
        with self._changed:
            for job in self._jobs:  # evicted while it waited
                self._want_prompt(job.state)
            batch, wait = self._batch()
            if not batch:
                if not self._closed:
                    self._changed.wait(wait)
                return
            self._computed.update((id(job.state), job.state) for job in batch)
        started = time.monotonic()
        outcomes: list[Judged | Exception]
        failure: Exception | None = None
        try:
            outcomes = self._judge.judge([(job.state, job.call) for job in batch])
        except Exception as error:
            _log_failure(f"a forward over {len(batch)} sessions", error)
            failure, outcomes = error, [_failed(error)] * len(batch)
        self._metrics.forward_seconds.observe(time.monotonic() - started)
        self._metrics.batch_sessions.observe(len(batch))
        with self._changed:
            self._free_since = time.monotonic()
            for job, outcome in zip(batch, outcomes, strict=True):
                del self._computed[id(job.state)]
                job.state.last_used = self._free_since
                if isinstance(outcome, Exception) or id(job.state) not in self._states:
                    self._forget(job.state)  # whatever is in the cache now, the next block finds a sound one
            if failure is not None and len(batch) > 1:
                self._queue_alone(batch)
                return
        for job, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                job.fail(outcome if isinstance(outcome, Refusal) else _failed(outcome))
            else:
                job.future.set_result(outcome)

    def _batch(self) -> tuple[list[_Job], float | None]:
        """The blocks of the next forward: the oldest first, one a session, up to the token budget.

        Where it is worth waiting for company, none, and the seconds to wait; None where there is nothing to do.
        """
        batch: list[_Job] = []
        tokens = 0
        taken = set(self._computed)
        for job in self._jobs:
            if id(job.state) in taken or not job.state.ready:
                continue
            taken.add(id(job.state))
            needed = job.state.needed(job.call)
            if batch and (job.alone or batch[0].alone or tokens + needed > self._limits.token_budget):
                break
            tokens += needed
            batch.append(job)
        if not batch:
            return [], None
        now = time.monotonic()
        left = max(batch[0].arrived, self._free_since) + self._limits.max_wait - now
        open_to_more = tokens < self._limits.token_budget and not batch[0].alone and left > 0
        if open_to_more and self._expects_more(taken, now):
            return [], left
        for job in batch:
            self._jobs.remove(job)
            job.state.last_used = time.monotonic()
        self._metrics.waiting.set(len(self._jobs))
        busy = {id(job.state) for job in batch}
        ready = []
        for job in batch:
            if not self._claim(job.state, job.call, busy):
                job.fail(self._no_memory())
            elif job.begin():
                ready.append(job)
        return ready, 0.0

    def _expects_more(self, taken: set[int], now: float) -> bool:
        """Whether a session may send a block soon: one that is not taken, has its prompt, and was active of late."""
        return any(
            state.ready and key not in taken and now - state.last_used < _ACTIVE for key, state in self._states.items()
        )

    def _queue_alone(self, batch: list[_Job]) -> None:
        """Queue blocks again, each for a forward of its own, with caches computed anew."""
        for job in reversed(batch):
            job.alone = True
            if id(job.state) in self._states:
                self._jobs.appendleft(job)
                self._want_prompt(job.state)
            else:
                job.fail(_ended(_CLOSED if self._closed else _GONE))

    def _prefill_some(self) -> None:
        """One turn of prompts, or a wait for some."""
        with self._changed:
            pieces = self._pieces()
            if not pieces:
                if not self._closed:
                    self._prompt_wanted.wait()
                return
            self._computed.update((id(state), state) for state, _ in pieces)
        started = time.monotonic()
        errors: list[Exception | None]
        try:
            errors = self._judge.prefill(pieces)
        except Exception as failure:
            errors = [failure] * len(pieces)
        self._metrics.prompt_seconds.observe(time.monotonic() - started)
        self._metrics.batch_prompts.observe(len(pieces))
        with self._changed:
            for (state, _), error in zip(pieces, errors, strict=True):
                del self._computed[id(state)]
                if error is not None:
                    _log_failure("a prompt", error)
                    self._forget(state)
                    self._fail(state, _failed(error))
                elif id(state) not in self._states:
                    self._forget(state)
                elif not state.ready:
                    self._prompts.append(state)
            self._changed.notify()

    def _pieces(self) -> list[tuple[Schedulable, int]]:
        """The prompts of the next turn: as many whole ones as fit, or a piece of one that is longer than a turn."""
        pieces: list[tuple[Schedulable, int]] = []
        room = self._limits.prefill_chunk
        while self._prompts and room > 0:
            state = self._prompts[0]
            if pieces and state.remaining > room:
                break
            self._prompts.popleft()
            if not self._claim(state, None, {id(state) for state, _ in pieces}):
                self._fail(state, self._no_memory())
                continue
            pieces.append((state, min(state.remaining, room)))
            room -= max(state.remaining, _LEAST_PIECE)
        return pieces

    def _want_prompt(self, state: Schedulable) -> None:
        """Queue a session's prompt, unless it is in the cache or on its way there."""
        if not state.ready and id(state) not in self._computed and state not in self._prompts:
            self._prompts.append(state)
            self._prompt_wanted.notify()

    def _fail(self, state: Schedulable, error: Refusal) -> None:
        """Answer all blocks of a session with an error."""
        for job in [job for job in self._jobs if job.state is state]:
            self._jobs.remove(job)
            job.fail(error)

    def _claim(self, state: Schedulable, call: Call | None, chosen: set[int]) -> bool:
        """Reserve memory for a session's forward, at the cost of idle ones, the longest unused first.

        Sessions that wait, are computed, or are `chosen` for the same forward keep theirs.
        """
        held = self._claims.get(id(state), 0)
        more = self._judge.kv_bytes(state, call) - held
        if more <= 0:
            return True
        free = self._limits.kv_bytes - sum(self._claims.values())
        if more > free:
            busy = {id(job.state) for job in self._jobs} | {id(one) for one in self._prompts}
            busy |= {id(state)} | chosen | self._computed.keys()
            idle = sorted(
                (self._states[key] for key in self._claims if key not in busy), key=lambda state: state.last_used
            )
            for victim in idle:
                if more <= free:
                    break
                free += self._claims[id(victim)]
                self._forget(victim)
                self._metrics.evictions.inc()
        if more > free:
            return False
        self._claims[id(state)] = held + more
        self._metrics.kv_bytes.set(sum(self._claims.values()))
        return True

    def _forget(self, state: Schedulable) -> None:
        """Free a session's cache."""
        state.evict()
        self._claims.pop(id(state), None)
        self._metrics.kv_bytes.set(sum(self._claims.values()))

    def _check_fits(self, state: Schedulable, call: Call | None = None) -> None:
        need, most = self._judge.kv_bytes(state, call), self._limits.kv_bytes
        if need > most:
            raise Refusal("refused", f"the session takes {need} bytes of keys and values, expected at most {most}")

    def _no_memory(self) -> Refusal:
        return Refusal("busy", "no memory for another session", retry_after=self._limits.retry_after)


def _log_failure(what: str, error: Exception) -> None:
    """Log where something failed; not the message, which may quote what nobody else is to read."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s failed with %s:\n%s", what, type(error).__name__, where)


def _ended(why: str) -> Refusal:
    """What has a client open its session anew, perhaps at another server."""
    return Refusal("unknown_session", why)


def _failed(error: Exception) -> Refusal:
    return Refusal("failed", f"the model failed ({type(error).__name__})")
