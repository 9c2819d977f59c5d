"""What carries frames from a device to a server."""

from __future__ import annotations

import ssl
from typing import Any, Protocol

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websocket_connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from ugsd_fast.errors import VerifierRefused
from ugsd_fast.serving.protocol import SUBPROTOCOL

_LARGEST_FRAME = 1 << 20  # of a server's


class LinkLost(Exception):
    """The connection ended or could not be made."""


class Busy(Exception):
    """The server has no room; ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Link(Protocol):
    """A connection; `send` and `recv` raise `LinkLost`."""

    async def send(self, data: bytes) -> None:
        """Send a frame."""

    async def recv(self) -> bytes:
        """The next frame."""

    async def close(self) -> None:
        """End the connection; never raises."""


class WebSocketLink:
    """A `Link` over WebSocket."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket

    async def send(self, data: bytes) -> None:
        """Send a frame as one binary message."""
        try:
            await self._socket.send(data)
        except (WebSocketException, OSError) as error:
            raise LinkLost(_reason(error)) from None

    async def recv(self) -> bytes:
        """The next binary message."""
        try:
            data = await self._socket.recv()
        except (WebSocketException, OSError) as error:
            raise LinkLost(_reason(error)) from None
        if isinstance(data, str):
            raise LinkLost("the server sent text, expected binary frames")
        return data

    async def close(self) -> None:
        """End the connection without waiting for the server's answer."""
        self._socket.transport.abort()


class Connector:
    """Connects to a server by WebSocket.

    Parameters
    ----------
    token : str, optional
        Bearer token.
    context : ssl.SSLContext, optional
        For ``wss``: other authorities, or a certificate of the device's own.
    """

    def __init__(self, token: str | None = None, context: ssl.SSLContext | None = None):
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._context = context

    async def __call__(self, url: str) -> Link:
        """Connect; raises `LinkLost`, `Busy`, or `VerifierRefused` where trying again is of no use."""
        secure: dict[str, Any] = {"ssl": self._context} if url.startswith("wss:") and self._context is not None else {}
        try:
            socket = await websocket_connect(
                f"{url.rstrip('/')}/v1/session",
                additional_headers=self._headers,
                subprotocols=[websockets.Subprotocol(SUBPROTOCOL)],
                compression=None,
                max_size=_LARGEST_FRAME,
                open_timeout=None,  # the caller's
                close_timeout=1,
                proxy=None,
                **secure,
            )
        except InvalidStatus as error:
            status, headers = error.response.status_code, error.response.headers
            if status in (429, 503):
                raise Busy(f"the server answers {status}", float(headers.get("Retry-After", 1))) from None
            if 400 <= status < 500:
                reason = "the bearer token is not accepted" if status in (401, 403) else f"HTTP status {status}"
                raise VerifierRefused(f"verifier {url}: {reason}") from None
            raise LinkLost(f"HTTP status {status}") from None
        except ssl.SSLCertVerificationError as error:
            raise VerifierRefused(f"verifier {url}: its certificate is not trusted ({error.verify_message})") from None
        except InvalidURI as error:
            raise VerifierRefused(f"verifier {url}: {error}") from None
        except (InvalidHandshake, WebSocketException, OSError, EOFError) as error:
            raise LinkLost(_reason(error)) from None
        return WebSocketLink(socket)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
