"""The HTTP side: a WebSocket for each session, health, metrics, and what is served."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ugsd_fast import __version__
from ugsd_fast.serving import protocol
from ugsd_fast.serving.limits import Rate
from ugsd_fast.serving.security import Tokens
from ugsd_fast.serving.sessions import Connection, Hub

_EXPIRE_EVERY = 5.0  # seconds


def create_app(hub: Hub, tokens: Tokens | None = None, *, tokenizer: bytes | None = None) -> FastAPI:
    """The application around a `Hub`, whose backend it closes when it ends.

    Parameters
    ----------
    hub : Hub
        The sessions.
    tokens : Tokens, optional
        Who may connect; everybody, if not given.
    tokenizer : bytes, optional
        ``tokenizer.json`` of the verifier, for devices that need it.
    """
    tokens = tokens or Tokens()
    limits, metrics = hub.limits, hub.metrics
    strangers = Rate(limits.opens_per_second, limits.open_burst)  # by address: those without a token

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def expire() -> None:
            while True:
                await asyncio.sleep(_EXPIRE_EVERY)
                hub.expire()

        task = asyncio.create_task(expire())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.to_thread(hub.backend.close)  # a forward in flight is waited for

    app = FastAPI(
        title="ugsd-fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )

    def bearer(request: Request) -> str:
        name = tokens.bearer(request.headers.get("authorization"))
        if name is None:
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return name

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/metrics")
    async def prometheus(_: str = Depends(bearer)) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(_: str = Depends(bearer)) -> dict[str, Any]:
        model = hub.backend.model
        described = {
            "id": model.name,
            "object": "model",
            "uplinks": model.uplinks,
            "eos": model.eos,
            "vocabulary": model.vocabulary,
            "sampling_rate": model.sampling_rate,
            "max_audio_seconds": model.max_audio_seconds or None,
            "protocol": protocol.SUBPROTOCOL,
        }
        return {"object": "list", "data": [described]}

    @app.get("/v1/tokenizer")
    async def serve_tokenizer(_: str = Depends(bearer)) -> Response:
        if tokenizer is None:
            raise HTTPException(404, "the verifier has no tokenizer")
        return Response(tokenizer, media_type="application/json")

    @app.websocket("/v1/session")
    async def session(socket: WebSocket) -> None:
        address = socket.client.host if socket.client else ""
        owner = tokens.bearer(socket.headers.get("authorization"))
        wait = hub.opens.take(("connection", owner)) if owner is not None else strangers.take(address)
        if wait:
            await _deny(socket, 429, "too many connections a second", wait)
        elif owner is None:
            await _deny(socket, 401, "a valid bearer token is needed")
        elif protocol.SUBPROTOCOL not in socket.scope.get("subprotocols", []):
            await _deny(socket, 400, f"the subprotocol {protocol.SUBPROTOCOL} is needed")
        elif connections() >= 2 * limits.max_sessions:
            await _deny(socket, 503, "all connections are taken", limits.retry_after)
        else:
            await _converse(socket, owner)

    open_connections: set[WebSocket] = set()

    def connections() -> int:
        return len(open_connections)

    async def _deny(socket: WebSocket, status: int, why: str, retry_after: float = 0.0) -> None:
        metrics.denied.labels(str(status)).inc()
        headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after else {}
        await socket.send_denial_response(JSONResponse({"detail": why}, status, headers))

    async def _converse(socket: WebSocket, owner: str) -> None:
        open_connections.add(socket)
        metrics.connections.set(len(open_connections))
        connection = Connection(hub, owner, socket.send_bytes)
        try:
            await socket.accept(subprotocol=protocol.SUBPROTOCOL)
            await connection.greet()
            while await connection.receive(await socket.receive_bytes()):
                pass
            await socket.close(1008)
        except (WebSocketDisconnect, RuntimeError, KeyError):  # gone while it was written to, or sent text
            pass
        finally:
            await connection.ended()
            open_connections.discard(socket)
            metrics.connections.set(len(open_connections))

    return app
