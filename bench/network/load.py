"""One server on two cores under load: throughput, latency, memory and cost a verdict with 1, 4, 16 and 64 sessions.

The embedded pair's verifier, as fast as it is, in a process of its own. The devices are light: a drafter decodes each
clip once, and what it sent is played again by one asyncio loop, every verdict compared with the first one. A device
sends its next frame as soon as it has a verdict. A *short* session is one caption of some nine blocks; a *long* one
goes back to its beginning several times, as a caption of as many more blocks would have as many verdicts.

``python -m bench.network.load [--quick] [--seconds N] [--json FILE] [--note TEXT]``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
import websockets
from msgspec.structs import replace

from bench.harness import SCHEMA, Row, machine, now, quantile
from bench.network.serve import ServerProcess, serving
from ugsd_fast import Decoder, RemoteVerifier, UGSDConfig
from ugsd_fast.demo import clips, load_pair
from ugsd_fast.serving import protocol
from ugsd_fast.serving.link import Connector
from ugsd_fast.serving.link import Link as Connection

SHORT, LONG = (1, 64), (1, 4, 16, 64)  # sessions of each stage
ROUNDS = 3  # of the short stages, one after the other
LAPS = 8  # of a long session
THROUGHPUT_TARGET = 3.0  # times one session's
FLAT = 1.1  # most cost a verdict, times one session's
GROWTH = 1.1  # most memory at the end, times that of the last stage's first tenth


class RecordingLink:
    """Keeps what went over a connection."""

    def __init__(self, link: Connection):
        self._link = link
        self.sent: list[bytes] = []
        self.received: list[bytes] = []

    async def send(self, data: bytes) -> None:
        """Send a frame."""
        self.sent.append(data)
        await self._link.send(data)

    async def recv(self) -> bytes:
        """The next frame."""
        self.received.append(await self._link.recv())
        return self.received[-1]

    async def close(self) -> None:
        """End the connection."""
        await self._link.close()


@dataclass(frozen=True)
class Script:
    """A caption's frames: the one that opens its session, and each block with its verdict."""

    opening: bytes
    blocks: Sequence[tuple[protocol.Verify, protocol.Verdict]]


def record(url: str, number: int) -> list[Script]:
    """Decode clips in blocks of five tokens, every one of them verified, and keep the frames."""
    links: list[RecordingLink] = []
    connector = Connector()

    async def connect(url: str) -> Connection:
        links.append(RecordingLink(await connector(url)))
        return links[-1]

    pair = load_pair(threads=1)
    scripts = []
    with RemoteVerifier(url, tokenizer=pair.draft.tokenizer, connect=connect) as verifier:
        decoder = Decoder(pair.draft, verifier, UGSDConfig(rule="greedy", always_escalate=True))
        for clip in clips()[:number]:
            del links[:]
            decoder.generate(clip.path, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens)
            link = links[-1]
            sent = [protocol.decode_client(data) for data in link.sent]
            received = [protocol.decode_server(data) for data in link.received]
            (opening,) = [data for data, frame in zip(link.sent, sent) if isinstance(frame, protocol.Open)]
            asked = [frame for frame in sent if isinstance(frame, protocol.Verify)]
            told = [frame for frame in received if isinstance(frame, protocol.Verdict)]
            scripts.append(Script(opening, list(zip(asked, told, strict=True))))
    return scripts


@dataclass
class Stage:
    """What a number of devices saw."""

    seconds: float = 0.0
    verdicts: list[float] = field(default_factory=list)
    first_verdicts: list[float] = field(default_factory=list)
    sessions: int = 0
    errors: list[str] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)


async def device(url: str, scripts: Sequence[Script], start: int, laps: int, until: float, stage: Stage) -> None:
    """Play one session after the other until it is time."""
    subprotocols = [websockets.Subprotocol(protocol.SUBPROTOCOL)]
    try:
        async with websockets.connect(
            f"{url}/v1/session", subprotocols=subprotocols, compression=None, proxy=None
        ) as socket:
            await socket.recv()
            for index in count(start):
                script = scripts[index % len(scripts)]
                await socket.send(script.opening)
                opened = protocol.decode_server(await socket.recv())  # type: ignore[arg-type]
                if not isinstance(opened, protocol.Opened):
                    raise RuntimeError(f"not opened: {opened}")
                whole = await play(socket, script, laps, until, stage)
                await socket.send(protocol.encode(protocol.Close()))
                if not whole:
                    return
                stage.sessions += 1
    except (websockets.WebSocketException, OSError, RuntimeError) as error:
        stage.errors.append(f"{type(error).__name__}: {error}")


async def play(socket: Any, script: Script, laps: int, until: float, stage: Stage) -> bool:
    """A session's blocks; whether there was time for all."""
    for seq, (block, expected) in enumerate(script.blocks * laps):
        frame = protocol.encode(replace(block, seq=seq))
        started = time.perf_counter()
        await socket.send(frame)
        reply = protocol.decode_server(await socket.recv())
        taken = time.perf_counter() - started
        if reply != replace(expected, seq=seq):
            raise RuntimeError(f"block {seq}: {reply}, expected {expected}")
        (stage.verdicts if seq else stage.first_verdicts).append(taken)
        if time.monotonic() > until:
            return False
    return True


async def run_stage(server: ServerProcess, scripts: Sequence[Script], sessions: int, laps: int, seconds: float) -> Row:
    """So many devices for so long."""
    stage = Stage()

    async def sample() -> None:
        while True:
            stage.rss.append(resident(server.pid))
            await asyncio.sleep(min(1.0, seconds / 10))

    sampler = asyncio.create_task(sample())
    before, own, started = cpu_seconds(server.pid), time.process_time(), time.monotonic()
    batches = [counted(server.url, of) for of in ("sessions", "prompts")]
    until = started + seconds
    await asyncio.gather(*(device(server.url, scripts, index, laps, until, stage) for index in range(sessions)))
    stage.seconds = time.monotonic() - started
    cpu, own = cpu_seconds(server.pid) - before, time.process_time() - own
    sampler.cancel()
    verdicts = len(stage.verdicts) + len(stage.first_verdicts)
    together = {}
    for of, earlier in zip(("sessions", "prompts"), batches, strict=True):
        forwards, members = (now - then for now, then in zip(counted(server.url, of), earlier, strict=True))
        together[of] = members / forwards if forwards else 0.0
    tenth = max(len(stage.rss) // 10, 1)
    return {
        "sessions": sessions,
        "seconds": stage.seconds,
        "errors": stage.errors,
        "verdicts": verdicts,
        "laps": laps,
        "ended": stage.sessions,
        "verdicts_per_second": verdicts / stage.seconds,
        "latency_ms": quantiles(stage.verdicts),
        "first_latency_ms": quantiles(stage.first_verdicts),
        "cpu_ms_per_verdict": 1e3 * cpu / verdicts,
        "cpu_cores": cpu / stage.seconds,
        "device_cores": own / stage.seconds,
        "sessions_per_forward": together["sessions"],
        "prompts_per_forward": together["prompts"],
        "rss_mib": {
            "first_tenth": statistics.mean(stage.rss[:tenth]),
            "middle": statistics.mean(stage.rss[len(stage.rss) // 2 :][:tenth]),
            "last_tenth": statistics.mean(stage.rss[-tenth:]),
            "most": max(stage.rss),
            "curve": [round(value, 1) for value in stage.rss[:: max(len(stage.rss) // 30, 1)]],
        },
    }


def quantiles(seconds: Sequence[float]) -> Row:
    """Milliseconds."""
    return {name: 1e3 * quantile(seconds, q) for name, q in (("p50", 0.5), ("p99", 0.99))} if seconds else {}


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def counted(url: str, of: str) -> tuple[float, float]:
    """Forwards of the server so far, and the sessions whose blocks or prompts were in them."""
    with urllib.request.urlopen(f"http{url.removeprefix('ws')}/metrics") as reply:
        text = reply.read().decode()
    found = {name: float(value) for name, value in re.findall(rf"^ugsd_batch_{of}_(count|sum) (\S+)", text, re.M)}
    return found["count"], found["sum"]


def judged(stages: Sequence[Row]) -> list[Row]:
    """The targets."""
    short = [stage for stage in stages if stage["laps"] == 1]
    long = [stage for stage in stages if stage["laps"] > 1]
    faster = {
        f"verdicts a second of {of[-1]['sessions']} {kind} sessions, times one session's": statistics.median(
            many["verdicts_per_second"] / one["verdicts_per_second"]
            for one, many in zip(of[:: len(stages)], of[len(stages) - 1 :: len(stages)], strict=True)
        )
        for kind, of, stages in (("long", long, LONG), ("short", short, SHORT))
    }
    cost = max(stage["cpu_ms_per_verdict"] for stage in long) / long[0]["cpu_ms_per_verdict"]
    memory = long[-1]["rss_mib"]
    return [
        {"of": "errors", "at_most": 0, "measured": sum(len(stage["errors"]) for stage in stages)},
        *({"of": of, "at_least": THROUGHPUT_TARGET, "measured": measured} for of, measured in faster.items()),
        {"of": "most CPU time a verdict in long sessions, times one session's", "at_most": FLAT, "measured": cost},
        {
            "of": "memory at the end of the last stage, times that at its start",
            "at_most": GROWTH,
            "measured": memory["last_tenth"] / memory["first_tenth"],
        },
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.network.load", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a second a stage: whether it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="N", help="of the last stage")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--note", default="", help="on how it was run, for the document")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    last, other, warm = (0.5, 0.3, 0.1) if options.quick else (options.seconds, 10.0, 3.0)
    plan = [(sessions, 1, other) for _ in range(ROUNDS) for sessions in SHORT]
    plan += [(sessions, LAPS, other) for sessions in LONG]
    plan[-1] = (LONG[-1], LAPS, last)
    rows = []
    with serving({}) as server:
        scripts = record(server.url, 2 if options.quick else 16)
        asyncio.run(run_stage(server, scripts, LONG[-1], 1, warm))
        for sessions, laps, seconds in plan:
            rows.append(asyncio.run(run_stage(server, scripts, sessions, laps, seconds)))
            shown = {name: value for name, value in rows[-1].items() if name not in ("errors", "rss_mib")}
            memory = {name: value for name, value in rows[-1]["rss_mib"].items() if name != "curve"}
            print(shown, memory, rows[-1]["errors"][:3], flush=True)
    report: Row = {"schema": SCHEMA, "date": now(), "machine": machine(), "quick": options.quick, "stages": rows}
    report["note"] = options.note
    report["blocks_per_caption"] = statistics.mean(len(script.blocks) for script in scripts)
    report["targets"] = judged(rows)
    for target in report["targets"]:
        target["met"] = (
            target["measured"] >= target["at_least"]
            if "at_least" in target
            else target["measured"] <= target["at_most"]
        )
        print(target)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
