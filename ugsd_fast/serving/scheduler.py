"""One thread for one model: blocks that wait together share a forward pass, prompts are computed in between."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.sessions import Call, Judged, Refusal

_LEAST_PIECE = 16  # positions that a piece counts for at least: a forward has a cost of its own
_log = logging.getLogger(__name__)


class Schedulable(Protocol):
    """The state of a session in the model."""

    last_used: float

    @property
    def ready(self) -> bool:
        """Whether the prompt is in the cache."""

    @property
    def kv_bytes(self) -> int:
        """Memory of the cache."""

    def advance(self, positions: int) -> int:
        """Compute a piece of the prompt; how many positions it had."""

    def needed(self, call: Call) -> int:
        """Tokens that a call's forward appends."""

    def evict(self) -> None:
        """Free the cache; `advance` computes it again."""


class Judge(Protocol):
    """A model that judges blocks of many sessions at once."""

    def judge(self, jobs: Sequence[tuple[Schedulable, Call]]) -> list[Judged | Exception]:
        """Judge them in one forward pass; what goes wrong with one of them is its own."""


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
    """Runs the forwards of all sessions.

    Parameters
    ----------
    judge : Judge
        The model.
    limits : Limits
        Token budget, waiting times, memory.
    """

    def __init__(self, judge: Judge, limits: Limits, metrics: Metrics):
        self._judge, self._limits, self._metrics = judge, limits, metrics
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._prompts: deque[Schedulable] = deque()  # taken in turn
        self._states: dict[int, Schedulable] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ugsd-model", daemon=True)
        self._thread.start()

    def add(self, state: Schedulable) -> None:
        """Begin a session: its prompt is computed from now on."""
        with self._changed:
            self._states[id(state)] = state
            self._prompts.append(state)
            self._changed.notify()

    def submit(self, state: Schedulable, call: Call) -> Future[Judged]:
        """Queue a block; raises `Refusal` where too many wait."""
        with self._changed:
            if self._closed or id(state) not in self._states:
                raise Refusal("unknown_session", "the session has ended")
            if len(self._jobs) >= self._limits.max_waiting:
                message = f"{len(self._jobs)} blocks are waiting"
                raise Refusal("busy", message, retry_after=self._limits.retry_after)
            job = _Job(state, call)
            self._jobs.append(job)
            if not state.ready and state not in self._prompts:
                self._prompts.append(state)
            self._metrics.waiting.set(len(self._jobs))
            self._changed.notify()
        return job.future

    def remove(self, state: Schedulable) -> None:
        """End a session; blocks of it that wait are dropped."""
        with self._changed:
            self._states.pop(id(state), None)
            if state in self._prompts:
                self._prompts.remove(state)
            for job in [job for job in self._jobs if job.state is state]:
                self._jobs.remove(job)
                job.fail(Refusal("unknown_session", "the session has ended"))
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._jobs or self._prompts):
                    self._changed.wait()
                if self._closed:
                    return
                for job in self._jobs:  # evicted while it waited
                    if not job.state.ready and job.state not in self._prompts:
                        self._prompts.append(job.state)
                batch = self._batch()
                prompts = list(self._prompts)
                if not batch and not prompts:
                    self._changed.wait(self._limits.max_wait)  # for company, or for a job whose prompt is on its way
                    continue
            if batch:
                self._forward(batch)
            room = self._limits.prefill_chunk
            for prompt in prompts:
                room -= max(self._advance(prompt, room), _LEAST_PIECE)
                if room <= 0:
                    break

    def _batch(self) -> list[_Job]:
        """The blocks of the next forward: the oldest first, one a session, up to the token budget."""
        batch: list[_Job] = []
        tokens = 0
        taken: set[int] = set()
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
            return []
        waited = time.monotonic() - batch[0].arrived
        open_to_more = len(batch) < len(self._states) and tokens < self._limits.token_budget and not batch[0].alone
        if open_to_more and waited < self._limits.max_wait and not self._prompts:
            return []
        for job in batch:
            self._jobs.remove(job)
            job.state.last_used = time.monotonic()
        self._metrics.waiting.set(len(self._jobs))
        return [job for job in batch if job.begin()]

    def _forward(self, batch: list[_Job]) -> None:
        started = time.monotonic()
        try:
            outcomes = self._judge.judge([(job.state, job.call) for job in batch])
        except Exception as error:
            _log_failure(f"a forward over {len(batch)} sessions", error)
            if len(batch) > 1:
                self._one_by_one(batch)
                return
            outcomes = [error]
        self._metrics.forward_seconds.observe(time.monotonic() - started)
        self._metrics.batch_sessions.observe(len(batch))
        for job, outcome in zip(batch, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                job.future.set_result(outcome)
                continue
            job.state.evict()  # whatever is in the cache now, the next block finds a sound one
            job.fail(outcome if isinstance(outcome, Refusal) else _failed(outcome))
        self._account()

    def _one_by_one(self, batch: list[_Job]) -> None:
        """Queue blocks again, each for a forward of its own, with caches computed anew."""
        with self._changed:
            for job in reversed(batch):
                job.alone = True
                job.state.evict()
                if id(job.state) in self._states:
                    self._jobs.appendleft(job)
                    self._prompts.append(job.state)
                else:
                    job.fail(Refusal("unknown_session", "the session has ended"))

    def _advance(self, state: Schedulable, positions: int) -> int:
        """A piece of one prompt, of so many positions at most; then it is the next one's turn."""
        error: Exception | None = None
        computed = 0
        if not self._make_room(state):
            error = Refusal("busy", "no memory for another session", retry_after=self._limits.retry_after)
        else:
            try:
                computed = state.advance(positions)
            except Exception as raised:
                _log_failure("a prompt", raised)
                error = _failed(raised)
        with self._changed:
            if state in self._prompts:
                self._prompts.remove(state)
                if error is None and not state.ready:
                    self._prompts.append(state)
            failed = [job for job in self._jobs if job.state is state] if error else []
            for job in failed:
                self._jobs.remove(job)
        if error is not None:
            state.evict()
            for job in failed:
                job.fail(error)
        self._account()
        return computed

    def _make_room(self, wanting: Schedulable | None = None) -> bool:
        """Evict idle sessions, the longest unused first, until the budget holds; whether it does."""
        with self._changed:
            busy = {id(job.state) for job in self._jobs} | {id(state) for state in self._prompts} | {id(wanting)}
            states = list(self._states.values())
        used = sum(state.kv_bytes for state in states)
        idle = sorted((s for s in states if id(s) not in busy and s.kv_bytes), key=lambda state: state.last_used)
        for state in idle:
            if used < self._limits.kv_bytes:
                break
            used -= state.kv_bytes
            state.evict()
            self._metrics.evictions.inc()
        return used < self._limits.kv_bytes

    def _account(self) -> None:
        with self._changed:
            used = sum(state.kv_bytes for state in self._states.values())
        self._metrics.kv_bytes.set(used)
        if used > self._limits.kv_bytes:
            self._make_room()


def _log_failure(what: str, error: Exception) -> None:
    """Log where something failed; not the message, which may quote what nobody else is to read."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s failed with %s:\n%s", what, type(error).__name__, where)


def _failed(error: Exception) -> Refusal:
    return Refusal("failed", f"the model failed ({type(error).__name__})")
