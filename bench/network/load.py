"""Many sessions at one server: ``make bench-load`` (five minutes), ``make bench-load SECONDS=20``.

Clients have no drafter: their drafts are the verifier's own captions with errors, so the two cores are the server's but
for the sockets. Every verdict is compared with the verifier's own caption.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ugsd_fast import Decoder, UGSDConfig
from ugsd_fast.audio import load_audio
from ugsd_fast.demo import clips, load_pair
from ugsd_fast.serving import protocol
from ugsd_fast.serving.client import ClientSession, Endpoint, Patience
from ugsd_fast.serving.front_end import encode_flac
from ugsd_fast.serving.link import Connector

RESULTS = Path(__file__).parents[1] / "results" / "load.json"
PORT, BLOCK = 8766, 5
ERRORS = 0.15  # of the draft tokens


class Script:
    """A clip's opening frame and the verifier's caption of it."""

    def __init__(self, opening: protocol.Open, caption: list[int]):
        self.opening, self.caption = opening, caption


def scripts(count: int) -> list[Script]:
    """Made by the embedded verifier in this process."""
    pair = load_pair(threads=1)
    config = UGSDConfig(rule="greedy", always_escalate=True)
    made = []
    for clip in clips()[:count]:
        audio = load_audio(clip.path, rate=16_000)
        caption = Decoder(None, pair.verifier, config).generate(
            audio, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens
        )
        flac = encode_flac(audio)
        rules = protocol.Rules(rule="greedy")
        opening = protocol.Open(protocol.VERSION, "audio", rules, pair.prompt, len(audio.samples), None, flac)
        made.append(Script(opening, caption.tokens))
    return made


async def caption(endpoint: Endpoint, script: Script, random: Random, waits: list[float]) -> int:
    """One caption, block by block; the tokens it has. Raises where a verdict is not the verifier's own."""

    async def opening(_: protocol.Model) -> protocol.Open:
        return script.opening

    session, tokens = ClientSession(endpoint, opening), 0
    while tokens < len(script.caption):
        right = script.caption[tokens : tokens + BLOCK]
        draft = [token if random.random() > ERRORS else token + 1 for token in right]
        stands = next((index for index, pair in enumerate(zip(draft, right, strict=True)) if pair[0] != pair[1]), BLOCK)
        ends = tokens + min(stands, len(right)) == len(script.caption)
        began = time.perf_counter()
        verdict = await session.verify([], draft, bonus=not ends)
        waits.append(time.perf_counter() - began)
        emitted = [*draft[: verdict.num_accepted], *([verdict.next_token] if verdict.next_token >= 0 else [])]
        if emitted != script.caption[tokens : tokens + len(emitted)] or not emitted:
            raise AssertionError(f"{emitted} behind {tokens} tokens, expected those of {script.caption[tokens:]}")
        tokens += len(emitted)
    await session.close()
    return tokens


async def load(made: Sequence[Script], sessions: int, seconds: float, pid: int) -> dict[str, Any]:
    """`sessions` clients, each captioning clip after clip for so long."""
    endpoint = Endpoint([f"ws://127.0.0.1:{PORT}"], Connector(), Patience(deadline=60, attempt=30))
    await endpoint.greeting()
    waits: list[float] = []
    memory: list[float] = []
    errors: list[str] = []
    done = [0, 0]  # captions, tokens
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        random = Random(number)
        await asyncio.sleep(random.random() * min(0.5, seconds / 4))
        while time.monotonic() < end:
            try:
                done[1] += await caption(endpoint, random.choice(made), random, waits)
                done[0] += 1
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident(pid))
            await asyncio.sleep(min(1.0, seconds / 20))

    before, began, used = counters(), time.monotonic(), processor_seconds(pid)
    await asyncio.gather(watch(), *(client(number) for number in range(sessions)))
    wall, after = time.monotonic() - began, counters()
    forward = after["ugsd_forward_seconds_sum"] - before["ugsd_forward_seconds_sum"]
    forwards = after["ugsd_forward_seconds_count"] - before["ugsd_forward_seconds_count"]
    third = max(len(memory) // 3, 1)
    return {
        "sessions": sessions,
        "seconds": wall,
        "errors": errors[:5],
        "error_count": len(errors),
        "captions": done[0],
        "verdicts": len(waits),
        "verdicts_per_second": len(waits) / wall,
        "tokens_per_second": done[1] / wall,
        "p50_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * float(np.percentile(waits, 99)),
        "forward_ms_per_verdict": 1e3 * forward / len(waits),
        "processor_ms_per_verdict": 1e3 * (processor_seconds(pid) - used) / len(waits),
        "sessions_per_forward": len(waits) / forwards,
        "memory_mb": {"first_third": max(memory[:third]), "last_third": max(memory[-third:]), "most": max(memory)},
    }


def counters() -> dict[str, float]:
    """The server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def resident(pid: int) -> float:
    """Memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| sessions | seconds | verdicts/s | tokens/s | p50 | p99 | forward a verdict | processor a verdict | "
        "sessions a forward | memory, first and last third | errors |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        memory = row["memory_mb"]
        lines.append(
            f"| {row['sessions']} | {row['seconds']:.0f} | {row['verdicts_per_second']:.0f} | "
            f"{row['tokens_per_second']:.0f} | {row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms | "
            f"{row['forward_ms_per_verdict']:.2f} ms | {row['processor_ms_per_verdict']:.2f} ms | "
            f"{row['sessions_per_forward']:.1f} | {memory['first_third']:.0f}, {memory['last_third']:.0f} MB | "
            f"{row['error_count']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure 1 to 64 sessions briefly, then 64 for long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the long run with 64 sessions")
    parser.add_argument("--each", type=float, default=10.0, help="of the short runs")
    arguments = parser.parse_args()
    made = scripts(12)
    command = [sys.executable, "-m", "bench.network.cloud", "--port", str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            asyncio.run(load(made, 8, 3.0, server.pid))  # warm
            sweep = [asyncio.run(load(made, n, arguments.each, server.pid)) for n in (1, 2, 4, 8, 16, 32, 64)]
            print(table(sweep), flush=True)
            long = asyncio.run(load(made, 64, arguments.seconds, server.pid))
        finally:
            server.kill()
    print("\n" + table([long]))
    print(f"\n64 sessions: {long['verdicts_per_second'] / sweep[0]['verdicts_per_second']:.2f} times the rate of one")
    RESULTS.write_text(json.dumps({"sweep": sweep, "long": long}, indent=1) + "\n")


if __name__ == "__main__":
    main()
