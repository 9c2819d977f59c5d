"""Running a server: uvicorn around the application, in this thread or in one of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ugsd_fast.models import AudioLM
from ugsd_fast.serving.app import create_app
from ugsd_fast.serving.engine import ModelBackend
from ugsd_fast.serving.limits import Limits
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.protocol import Uplink
from ugsd_fast.serving.security import TLS, Tokens, check_binding
from ugsd_fast.serving.sessions import Hub


class Server:
    """A verifier behind a port.

    Parameters
    ----------
    hub : Hub
        The sessions.
    host, port : str, int
        Where to listen; port 0 takes a free one.
    tokens : Tokens, optional
        Who may connect.
    tls : TLS, optional
        Certificate and key.
    tokenizer : bytes, optional
        ``tokenizer.json`` of the verifier.

    Raises
    ------
    UnsafeServer
        If `host` can be reached by others and TLS or tokens are missing.
    OSError
        If the port is taken.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        tokens: Tokens | None = None,
        tls: TLS | None = None,
        tokenizer: bytes | None = None,
    ):
        tokens = tokens or Tokens()
        check_binding(host, tls=tls, tokens=tokens)
        self.hub = hub
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host.strip("[]"), port))
        self._socket.listen(512)
        self.port = int(self._socket.getsockname()[1])
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        self.url = f"{'wss' if tls else 'ws'}://{shown}:{self.port}"
        settings: dict[str, Any] = tls.settings() if tls else {}
        config = uvicorn.Config(
            create_app(hub, tokens, tokenizer=tokenizer),
            ws="websockets-sansio",
            ws_max_size=hub.limits.max_open_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=20.0,
            timeout_graceful_shutdown=1,
            log_level="warning",  # never "debug": it would print frames
            access_log=False,
            lifespan="on",
            **settings,
        )
        self._uvicorn = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until interrupted."""
        self._uvicorn.run(sockets=[self._socket])

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Serve in a thread of its own."""
        thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not self._uvicorn.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("serve: the server did not start")
            time.sleep(0.005)
        try:
            yield self
        finally:
            self.stop()
            thread.join(10)

    def stop(self) -> None:
        """End the server; its connections are closed."""
        self._uvicorn.should_exit = True


def serve_model(
    model: AudioLM, *, name: str, uplinks: list[Uplink] | None = None, limits: Limits | None = None, **settings: Any
) -> Server:
    """A server for a model, ready to `Server.run`; `settings` are those of `Server`.

    Examples
    --------
    >>> from ugsd_fast import Decoder, RemoteVerifier
    >>> from ugsd_fast.demo import clips, load_pair
    >>> pair = load_pair()
    >>> with serve_model(pair.verifier.model, name="embedded", port=0).running() as server:
    ...     with RemoteVerifier(server.url) as verifier:
    ...         result = Decoder(pair.draft, verifier, pair.config).generate(clips()[0].path, prompt=pair.prompt)
    >>> result.metrics.audio_bytes > 0
    True
    """
    metrics = Metrics()
    backend = ModelBackend(model, name=name, uplinks=uplinks, limits=limits, metrics=metrics)
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    tokenizer = fast.to_str().encode() if fast is not None else None
    return Server(Hub(backend, backend.limits, metrics), tokenizer=tokenizer, **settings)
