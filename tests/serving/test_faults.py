"""Lossless decoding over a network that fails in every way: nothing is lost, nothing comes twice."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.serving.fakes import FAULTS, GREEDY, FakeDrafter, Net, block, greedy, next_token
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
