"""Lossless decoding over a network that fails in every way: nothing is lost, nothing comes twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.serving.fakes import FAULTS, GREEDY, IMPATIENT, FakeDrafter, Net, block, greedy, next_token
from ugsd_fast.errors import VerifierUnavailable

LENGTH = 24


class FaultSchedule(RuleBasedStateMachine):
    """A device captions at one of two servers while hypothesis plans what goes wrong."""

    @initialize(seed=st.integers(0, 10**6))
    def begin(self, seed: int) -> None:
        self.net = Net(servers=2)
        self.net.random.seed(seed)
        self.verifier = self.net.verifier()
        self.prompt = f"prompt {seed}"
        self.session = self.verifier.open(GREEDY, prompt=self.prompt)
        self.untouched = True
        self.drafter = FakeDrafter(self.prompt, seed=seed)
        self.unseen: list[int] = []

    @rule(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=4))
    def plan(self, faults: list[str]) -> None:
        self.net.faults.extend(faults[: max(0, 6 - len(self.net.faults))])

    @rule(index=st.integers(0, 1))
    def restart(self, index: int) -> None:
        self.on_loop(lambda: self.net.restart(index))

    @rule(index=st.integers(0, 1))
    def kill(self, index: int) -> None:
        self.on_loop(self.net.cut)
        self.net.up[index] = False
        self.net.up[1 - index] = True

    @rule()
    def evict(self) -> None:
        self.on_loop(self.net.evict)

    @rule()
    def cut(self) -> None:
        self.on_loop(self.net.cut)

    @rule()
    def begin_early(self) -> None:
        """It is certain that a block will be escalated; called once, as the decoder does."""
        if self.untouched:
            self.session.begin()
        self.untouched = False

    @rule(length=st.integers(1, 5), bonus=st.booleans(), locally=st.booleans())
    def caption(self, length: int, bonus: bool, locally: bool) -> None:
        """Draft a block and have it judged, or, if all of it is right, keep it without the verifier."""
        if len(self.drafter.tokens) >= LENGTH:
            return
        drafted = self.drafter.draft(length)
        right = self.correct(length)
        if locally and drafted == right:
            self.drafter.tokens += drafted
            self.unseen += drafted
            return
        self.untouched = False
        verdict = None
        while verdict is None:  # on_verifier_failure="wait"
            try:
                verdict = self.session.verify(self.unseen, block(drafted), bonus=bonus)
            except VerifierUnavailable:
                self.net.up[0] = True
                continue
        emitted = drafted[: verdict.num_accepted]
        if verdict.next_token >= 0:
            emitted.append(verdict.next_token)
        assert verdict.next_token >= 0 or verdict.num_accepted == length
        self.drafter.tokens += emitted
        self.unseen = []

    @rule(count=st.integers(1, 4))
    def write_alone(self, count: int) -> None:
        """The verifier writes tokens itself, streamed."""
        self.untouched = False
        for _ in range(count):
            try:
                verdict = self.session.verify(self.unseen, block([]), bonus=True)
            except VerifierUnavailable:
                self.net.up[0] = True
                continue
            self.drafter.tokens.append(verdict.next_token)
            self.unseen = []

    @invariant()
    def nothing_is_lost_or_repeated(self) -> None:
        if hasattr(self, "drafter"):
            tokens = self.drafter.tokens
            assert tokens == greedy(self.prompt, len(tokens))

    def teardown(self) -> None:
        if hasattr(self, "verifier"):
            self.session.close()
            self.verifier.close()

    def correct(self, count: int) -> list[int]:
        tokens = list(self.drafter.tokens)
        for _ in range(count):
            tokens.append(next_token(self.prompt, tokens))
        return tokens[len(self.drafter.tokens) :]

    def on_loop(self, act: object) -> None:
        async def run() -> None:
            act()  # type: ignore[operator]

        self.verifier.run(run()).result()


TestFaultSchedules = FaultSchedule.TestCase
TestFaultSchedules.settings = settings(
    max_examples=500,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_on_a_session_that_begins_early(fault: str, net: Net) -> None:
    right = greedy("p", 9)
    with net.verifier() as verifier:
        net.faults = [fault]
        session = verifier.open(GREEDY, prompt="p")
        session.begin()
        session.begin()
        time.sleep(0.005)
        tokens: list[int] = []
        while len(tokens) < 9:
            block_end = len(tokens) + 2
            verdict = session.verify([], block(right[len(tokens) : block_end]), bonus=True)
            tokens += [*right[len(tokens) : block_end], verdict.next_token]
        assert net.happened == [fault]
        assert tokens == right
        assert session.forwards == 3


def test_what_begins_early_is_opened_once_and_closed(net: Net) -> None:
    """The block waits for a session that is on its way; one that no block comes to does not stay at the server."""
    with net.verifier() as verifier:
        hub = net.hubs[0]
        session = verifier.open(GREEDY, prompt="p")
        session.begin()
        assert session.verify([], block(greedy("p", 2)), bonus=False).num_accepted == 2
        assert hub.metrics.frames.labels("Open")._value.get() == 1
        assert len(net.links) == 1
        session.close()
        idle = verifier.open(GREEDY, prompt="q")
        idle.begin()
        wait_for(lambda: hub.metrics.frames.labels("Open")._value.get() == 2)
        idle.close()
        wait_for(lambda: not hub.sessions)
        assert idle.traffic.ledger["prompt"] == 1
        assert idle.forwards == 0


def test_nothing_begins_where_the_verifier_is_not_asked(net: Net) -> None:
    """A tripped circuit breaker, and a session that was closed: not a byte."""
    with net.verifier(patience=replace(IMPATIENT, failures=1, pause=60.0, deadline=0.05)) as verifier:
        net.up[0] = False
        with pytest.raises(VerifierUnavailable, match="no verdict within"):
            verifier.open(GREEDY, prompt="p").verify([], block([1]), bonus=False)
        net.up[0] = True
        resting, closed = (verifier.open(GREEDY, prompt="p") for _ in range(2))
        resting.begin()
        closed.close()
        closed.begin()
        time.sleep(0.02)
        assert resting.traffic.ledger == closed.traffic.ledger == {}
        assert not net.hubs[0].sessions


def test_a_deadline_that_strikes_as_a_try_fails_still_ends_the_wait(net: Net) -> None:
    """Each try fails at once and the next follows at once, so that deadlines and failures meet."""
    eager = replace(IMPATIENT, failures=10**6, first_delay=0.0, longest_delay=0.0, deadline=0.002)
    with net.verifier(patience=eager) as verifier:
        net.up[0] = False
        session = verifier.open(GREEDY, prompt="p")
        for _ in range(300):
            with pytest.raises(VerifierUnavailable, match="no verdict within"):
                session.submit([], block([1]), bonus=False).result(timeout=20)


def test_a_closed_session_is_not_opened_again_by_what_still_waits(net: Net) -> None:
    with net.verifier(patience=replace(IMPATIENT, failures=10**6, deadline=30.0)) as verifier:
        net.up[0] = False
        session = verifier.open(GREEDY, prompt="p")
        waiting = session.submit([], block([1]), bonus=False)
        session.close()
        with pytest.raises(VerifierUnavailable, match="closed"):
            waiting.result(timeout=20)
        net.up[0] = True
        assert not net.hubs[0].sessions
        assert session.traffic.ledger == {}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(fault: str, net: Net) -> None:
    with net.verifier() as verifier:
        session = verifier.open(GREEDY, prompt="p")
        tokens: list[int] = []
        for step in range(6):
            if step == 2:
                net.faults = [fault]
                if fault in ("refuse", "busy"):
                    verifier._loop.call_soon_threadsafe(net.cut)
            drafted = greedy("p", len(tokens) + 3)[len(tokens) :]
            drafted[-1] = 7
            verdict = session.verify([], block(drafted), bonus=True)
            tokens += [*drafted[: verdict.num_accepted], verdict.next_token]
        assert net.happened == [fault]
        assert tokens == greedy("p", len(tokens))
        assert session.forwards == 6
