"""Sessions and the frames that drive them, over whatever carries frames.

Every `Verify` and `Generate` has a number. A number is used once: the same frame again gets the same reply, another
frame under it is an error, and so is a number that leaves one out. The state that a frame works on is in the frame
(``base`` tokens that both sides know, and what is committed behind them), so a reply that was lost on its way leaves
nothing to repair.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ugsd_fast.serving import protocol
from ugsd_fast.serving.limits import Limits, Rate
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.protocol import Close, Error, Generate, Open, Opened, Resume, Token, Verdict, Verify, Welcome

_log = logging.getLogger(__name__)

REPLIES_KEPT = 8
_NUMBERS = 1 << 53


class Refusal(Exception):
    """A frame that is answered by an `Error`; `fatal` ends the connection."""

    def __init__(
        self,
        code: protocol.ErrorCode,
        message: str,
        *,
        expected: int = -1,
        retry_after: float = 0.0,
        fatal: bool = False,
    ):
        super().__init__(message)
        self.code = code
        self.expected = expected
        self.retry_after = retry_after
        self.fatal = fatal


@dataclass(frozen=True)
class Call:
    """What a verifier is to judge: `draft` behind the caption `final`."""

    final: Sequence[int]
    draft: Sequence[int]
    bonus: bool
    draw: int
    top_k: int = 0
    logits: bytes = b""


@dataclass(frozen=True)
class Judged:
    """Its judgement; see `protocol.Verdict`."""

    num_accepted: int
    next_token: int
    top: list[list[tuple[int, float]]] = field(default_factory=list)


class Backend(Protocol):
    """Who judges: a model behind a scheduler."""

    @property
    def model(self) -> protocol.Model:
        """What clients are told of it."""

    async def prepare(self, request: Open) -> Any:
        """The state of a new session; raises `Refusal`."""

    async def judge(self, state: Any, call: Call) -> Judged:
        """Judge a block; raises `Refusal`. The state has no memory that a later call could disagree with."""

    def release(self, state: Any) -> None:
        """Free a session's state."""

    def close(self) -> None:
        """End them all; whoever waits is refused. What is asked for later is, too."""


@dataclass
class _Reply:
    digest: bytes
    frames: list[bytes] = field(default_factory=list)
    complete: bool = False


class Session:
    """One captioning session of one client."""

    def __init__(self, owner: str, state: Any):
        self.id = secrets.token_bytes(16)
        self.owner = owner
        self.state = state
        self.tokens: list[int] = []  # of the caption, as far as the last frame told
        self.next_seq = 0
        self.lock = asyncio.Lock()
        self.connection: Connection | None = None
        self.last_used = time.monotonic()
        self._replies: OrderedDict[int, _Reply] = OrderedDict()

    def reply(self, seq: int, abandoned: int, digest: bytes) -> _Reply | None:
        """The reply to a frame that was here before, None for the next one.

        Raises
        ------
        Refusal
            If the number is not the next, nor that of the same frame.
        """
        self.last_used = time.monotonic()
        known = self._replies.get(seq)
        if known is not None and known.digest == digest:
            return known
        if seq < self.next_seq:
            why = "was a different frame" if known else f"is not kept any more ({REPLIES_KEPT} replies are)"
            raise Refusal("stale", f"frame {seq} {why}, expected number {self.next_seq}", expected=self.next_seq)
        if seq - abandoned > self.next_seq:
            raise Refusal(
                "gap",
                f"frames {self.next_seq} to {seq - abandoned - 1} are missing before frame {seq}, expected number "
                f"{self.next_seq}",
                expected=self.next_seq,
            )
        return None

    def remember(self, seq: int, reply: _Reply) -> None:
        """Count a frame as used, and keep its reply."""
        self.next_seq = max(self.next_seq, seq + 1)
        self._replies[seq] = reply
        while len(self._replies) > REPLIES_KEPT:
            self._replies.popitem(last=False)


class Hub:
    """All sessions of a server.

    Parameters
    ----------
    backend : Backend
        Who judges.
    limits : Limits, optional
        What is taken on.
    """

    def __init__(self, backend: Backend, limits: Limits | None = None, metrics: Metrics | None = None):
        self.backend = backend
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.sessions: dict[bytes, Session] = {}
        self._opening: dict[str, int] = {}
        self.opens = Rate(self.limits.opens_per_second, self.limits.open_burst)
        self._frames = Rate(self.limits.frames_per_second, self.limits.frame_burst)
        minute = self.limits.audio_seconds_per_minute
        self._audio = Rate(minute / 60, max(minute, self.limits.max_audio_seconds))

    async def open(self, owner: str, request: Open) -> Session:
        """A new session; raises `Refusal`."""
        self.expire()
        self._check_open(request)
        self._admit(owner, request)
        self._opening[owner] = self._opening.get(owner, 0) + 1
        try:
            state = await self.backend.prepare(request)
        finally:
            self._opening[owner] -= 1
            if not self._opening[owner]:
                del self._opening[owner]
        session = Session(owner, state)
        self.sessions[session.id] = session
        self.metrics.sessions.set(len(self.sessions))
        return session

    def resume(self, owner: str, request: Resume) -> Session:
        """A session that is still here; raises `Refusal`."""
        self.expire()
        session = self.sessions.get(request.session)
        if session is None or session.owner != owner:
            raise Refusal("unknown_session", "no such session here, expected an open one")
        self.metrics.resumes.inc()
        return session

    def close(self, session: Session) -> None:
        """End a session."""
        if self.sessions.pop(session.id, None) is not None:
            self.backend.release(session.state)
            self.metrics.sessions.set(len(self.sessions))

    def expire(self) -> None:
        """End the sessions that nobody came back to."""
        oldest = time.monotonic() - self.limits.resume_seconds
        for session in list(self.sessions.values()):
            if session.connection is None and session.last_used < oldest and not session.lock.locked():
                self.close(session)

    def take_frame(self, owner: str) -> None:
        """Count a frame against its owner's rate."""
        wait = self._frames.take(owner)
        if wait:
            raise Refusal("busy", "too many frames a second", retry_after=wait)

    def _admit(self, owner: str, request: Open) -> None:
        limits = self.limits
        own = sum(session.owner == owner for session in self.sessions.values()) + self._opening.get(owner, 0)
        if own >= limits.max_sessions_per_token:
            raise Refusal("busy", f"{own} sessions of this token are open", retry_after=limits.retry_after)
        if len(self.sessions) + sum(self._opening.values()) >= limits.max_sessions:
            raise Refusal("busy", "all sessions are taken", retry_after=limits.retry_after)
        wait = self.opens.take(("session", owner))
        if not wait and request.uplink != "none":
            wait = self._audio.take(owner, request.samples / self.backend.model.sampling_rate)
        if wait:
            raise Refusal("busy", "the token's rate of sessions or audio is used up", retry_after=wait)

    def _check_open(self, request: Open) -> None:
        model, limits = self.backend.model, self.limits
        if request.version != protocol.VERSION:
            message = f"protocol version {request.version}, expected {protocol.VERSION}"
            raise Refusal("version", message, fatal=True)
        if request.uplink not in model.uplinks:
            raise Refusal("refused", f"uplink level {request.uplink}, expected one of {', '.join(model.uplinks)}")
        carried = {"none": None, "audio": request.flac}.get(request.uplink, request.matrix)
        sent = [part for part in (request.matrix, request.flac) if part is not None]
        if sent != ([] if request.uplink == "none" else [carried]):
            raise Refusal("bad_frame", f"the payload is not that of uplink level {request.uplink}")
        if len(request.prompt or "") > limits.max_prompt_chars:
            message = f"a prompt of {len(request.prompt or '')} characters, expected at most {limits.max_prompt_chars}"
            raise Refusal("refused", message)
        longest = min(model.max_audio_seconds or limits.max_audio_seconds, limits.max_audio_seconds)
        if request.uplink != "none" and not 0 < request.samples <= longest * model.sampling_rate:
            message = (
                f"audio of {request.samples / model.sampling_rate:g} s, expected more than 0 and at most {longest:g}"
            )
            raise Refusal("refused", message)


class Connection:
    """One connection: decodes its frames, keeps to one session, replies through `send`.

    Parameters
    ----------
    hub : Hub
        All sessions.
    owner : str
        Who is connected.
    send : callable
        Sends a frame's bytes.
    """

    def __init__(self, hub: Hub, owner: str, send: Callable[[bytes], Awaitable[None]]):
        self._hub = hub
        self._owner = owner
        self._send = send
        self._session: Session | None = None
        self._generation: asyncio.Task[None] | None = None
        self.superseded = False

    async def greet(self) -> None:
        """Send the first frame."""
        await self._send(protocol.encode(Welcome(protocol.VERSION, self._hub.backend.model)))

    async def receive(self, data: bytes) -> bool:
        """Handle a frame; False where the connection has to end."""
        await self._stop_generating()
        seq = -1
        try:
            largest = self._hub.limits.max_verify_bytes if self._session else self._hub.limits.max_open_bytes
            if len(data) > largest:
                raise Refusal("refused", f"a frame of {len(data)} bytes, expected at most {largest}", fatal=True)
            try:
                frame = protocol.decode_client(data)
            except protocol.BadFrame as error:
                raise Refusal("bad_frame", str(error), fatal=True) from None
            seq = getattr(frame, "seq", -1)
            self._hub.take_frame(self._owner)
            if self.superseded:
                raise Refusal("unknown_session", "the session went on over another connection", fatal=True)
            self._hub.metrics.frames.labels(type(frame).__name__).inc()
            await self._handle(frame, data)
        except Refusal as refusal:
            self._hub.metrics.errors.labels(refusal.code).inc()
            await self._answer(refusal, seq)
            return not refusal.fatal
        return True

    async def ended(self) -> None:
        """The connection is gone; its session waits for another."""
        await self._stop_generating()
        if self._session is not None and self._session.connection is self:
            self._session.connection = None

    async def _handle(self, frame: protocol.FromClient, data: bytes) -> None:
        if isinstance(frame, Verify):
            await self._verify(frame, data)
        elif isinstance(frame, Generate):
            session = self._current()
            reply = self._known_or_checked(session, frame, data)
            self._generation = asyncio.create_task(self._generate(session, frame, reply))
        elif isinstance(frame, Close):
            if self._session is not None:
                self._hub.close(self._session)
                self._session = None
        else:
            if self._session is not None:
                raise Refusal("bad_frame", "the connection has a session, expected one session a connection")
            if isinstance(frame, Open):
                session = await self._hub.open(self._owner, frame)
            else:
                session = self._hub.resume(self._owner, frame)
            self._attach(session)
            await self._send(protocol.encode(Opened(session.id, session.next_seq)))

    def _attach(self, session: Session) -> None:
        if session.connection is not None:
            session.connection.superseded = True
        session.connection = self
        self._session = session

    def _current(self) -> Session:
        if self._session is None or self._session.id not in self._hub.sessions:
            self._session = None
            raise Refusal("unknown_session", "the connection has no session, expected Open or Resume before")
        return self._session

    async def _verify(self, frame: Verify, data: bytes) -> None:
        session = self._current()
        async with session.lock:
            reply = self._known_or_checked(session, frame, data)
            if not reply.complete:
                final = session.tokens[: frame.base] + frame.committed
                call = Call(final, frame.draft, frame.bonus, frame.draw, frame.top_k, frame.logits)
                judged = await self._judge(session, call)
                following = [judged.next_token] if judged.next_token >= 0 else []
                session.tokens = [*final, *frame.draft[: judged.num_accepted], *following]
                verdict = Verdict(frame.seq, judged.num_accepted, judged.next_token, judged.top)
                reply.frames.append(protocol.encode(verdict))
                reply.complete = True
                session.remember(frame.seq, reply)
        for encoded in reply.frames:
            await self._send(encoded)

    async def _generate(self, session: Session, frame: Generate, reply: _Reply) -> None:
        async with session.lock:
            if not reply.frames:
                session.tokens = session.tokens[: frame.base] + frame.committed
                session.remember(frame.seq, reply)
            for encoded in reply.frames:
                await self._send(encoded)
            while not reply.complete:
                index = len(reply.frames)
                try:
                    judged = await self._judge(session, Call(session.tokens, [], True, frame.draw + index))
                except Refusal as refusal:
                    await self._answer(refusal, frame.seq)
                    return
                session.tokens = [*session.tokens, judged.next_token]
                reply.complete = index + 1 >= frame.count or judged.next_token in frame.eos or judged.next_token < 0
                reply.frames.append(protocol.encode(Token(frame.seq, index, judged.next_token, reply.complete)))
                await self._send(reply.frames[-1])

    async def _judge(self, session: Session, call: Call) -> Judged:
        started = time.monotonic()
        judged = await self._hub.backend.judge(session.state, call)
        self._hub.metrics.verify_seconds.observe(time.monotonic() - started)
        self._hub.metrics.draft_tokens.inc(len(call.draft))
        self._hub.metrics.accepted_tokens.inc(judged.num_accepted)
        session.last_used = time.monotonic()
        return judged

    def _known_or_checked(self, session: Session, frame: Verify | Generate, data: bytes) -> _Reply:
        if not all(0 <= number < _NUMBERS for number in (frame.seq, frame.abandoned, frame.draw)):
            raise Refusal("bad_frame", "a number is negative or too large")
        digest = hashlib.blake2b(data, digest_size=16).digest()
        known = session.reply(frame.seq, frame.abandoned, digest)
        if known is not None:
            self._hub.metrics.repeats.inc()
            return known
        limits = self._hub.limits
        draft = frame.draft if isinstance(frame, Verify) else []
        new = len(draft) + (frame.count if isinstance(frame, Generate) else 1)
        if not 0 <= frame.base <= len(session.tokens):
            raise Refusal(
                "bad_frame", f"base is {frame.base}, expected 0 to {len(session.tokens)} (the tokens known here)"
            )
        if len(draft) > limits.max_block:
            raise Refusal("refused", f"a block of {len(draft)} tokens, expected at most {limits.max_block}")
        if new < 1 or frame.base + len(frame.committed) + new > limits.max_tokens:
            raise Refusal("refused", f"{new} more tokens, expected at least 1 and {limits.max_tokens} in all at most")
        if isinstance(frame, Verify) and not 0 <= frame.top_k <= 100:
            raise Refusal("refused", f"top_k is {frame.top_k}, expected 0 to 100")
        if any(not 0 <= token < 1 << 31 for token in (*frame.committed, *draft)):
            raise Refusal("bad_frame", "a token id is negative or of more than 31 bits")
        return _Reply(digest)

    async def _answer(self, refusal: Refusal, seq: int) -> None:
        error = Error(refusal.code, str(refusal), seq, refusal.expected, refusal.retry_after)
        await self._send(protocol.encode(error))

    async def _stop_generating(self) -> None:
        task, self._generation = self._generation, None
        if task is None:
            return
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        except Exception as error:
            _log.debug("generation ended with %s", type(error).__name__)
