"""Who is computed when: blocks together, prompts beside them, memory within its budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import pytest
import torch

from ugsd_fast import LocalVerifier, UGSDConfig
from ugsd_fast.demo import clips, load_pair
from ugsd_fast.serving.engine import BatchJudge, ServedSession
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.scheduler import Scheduler
from ugsd_fast.serving.sessions import Call, Judged, Refusal

BLOCK = Call([1], [2, 3], True, 0)


class State:
    """A prompt of so many positions, each a byte in the cache."""

    def __init__(self, log: list[object], name: str, prompt: int):
        self.log, self.name, self.prompt = log, name, prompt
        self.done = 0
        self.last_used = time.monotonic()

    @property
    def ready(self) -> bool:
        return self.done >= self.prompt

    @property
    def remaining(self) -> int:
        return self.prompt - self.done

    def needed(self, call: Call) -> int:
        return len(call.draft) + 1

    def evict(self) -> None:
        self.log.append(f"-{self.name}")
        self.done = 0


class Machine:
    """A scheduler whose model takes its time."""

    def __init__(self, **limits: float):
        self.log: list[object] = []
        self.hold = threading.Event()
        self.hold.set()
        self.poison: State | None = None
        self.mute: State | None = None
        self.growth = 0  # bytes that a call adds
        self.states: list[State] = []
        self.held: list[int] = []  # bytes in the caches after each turn of prompts
        self.metrics = Metrics()
        self.scheduler = Scheduler(self, Limits(**{"max_wait": 0.005, **limits}), self.metrics)  # type: ignore[arg-type]

    def kv_bytes(self, state: State, call: Call | None = None) -> int:
        return state.prompt + self.growth * (call is not None)

    def prefill(self, pieces: Sequence[tuple[State, int]]) -> list[Exception | None]:
        self.log.append("&".join(state.name for state, _ in pieces))
        time.sleep(0.001)
        for state, positions in pieces:
            assert positions > 0
            state.done = min(state.done + positions, state.prompt)
        self.held.append(sum(state.done for state in self.states))
        return [RuntimeError("inaudible") if state is self.mute else None for state, _ in pieces]

    def judge(self, jobs: Sequence[tuple[State, Call]]) -> list[Judged | Exception]:
        self.hold.wait()
        assert all(state.ready for state, _ in jobs)
        self.log.append("+".join(state.name for state, _ in jobs))
        if any(state is self.poison for state, _ in jobs):
            raise RuntimeError("out of luck")
        return [Judged(0, 7) for _ in jobs]

    def session(self, name: str, prompt: int = 1) -> State:
        state = State(self.log, name, prompt)
        self.states.append(state)
        self.scheduler.add(state)
        return state


@pytest.fixture
def machine() -> Callable[..., Machine]:
    made: list[Machine] = []

    def make(**limits: float) -> Machine:
        made.append(Machine(**limits))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.scheduler.close()


def settled(machine: Machine, *states: State, forget: bool = True) -> None:
    """Wait until prompts are computed, and forget how."""
    end = time.monotonic() + 5
    while not all(state.ready for state in states) or machine.scheduler._computed:
        assert time.monotonic() < end
        time.sleep(0.001)
    if forget:
        machine.log.clear()


def test_blocks_that_wait_share_a_forward(machine: Callable[..., Machine]) -> None:
    one = machine()
    states = [one.session(name) for name in "abcd"]
    settled(one, *states)
    futures = [one.scheduler.submit(state, BLOCK) for state in states]
    assert [future.result(5).next_token for future in futures] == [7] * 4
    assert one.log == ["a+b+c+d"]


def test_up_to_the_token_budget_and_no_longer_than_the_wait(machine: Callable[..., Machine]) -> None:
    one = machine(token_budget=6, max_wait=0.02)
    states = [one.session(name) for name in "abcde"]
    settled(one, *states)
    began = time.monotonic()
    one.scheduler.submit(states[0], BLOCK).result(5)
    assert 0.02 <= time.monotonic() - began < 0.2  # nobody else came
    futures = [one.scheduler.submit(state, BLOCK) for state in states]
    for future in futures:
        future.result(5)
    assert one.log == ["a", "a+b", "c+d", "e"]


def test_nobody_waits_for_idle_sessions(machine: Callable[..., Machine]) -> None:
    one = machine(max_wait=0.5)
    active, idle = one.session("a"), one.session("b")
    settled(one, active, idle)
    idle.last_used -= 1
    began = time.monotonic()
    one.scheduler.submit(active, BLOCK).result(5)
    assert time.monotonic() - began < 0.4


def test_a_long_prompt_does_not_stall_blocks(machine: Callable[..., Machine]) -> None:
    one = machine(prefill_chunk=1)
    short = one.session("s")
    settled(one, short)
    long, other = one.session("L", prompt=60), one.session("M", prompt=60)
    for _ in range(10):
        one.scheduler.submit(short, BLOCK).result(5)
    settled_at = len(one.log)
    assert one.log.count("s") == 10
    assert one.log[:settled_at].count("L") < 60  # all blocks came before the prompt was through
    between = "".join(str(entry) for entry in one.log).split("s")
    assert max(map(len, between[1:-1])) <= 6
    settled(one, long, other)


def test_prompts_take_turns(machine: Callable[..., Machine]) -> None:
    one = machine(prefill_chunk=1)
    with one.scheduler._changed:
        states = [one.session(name, prompt=5) for name in "ab"]
    futures = [one.scheduler.submit(state, BLOCK) for state in states]
    for future in futures:
        future.result(5)
    assert [entry for entry in one.log if entry in ("a", "b")][:8] == list("abababab")


def test_short_prompts_share_a_forward(machine: Callable[..., Machine]) -> None:
    one = machine(prefill_chunk=64)
    with one.scheduler._changed:
        lengths = {"a": 20, "b": 20, "c": 20, "d": 20, "L": 100, "e": 1, "f": 1}
        states = [one.session(name, prompt=length) for name, length in lengths.items()]
    settled(one, *states, forget=False)
    # 20 + 20 + 20 of 64; a piece of a long prompt has a turn of its own; the shortest counts for 16.
    assert one.log == ["a&b&c", "d", "L", "e&f", "L"]


def slow_prompts(one: Machine) -> tuple[threading.Event, threading.Event]:
    """Have prompts be computed only once the second event is set; the first says that some are to be."""
    inside, go_on = threading.Event(), threading.Event()
    prefill = one.prefill

    def slow(pieces: Sequence[tuple[State, int]]) -> list[Exception | None]:
        inside.set()
        assert go_on.wait(5)
        return prefill(pieces)

    one.prefill = slow  # type: ignore[method-assign]
    return inside, go_on


def test_blocks_do_not_wait_for_prompts(machine: Callable[..., Machine]) -> None:
    """While a turn of prompts is computed, blocks are judged."""
    one = machine()
    ready = one.session("a")
    settled(one, ready)
    inside, go_on = slow_prompts(one)
    late = one.session("b")
    assert inside.wait(5)
    for _ in range(3):
        assert one.scheduler.submit(ready, BLOCK).result(5)
    waiting = one.scheduler.submit(late, BLOCK)
    assert not waiting.done()
    go_on.set()
    assert waiting.result(5)
    assert one.log == ["a", "a", "a", "b", "b"]


def test_a_prompt_that_fails_is_its_own_sessions_trouble(machine: Callable[..., Machine]) -> None:
    one = machine()
    one.hold.clear()
    with one.scheduler._changed:
        states = [one.session(name) for name in "abc"]
        one.mute = states[1]
        futures = [one.scheduler.submit(state, BLOCK) for state in states]
    one.hold.set()
    assert futures[0].result(5) == futures[2].result(5) == Judged(0, 7)
    failed = futures[1].exception(5)
    assert isinstance(failed, Refusal)
    assert (failed.code, str(failed)) == ("failed", "the model failed (RuntimeError)")
    one.mute = None
    assert one.scheduler.submit(states[1], BLOCK).result(5)  # the next block begins anew


def test_idle_sessions_are_evicted_the_longest_unused_first(machine: Callable[..., Machine]) -> None:
    one = machine(kv_bytes=30)
    states = []
    for name in "abc":
        states.append(one.session(name, prompt=10))
        settled(one, states[-1])
    one.scheduler.submit(states[0], BLOCK).result(5)
    late = one.session("d", prompt=10)
    settled(one, late)
    assert not states[1].ready
    assert states[0].ready
    assert one.metrics.evictions._value.get() == 1
    assert one.scheduler.submit(states[1], BLOCK).result(5) == Judged(0, 7)  # it comes back
    assert one.log[-1] == "b"


def test_without_idle_sessions_there_is_no_room(machine: Callable[..., Machine]) -> None:
    one = machine(kv_bytes=10, prefill_chunk=10)
    first = one.session("a", prompt=10)
    settled(one, first)
    one.hold.clear()
    judged = one.scheduler.submit(first, BLOCK)
    second = one.session("b", prompt=10)
    with one.scheduler._changed:
        again = one.scheduler.submit(first, BLOCK)  # keeps it busy
        refused = one.scheduler.submit(second, BLOCK)
    one.hold.set()
    assert judged.result(5)
    outcome = refused.exception(5)
    if outcome is not None:
        assert isinstance(outcome, Refusal)
        assert (outcome.code, outcome.retry_after) == ("busy", 0.5)
    assert again.result(5)


def test_the_budget_is_never_exceeded(machine: Callable[..., Machine]) -> None:
    """Prompts of different lengths in pieces and together, all of them again and again, in half of the memory."""
    one = machine(kv_bytes=60, prefill_chunk=16, retry_after=0.001)
    one.growth = 2
    lengths = [3, 9, 14, 5, 30, 2, 24, 11, 7, 15]
    states = [one.session(str(length), prompt=length) for length in lengths]
    answered = dict.fromkeys(lengths, 0)
    refusals: set[str] = set()

    def ask(state: State) -> None:
        while answered[state.prompt] < 5:
            try:
                one.scheduler.submit(state, BLOCK).result(5)
                answered[state.prompt] += 1
            except Refusal as refusal:
                refusals.add(refusal.code)
                time.sleep(refusal.retry_after)

    threads = [threading.Thread(target=ask, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(answered.values()) == {5}
    assert refusals <= {"busy"}
    assert max(one.held) <= 60
    assert sum(one.scheduler._claims.values()) <= 60
    assert one.metrics.kv_bytes._value.get() == sum(one.scheduler._claims.values())
    assert one.metrics.evictions._value.get() > 0


def test_what_could_never_fit_is_refused_for_good(machine: Callable[..., Machine]) -> None:
    one = machine(kv_bytes=10)
    with pytest.raises(Refusal, match="takes 11 bytes of keys and values, expected at most 10") as refused:
        one.session("a", prompt=11)
    assert refused.value.code == "refused"
    state = one.session("b", prompt=9)
    assert one.scheduler.submit(state, BLOCK).result(5)
    one.growth = 2  # the caption outgrows the memory
    with pytest.raises(Refusal, match="takes 11 bytes") as refused:
        one.scheduler.submit(state, BLOCK)
    assert refused.value.code == "refused"
    one.scheduler.remove(state)
    assert not one.scheduler._claims


def test_too_many_waiting_blocks_are_refused(machine: Callable[..., Machine]) -> None:
    one = machine(max_waiting=3)
    state = one.session("a")
    settled(one, state)
    one.hold.clear()
    futures = [one.scheduler.submit(state, BLOCK)]
    time.sleep(0.05)  # it is being judged
    futures += [one.scheduler.submit(state, BLOCK) for _ in range(3)]
    with pytest.raises(Refusal, match="3 blocks are waiting"):
        one.scheduler.submit(state, BLOCK)
    one.hold.set()
    assert all(future.result(5) for future in futures)


def test_a_forward_that_fails_is_tried_one_by_one(machine: Callable[..., Machine]) -> None:
    one = machine()
    states = [one.session(name) for name in "abc"]
    settled(one, *states)
    one.poison = states[1]
    futures = [one.scheduler.submit(state, BLOCK) for state in states]
    assert futures[0].result(5) == futures[2].result(5) == Judged(0, 7)
    failed = futures[1].exception(5)
    assert isinstance(failed, Refusal)
    assert (failed.code, str(failed)) == ("failed", "the model failed (RuntimeError)")


def test_a_verdict_that_nobody_waits_for_any_more(machine: Callable[..., Machine]) -> None:
    one = machine()
    state = one.session("a")
    settled(one, state)
    one.hold.clear()
    judged = one.scheduler.submit(state, BLOCK)
    time.sleep(0.05)  # it is being judged
    waiting = one.scheduler.submit(state, BLOCK)
    assert waiting.cancel()
    assert not judged.cancel()
    one.hold.set()
    assert judged.result(5)
    assert one.scheduler.submit(state, BLOCK).result(5)
    assert one.log == ["a", "a"]


def test_a_session_that_ends_takes_its_blocks_along(machine: Callable[..., Machine]) -> None:
    one = machine()
    state = one.session("a", prompt=10**6)
    future = one.scheduler.submit(state, BLOCK)
    one.scheduler.remove(state)
    assert isinstance(future.exception(5), Refusal)
    with pytest.raises(Refusal, match="the session has ended"):
        one.scheduler.submit(state, BLOCK)


class TestClosing:
    """Nobody waits for ever, whatever the threads are at."""

    @staticmethod
    def refused(future: Future[Judged]) -> None:
        error = future.exception(1)
        assert isinstance(error, Refusal)
        assert (error.code, str(error)) == ("unknown_session", "the server is closing")

    def test_what_waits_is_refused_at_once_and_what_is_computed_comes_to_its_end(
        self, machine: Callable[..., Machine]
    ) -> None:
        one = machine(prefill_chunk=10)
        judged, heard, waiting = one.session("a"), State(one.log, "b", 30), State(one.log, "c", 30)
        settled(one, judged)
        inside, go_on = slow_prompts(one)
        one.hold.clear()
        in_flight = one.scheduler.submit(judged, BLOCK)
        for state in (heard, waiting):
            one.scheduler.add(state)
        assert inside.wait(5)
        while not in_flight.running():
            time.sleep(0.001)
        futures = [one.scheduler.submit(state, BLOCK) for state in (judged, heard, waiting)]
        closing = threading.Thread(target=one.scheduler.close)
        closing.start()
        for future in futures:
            self.refused(future)
        assert closing.is_alive()
        assert not in_flight.done()
        go_on.set()
        one.hold.set()
        assert in_flight.result(5) == Judged(0, 7)
        closing.join(5)
        assert not any(thread.is_alive() for thread in (closing, *one.scheduler._threads))
        assert not one.scheduler._claims
        assert not any(state.done for state in (judged, heard, waiting))

    def test_later_ones_are_refused_and_closing_again_is_nothing(self, machine: Callable[..., Machine]) -> None:
        one = machine()
        state = one.session("a")
        one.scheduler.close()
        one.scheduler.close()
        with pytest.raises(Refusal, match="the server is closing"):
            one.scheduler.submit(state, BLOCK)
        with pytest.raises(Refusal, match="the server is closing"):
            one.session("b")
        one.scheduler.remove(state)

    def test_a_last_forward_that_fails_is_not_tried_again(self, machine: Callable[..., Machine]) -> None:
        one = machine()
        states = [one.session(name) for name in "ab"]
        settled(one, *states)
        one.poison = states[0]
        one.hold.clear()
        futures = [one.scheduler.submit(state, BLOCK) for state in states]
        while not all(future.running() for future in futures):
            time.sleep(0.001)
        closing = threading.Thread(target=one.scheduler.close)
        closing.start()
        while not one.scheduler._closed:
            time.sleep(0.001)
        one.hold.set()
        for future in futures:
            self.refused(future)
        closing.join(5)
        assert not closing.is_alive()

    def test_under_load(self, machine: Callable[..., Machine]) -> None:
        """At any moment, with callers that ask again from where they are answered."""
        for moment in range(20):
            one = machine(max_wait=0.0)
            states = [one.session(name, prompt=moment % 3 + 1) for name in "abcdef"]
            futures: list[Future[Judged]] = []

            def ask(state: State, one: Machine = one, futures: list[Future[Judged]] = futures) -> None:
                with suppress(Refusal):
                    future = one.scheduler.submit(state, BLOCK)
                    futures.append(future)
                    future.add_done_callback(lambda _: ask(state))

            for state in states:
                ask(state)
            time.sleep(0.001 * moment)
            one.scheduler.close()
            assert all(future.done() for future in futures)
            refusals = [future.exception() for future in futures]
            assert {str(error) for error in refusals if error is not None} <= {"the server is closing"}


def test_a_call_that_makes_no_sense_is_its_own_sessions_trouble() -> None:
    """Draft logits that are cut short, in one forward with a sound block."""
    pair = load_pair(threads=1)
    model = pair.verifier.model
    inputs = model.prepare(clips()[0].path, pair.prompt)
    greedy = UGSDConfig(rule="greedy", always_escalate=True)
    exact = UGSDConfig(rule="exact", temperature=1.0, always_escalate=True)
    sound, broken = (ServedSession(model, inputs, config, lambda: None) for config in (greedy, exact))
    for session in (sound, broken):
        session.advance(10**6)
    first = int(sound._prompt_logits.argmax())  # type: ignore[union-attr]
    judge = BatchJudge(LocalVerifier(model))
    far = (1).to_bytes(4, "little") + (10**6).to_bytes(4, "little") + b"\0\0\0\0"
    for logits in (b"\x05\0\0\0\1", far):
        jobs = [(sound, Call([], [first], True, 0)), (broken, Call([], [first], True, 0, 0, logits))]
        judged, refused = judge.judge(jobs)
        assert isinstance(judged, Judged)
        assert judged.num_accepted == 1
        assert isinstance(refused, Refusal)
        assert refused.code == "refused"
    assert torch.isfinite(sound._prompt_logits).all()  # type: ignore[arg-type]
