"""The server's process: the embedded verifier, slowed."""

from __future__ import annotations

import argparse

import torch

from bench.network.speeds import SPEEDS, slowed
from ugsd_fast import AudioLM
from ugsd_fast.demo import PAIR_FOLDER
from ugsd_fast.serving import Limits
from ugsd_fast.serving.engine import BatchJudge, ServedSession
from ugsd_fast.serving.server import Server, serve_model

# A load test of one token is no attack.
UNLIMITED = {"opens_per_second": 1e6, "open_burst": 10**6, "frames_per_second": 1e6, "frame_burst": 10**6,
             "audio_seconds_per_minute": 1e9}  # fmt: skip


def make(port: int, *, host: str = "127.0.0.1", **limits: float) -> Server:
    """A server of the embedded verifier with both levels of audio."""
    torch.set_num_threads(1)
    model = AudioLM.from_pretrained(PAIR_FOLDER / "verifier", device="cpu")
    chosen = Limits(**{**UNLIMITED, **limits})  # type: ignore[arg-type]
    return serve_model(model, name="embedded-verifier", limits=chosen, host=host, port=port)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--speeds", choices=SPEEDS)
    parser.add_argument("--max-wait", type=float, default=0.002)
    arguments = parser.parse_args()
    if arguments.speeds:
        speeds = SPEEDS[arguments.speeds]
        BatchJudge.judge = slowed(BatchJudge.judge, speeds.verify_forward)  # type: ignore[method-assign]
        ServedSession.advance = slowed(ServedSession.advance, speeds.verify_prompt)  # type: ignore[method-assign]
    from ugsd_fast.serving import server as serving

    # The namespace is this benchmark's own: nobody else is on its network.
    serving.check_binding = lambda host, tls, tokens: None  # type: ignore[assignment]
    server = make(arguments.port, host=arguments.host, max_wait=arguments.max_wait)
    print("ready", flush=True)
    server.run()


if __name__ == "__main__":
    main()
