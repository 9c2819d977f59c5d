"""The server of the network benchmarks: the embedded pair's verifier, as slow as asked; a JSON line says where it is.

``python -m bench.network.serve SETTINGS``: JSON with ``host``, ``token``, ``cert``, ``key`` and ``pace``, all optional.
Every line on stdin is a new pace; the end of stdin ends it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.network.constants import Pace, paced
from bench.network.link import environment
from ugsd_fast.demo import load_pair
from ugsd_fast.serving import TLS, Limits, Tokens
from ugsd_fast.serving.server import serve_model

UNLIMITED = Limits(
    max_sessions=4096,
    max_sessions_per_token=4096,
    opens_per_second=1e5,
    frames_per_second=1e6,
    frame_burst=1_000_000,
    audio_seconds_per_minute=1e9,
)


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str):
        self._process = process
        self.url = url
        self.pid = process.pid

    def pace(self, pace: Pace) -> None:
        """Have its forwards take so long from now on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(pace)) + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


@contextmanager
def serving(settings: dict[str, Any], prefix: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Run a server; `prefix` comes before the command, such as ``ip netns exec NAME``."""
    command = [*prefix, sys.executable, "-m", "bench.network.serve", json.dumps(settings)]
    with subprocess.Popen(command, env=environment(), stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the server did not start")
            yield ServerProcess(process, json.loads(line)["url"])
        finally:
            process.terminate()


def main() -> None:
    """Run from the command line."""
    settings = json.loads(sys.argv[1])
    tls = TLS(Path(settings["cert"]), Path(settings["key"])) if "cert" in settings else None
    tokens = Tokens({"bench": settings["token"]}) if "token" in settings else None
    model = load_pair(threads=1).verifier.model
    made = serve_model(
        model,
        name="embedded verifier",
        limits=UNLIMITED,
        host=settings.get("host", "127.0.0.1"),
        port=0,
        tokens=tokens,
        tls=tls,
    )
    with made.running() as server, ExitStack() as stack:
        print(json.dumps({"url": server.url}), flush=True)
        for line in sys.stdin:
            stack.close()
            stack.enter_context(paced(model.model, Pace(**json.loads(line))))
            print("set", flush=True)


if __name__ == "__main__":
    main()
