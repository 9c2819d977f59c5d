"""The device's side of a session: what is sent again, resumed, opened anew and replayed until a verdict is there."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ugsd_fast.errors import VerifierRefused, VerifierUnavailable, VocabularyMismatchError
from ugsd_fast.serving import protocol
from ugsd_fast.serving.link import Busy, Link, LinkLost
from ugsd_fast.serving.protocol import (
    Close,
    Error,
    Generate,
    Model,
    Open,
    Opened,
    Resume,
    Token,
    Verdict,
    Verify,
    Welcome,
)

Reply = TypeVar("Reply")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a device tries; all in seconds.

    Parameters
    ----------
    deadline : float
        For a block, everything included; then the verifier counts as failed.
    attempt : float
        For one try to be answered, before another is made over a new connection.
    first_delay, longest_delay : float
        Between tries: doubled each time, less up to a half by chance.
    failures, pause : int, float
        Circuit breaker: after so many blocks without a verdict, none is tried for so long; then one is.
    """

    deadline: float = 10.0
    attempt: float = 3.0
    first_delay: float = 0.05
    longest_delay: float = 2.0
    failures: int = 3
    pause: float = 5.0


class Breaker:
    """Stops asking a verifier that has failed several times, and asks once after a pause.

    Examples
    --------
    >>> now = [0.0]
    >>> breaker = Breaker(2, 5.0, clock=lambda: now[0])
    >>> breaker.failed(); breaker.failed(); breaker.allows()
    False
    >>> now[0] = 5.0
    >>> breaker.allows(), breaker.allows()  # one trial
    (True, False)
    >>> breaker.succeeded(); breaker.allows()
    True
    """

    def __init__(self, failures: int, pause: float, *, clock: Callable[[], float] = time.monotonic):
        self._limit, self._pause, self._clock = failures, pause, clock
        self._failures = 0
        self._closed_at = 0.0

    def allows(self) -> bool:
        """Whether to ask now."""
        if self._failures < self._limit:
            return True
        if self._clock() < self._closed_at:
            return False
        self._closed_at = self._clock() + self._pause
        return True

    @property
    def tripped(self) -> bool:
        """Whether it is in its pause, or a trial is due."""
        return self._failures >= self._limit

    def failed(self) -> None:
        """Count a failure."""
        self._failures += 1
        self._closed_at = self._clock() + self._pause

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0


class Endpoint:
    """The servers of one verifier, and what is known of it.

    Parameters
    ----------
    urls : sequence of str
        Tried in turn.
    connect : callable
        Makes a `Link` to one of them.
    patience : Patience
        How long to try.
    """

    def __init__(self, urls: Sequence[str], connect: Callable[[str], Awaitable[Link]], patience: Patience):
        self._urls = list(urls)
        self._connect = connect
        self.patience = patience
        self.breaker = Breaker(patience.failures, patience.pause)
        self.model: Model | None = None
        self.expected_vocabulary = ""

    @property
    def url(self) -> str:
        """The server that is tried next."""
        return self._urls[0]

    async def connect(self) -> Link:
        """A connection to the first server; where it fails, the next is the first from then on."""
        try:
            return await asyncio.wait_for(self._connect(self._urls[0]), self.patience.attempt)
        except (LinkLost, Busy):
            self._urls.append(self._urls.pop(0))
            raise
        except asyncio.TimeoutError:
            self._urls.append(self._urls.pop(0))
            raise LinkLost("no connection in time") from None

    def met(self, welcome: Welcome) -> Model:
        """Take note of a server's greeting."""
        if welcome.version != protocol.VERSION:
            raise VerifierRefused(
                f"verifier {self.url}: speaks protocol version {welcome.version}, expected {protocol.VERSION}"
            )
        self.model = welcome.model
        self.check_vocabulary()
        return welcome.model

    def check_vocabulary(self) -> None:
        """Refuse a verifier whose token ids mean something else."""
        theirs = self.model.vocabulary if self.model else ""
        if theirs and self.expected_vocabulary and theirs != self.expected_vocabulary:
            raise VocabularyMismatchError(
                f"verifier {self.url}: its text vocabulary {theirs[:12]} is not the drafter's "
                f"{self.expected_vocabulary[:12]}, expected the same token ids"
            )

    async def greeting(self) -> Model:
        """What the verifier is; connects for it where nobody did before."""
        if self.model is None:
            link = await self.connect()
            try:
                data = await asyncio.wait_for(link.recv(), self.patience.attempt)
                frame = protocol.decode_server(data)
            except (asyncio.TimeoutError, protocol.BadFrame) as error:
                raise LinkLost(f"no greeting: {error}") from None
            finally:
                await link.close()
            if not isinstance(frame, Welcome):
                raise LinkLost("no greeting")
            return self.met(frame)
        return self.model


class _Refused(Exception):
    """An error frame."""

    def __init__(self, error: Error):
        super().__init__(error.message)
        self.error = error


class ClientSession:
    """One captioning session, on the loop of its device.

    Parameters
    ----------
    endpoint : Endpoint
        Where the verifier is.
    opening : callable
        Makes the frame that opens the session, given what the verifier is.
    eos : frozenset of int, optional
        Where generation ends; by default where the verifier says.
    ahead : int
        Tokens that a verifier which decodes alone is asked for at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        opening: Callable[[Model], Awaitable[Open]],
        *,
        eos: frozenset[int] | None = None,
        ahead: int = 128,
    ):
        self._endpoint = endpoint
        self._patience = endpoint.patience
        self._opening = opening
        self._eos = eos
        self._ahead = ahead
        self._link: Link | None = None
        self._early: asyncio.Task[Link] | None = None
        self._begun: asyncio.Task[None] | None = None
        self._untouched = True  # nothing was asked for yet
        self._closed = False
        self._id: bytes | None = None
        self._seq = self._abandoned = self._base = 0
        self._known: list[int] = []  # of the caption, as of the last verdict
        self._draws = 0
        self._trouble = "no reply"  # the last
        self._until = 0.0  # of the loop's clock: when a verdict is too late
        self._alone = True  # no draft so far: the verifier writes the caption
        self._stream: Generate | None = None
        self._streamed = 0
        self._stream_link: Link | None = None  # that the stream's frame went over
        self.verdicts = 0
        self.sent: Counter[str] = Counter()  # bytes by kind
        self.received = 0

    def connect_early(self) -> None:
        """Begin to connect; nothing of the request is sent."""
        self._early = asyncio.get_running_loop().create_task(self._endpoint.connect())
        self._early.add_done_callback(lambda task: task.cancelled() or task.exception())

    def begin(self) -> None:
        """Open the session, as a block is going to follow; what goes wrong is for `verify` to find and to mend."""
        if self._untouched and not self._endpoint.breaker.tripped:
            self._begun = asyncio.get_running_loop().create_task(self._attach())
            self._begun.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._untouched = False

    async def verify(
        self, committed: Sequence[int], draft: Sequence[int], *, bonus: bool, top_k: int = 0, logits: bytes = b""
    ) -> Verdict:
        """The verdict on a block; raises `VerifierUnavailable`, and then is as it was before."""
        self._untouched = False
        self._alone = self._alone and not len(draft) and not committed and bonus
        if self._alone:
            return await self._within_deadline(self._next_token())
        return await self._within_deadline(self._verify(committed, draft, bonus, top_k, logits))

    async def close(self) -> None:
        """End the session."""
        self._closed = True
        self._untouched = False
        if self._link is not None:
            with suppress(LinkLost):
                await self._send(Close(), "control")
        await self._drop()

    async def _within_deadline(self, work: Awaitable[Reply]) -> Reply:
        breaker = self._endpoint.breaker
        if not breaker.allows():
            work.close()  # type: ignore[attr-defined]
            raise VerifierUnavailable(f"verifier {self._endpoint.url}: failed before, not asked for now")
        self._until = asyncio.get_running_loop().time() + self._patience.deadline
        try:
            reply = await asyncio.wait_for(work, self._patience.deadline)
        except asyncio.TimeoutError:
            breaker.failed()
            await self._drop()
            self._abandoned += 1
            self._seq += 1
            self._stream = None
            raise VerifierUnavailable(
                f"verifier {self._endpoint.url}: no verdict within {self._patience.deadline:g} s ({self._trouble})"
            ) from None
        breaker.succeeded()
        self.verdicts += 1
        return reply

    async def _verify(
        self, committed: Sequence[int], draft: Sequence[int], bonus: bool, top_k: int, logits: bytes
    ) -> Verdict:
        self._end_stream()

        def frame() -> Verify:
            behind = [*self._known[self._base :], *committed]
            return Verify(
                self._seq, self._base, behind, list(draft), bonus, self._draws, self._abandoned, top_k, logits
            )

        def verdict(reply: Any) -> Verdict | None:
            return reply if isinstance(reply, Verdict) and reply.seq == self._seq else None

        reply = await self._exchange(frame, verdict)
        following = [reply.next_token] if reply.next_token >= 0 else []
        self._known += [*committed, *draft[: reply.num_accepted], *following]
        self._draws += 1
        self._advance()
        return reply

    async def _next_token(self) -> Verdict:
        """The verifier's own next token: it goes on writing before it is asked for the one after."""

        def frame() -> Generate | None:
            if self._stream is None:
                behind = self._known[self._base :]
                eos = sorted(self._eos if self._eos is not None else self._endpoint.model.eos)  # type: ignore[union-attr]
                self._stream = Generate(self._seq, self._base, behind, self._ahead, eos, self._draws, self._abandoned)
                self._streamed = 0
            elif self._stream_link is self._link:
                return None
            self._stream_link = self._link
            return self._stream

        def token(reply: Any) -> Token | None:
            awaited = isinstance(reply, Token) and reply.seq == self._seq and reply.index == self._streamed
            return reply if awaited else None

        reply = await self._exchange(frame, token)
        self._known += [reply.token] if reply.token >= 0 else []
        self._draws += 1
        self._streamed += 1
        if reply.last:
            self._stream = None
            self._advance()
        return Verdict(self._seq, 0, reply.token)

    def _advance(self) -> None:
        self._seq += 1
        self._abandoned = 0
        self._base = len(self._known)

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream = None
            if self._streamed:
                self._advance()  # the server has the frame
            else:
                self._seq += 1
                self._abandoned += 1

    def _forget(self) -> None:
        """The server does not know the session any more: the next connection opens one and replays."""
        self._id = None
        self._seq = self._abandoned = self._base = 0
        self._stream = None

    async def _exchange(self, frame: Callable[[], Any], wanted: Callable[[Any], Reply | None]) -> Reply:
        """Send a frame, over as many connections and sessions as it takes, until the `wanted` reply is there."""
        tries = 0
        while True:
            wait = 0.0
            if self._closed:
                raise VerifierUnavailable(f"verifier {self._endpoint.url}: the session is closed")
            try:
                begun, self._begun = self._begun, None
                if begun is not None:
                    await begun
                elif self._link is None:
                    await self._attach()
                outgoing = frame()
                if outgoing is not None:
                    await self._send(outgoing, "tokens")
                return await asyncio.wait_for(self._reply(wanted), self._patience.attempt)
            except (LinkLost, asyncio.TimeoutError) as error:
                self._trouble = str(error) or "no reply"
                await self._drop()
            except Busy as busy:
                self._trouble = str(busy)
                wait = busy.retry_after
            except _Refused as refused:
                self._trouble = str(refused)
                wait = await self._heed(refused.error)
            if asyncio.get_running_loop().time() >= self._until:
                # Before Python 3.12, an inner wait_for that ends just as it is cancelled loses the cancellation.
                raise asyncio.TimeoutError
            delay = min(self._patience.first_delay * 2 ** min(tries, 30), self._patience.longest_delay)
            tries += 1
            await asyncio.sleep(wait + delay * random.uniform(0.5, 1.0))

    async def _heed(self, error: Error) -> float:
        """Do what an error asks for; the seconds to wait."""
        if error.code in ("refused", "version"):
            await self._drop()
            raise VerifierRefused(f"verifier {self._endpoint.url}: {error.message}")
        self._stream_link = None
        if error.code in ("gap", "stale", "unknown_session"):
            self._forget()
        if error.seq != self._seq or error.code not in ("busy", "failed"):
            await self._drop()
        return error.retry_after

    async def _attach(self) -> None:
        """Connect, and resume the session or open one; what is behind `Open` need not wait for its reply."""
        early, self._early = self._early, None
        try:
            self._link = await (early if early is not None else self._endpoint.connect())
        except asyncio.CancelledError:
            await _abandon(early)
            raise
        if self._id is not None:
            await self._send(Resume(protocol.VERSION, self._id), "control")
            try:
                opened = await asyncio.wait_for(self._reply(_opened), self._patience.attempt)
                if self._seq - self._abandoned <= opened.next_seq <= self._seq + 1:
                    return
            except _Refused as refused:
                if refused.error.code != "unknown_session":
                    raise
            self._forget()
            await self._drop()
            self._link = await self._endpoint.connect()
        if self._endpoint.model is None:
            await asyncio.wait_for(self._reply(_welcome), self._patience.attempt)
        assert self._endpoint.model is not None
        await self._send(await self._opening(self._endpoint.model), "control")

    async def _reply(self, wanted: Callable[[Any], Reply | None]) -> Reply:
        while True:
            assert self._link is not None
            data = await self._link.recv()
            self.received += len(data)
            try:
                frame = protocol.decode_server(data)
            except protocol.BadFrame as error:
                raise LinkLost(str(error)) from None
            if isinstance(frame, Welcome):
                self._endpoint.met(frame)
            elif isinstance(frame, Opened):
                self._id = frame.session
            elif isinstance(frame, Error) and frame.seq in (-1, self._seq):
                raise _Refused(frame)
            reply = wanted(frame)
            if reply is not None:
                return reply

    async def _send(self, frame: Any, kind: str) -> None:
        """Send a frame and enter it into the ledger."""
        assert self._link is not None
        data = protocol.encode(frame)
        counted = 0
        if isinstance(frame, Open):
            payload = len(frame.flac or b"")
            if frame.matrix is not None:
                payload = len(frame.matrix.data) + len(frame.matrix.scales)
            prompt = len((frame.prompt or "").encode())
            self.sent.update({frame.uplink: payload, "prompt": prompt} if payload else {"prompt": prompt})
            counted = payload + prompt
        self.sent[kind] += len(data) - counted
        await self._link.send(data)

    async def _drop(self) -> None:
        self._stream_link = None
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.cancel()
        link, self._link = self._link, None
        early, self._early = self._early, None
        await _abandon(early)
        if link is not None:
            await link.close()


async def _abandon(connecting: asyncio.Task[Link] | None) -> None:
    """Have no use for a connection that is being made, or was."""
    if connecting is None or connecting.cancel() or connecting.cancelled():
        return
    if connecting.exception() is None:
        await connecting.result().close()


def _opened(frame: Any) -> Opened | None:
    return frame if isinstance(frame, Opened) else None


def _welcome(frame: Any) -> Welcome | None:
    return frame if isinstance(frame, Welcome) else None
