"""Captions over a shaped link: the edge alone, the cloud alone, fixed blocks, UGSD, and UGSD drafting ahead.

The embedded pair decodes its demo clips, the drafter as slow as a 3B on an edge device, the verifier as slow as a 30B
on a server (`bench.network.constants`). Server and device are in network namespaces of their own; all methods take
turns on every clip, over a TLS connection that is open before the clip comes.

``python -m bench.network.latency [--quick] [--json FILE]``; needs root, ``--quick`` (loopback, no delays) does not.
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
import transformers

from bench.harness import SCHEMA, Row, machine, now, spread
from bench.network import constants
from bench.network.constants import Pace, paced
from bench.network.link import ADDRESSES, CLOUD, DEVICE, Conditions, Link, enter, linked, netem
from bench.network.serve import ServerProcess, serving
from ugsd_fast import Decoder, LocalVerifier, RemoteVerifier, UGSDConfig
from ugsd_fast.decoding.trace import BlockRecord
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.serving.client import Patience
from ugsd_fast.serving.link import Connector
from ugsd_fast.serving.link import Link as Connection

EDGE, CLOUD_ONLY, FIXED, FIXED_AHEAD = "edge only", "cloud only", "fixed blocks", "fixed blocks + ahead"
UGSD, AHEAD = "UGSD", "UGSD + ahead"
STRONG = "30B on the device"
MAX_AHEAD, BRANCHES = 15, 8
BASE = Conditions(rtt=50, loss=0, rate=10)
GRID = [
    *(replace(BASE, rtt=rtt) for rtt in (20.0, 50.0, 100.0, 200.0)),
    *(replace(BASE, loss=loss) for loss in (1.0, 3.0)),
    *(replace(BASE, rate=rate) for rate in (1.0, 20.0)),
]
TARGETS = {FIXED: 1.4, CLOUD_ONLY: 1.4}
STRONG_TARGET, UPLINK_TARGET = 8.5, 0.2


class OpenConnection:
    """A `Connector` that has a connection ready when it is asked for one: that of a device that keeps it open."""

    def __init__(self, connector: Connector):
        self._connector = connector
        self._ready: Connection | None = None

    async def prepare(self, url: str) -> None:
        """Connect for the next session."""
        if self._ready is None:
            self._ready = await self._connector(url)

    async def __call__(self, url: str) -> Connection:
        """The connection."""
        ready, self._ready = self._ready, None
        return ready if ready is not None else await self._connector(url)


@dataclass
class Bench:
    """The pair, the server and the ways to decode over the link between them."""

    pair: EmbeddedPair
    verifier: RemoteVerifier
    connections: OpenConnection
    server: ServerProcess
    url: str
    heard: Sequence[Path]

    def decoders(self) -> dict[str, Decoder]:
        """The methods."""
        draft, remote = self.pair.draft, self.verifier
        greedy = UGSDConfig(rule="greedy", block_size=5, always_escalate=True)
        gated = replace(self.pair.config, adaptive="entropy", max_block=5)  # ends at the first uncertain token
        return {
            EDGE: Decoder(draft, None, gated),
            CLOUD_ONLY: Decoder(None, remote, greedy),
            FIXED: Decoder(draft, remote, greedy),
            FIXED_AHEAD: Decoder(draft, remote, replace(greedy, ahead=MAX_AHEAD)),
            UGSD: Decoder(draft, remote, gated),
            AHEAD: Decoder(draft, remote, replace(gated, ahead=MAX_AHEAD, branches=BRANCHES)),
        }

    def caption(self, decoder: Decoder, clip: Path, *, cold: bool = False) -> Row:
        """One clip by one method; seconds, tokens and bytes."""
        if decoder.verifier is self.verifier and not cold:
            self.verifier.run(self.connections.prepare(self.url)).result()
        result = decoder.generate(clip, prompt=self.pair.prompt, max_new_tokens=self.pair.max_new_tokens)
        metrics, blocks = result.metrics, result.trace.blocks
        if not all(block.verified for block in blocks):
            raise RuntimeError(f"{clip.name}: a block was not verified in time")
        return {
            "latency": metrics.latency,
            "first": metrics.time_to_first_token,
            "tokens": len(result.tokens),
            "ids": result.tokens,
            "escalated": metrics.escalated_share,
            "acceptance": metrics.acceptance_rate,
            "verdicts": sum(block.escalated for block in blocks),
            "wasted": metrics.wasted_drafts,
            "carried": carried(blocks) / len(result.tokens),
            "uplink_bytes": metrics.uplink_bytes,
            "audio_bytes": metrics.audio_bytes,
            "downlink_bytes": metrics.downlink_bytes,
        }

    def measure(self, device: Pace, server: Pace, *, cold: bool = False) -> dict[str, Row]:
        """All methods in turns on every clip."""
        self.server.pace(server)
        decoders = self.decoders()
        rows: dict[str, list[Row]] = {name: [] for name in decoders}
        with paced(self.pair.draft.model, device):
            for shift, clip in enumerate(self.heard):
                names = list(decoders)
                for name in names[shift:] + names[:shift]:
                    rows[name].append(self.caption(decoders[name], clip, cold=cold))
        return {name: summary(samples, rows) for name, samples in rows.items()}


def carried(blocks: Sequence[BlockRecord]) -> int:
    """Token ids that went up: of escalated blocks, and what the verifier had to be told of the others."""
    total = unseen = 0
    for block in blocks:
        if block.escalated:
            total, unseen = total + unseen + len(block.draft_tokens), 0
        else:
            unseen += len(block.emitted)
    return total


def summary(samples: Sequence[Row], rows: dict[str, list[Row]]) -> Row:
    """What one method took; ratios to it are of the same clip in the same round."""
    latency = [row["latency"] for row in samples]
    agreeing = [row["ids"] == other["ids"] for row, other in zip(samples, rows[CLOUD_ONLY], strict=True)]
    means = (
        "tokens",
        "escalated",
        "acceptance",
        "verdicts",
        "wasted",
        "carried",
        "uplink_bytes",
        "audio_bytes",
        "downlink_bytes",
    )
    ahead = rows[AHEAD]
    speed = [row["tokens"] / row["latency"] for row in samples]
    ours = [row["tokens"] / row["latency"] for row in ahead]
    return {
        "latency": spread(latency),
        "first": spread([row["first"] for row in samples]),
        "tokens_per_second": spread(speed),
        "ahead_faster": spread([mine / theirs for mine, theirs in zip(ours, speed, strict=True)]),
        "ahead_latency": spread([theirs["latency"] / mine["latency"] for mine, theirs in zip(ahead, samples)]),
        "same_as_cloud": statistics.mean(agreeing),
        **{name: statistics.mean(row[name] for row in samples) for name in means},
    }


def strong_edge(pair: EmbeddedPair, clip: Path) -> Row:
    """The 30B on the device alone, on one clip: it is slow."""
    pace = constants.strong_on_device()
    assert isinstance(pair.verifier, LocalVerifier)
    with paced(pair.verifier.model.model, pace):
        decoder = Decoder(None, pair.verifier, UGSDConfig(rule="greedy"))
        result = decoder.generate(clip, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens)
    metrics = result.metrics
    return {"latency": metrics.latency, "tokens": len(result.tokens), "tokens_per_second": metrics.tokens_per_second}


def judged(report: Row) -> list[Row]:
    """The targets at 50 ms, for the device and the server that the conditions were swept with."""
    (base,) = [row for row in report["sweep"] if row["conditions"] == asdict(BASE)]
    methods = base["methods"]
    found = [
        {
            "of": f"tokens/s of {AHEAD} over {name}",
            "at_least": least,
            "measured": methods[name]["ahead_faster"]["median"],
        }
        for name, least in TARGETS.items()
    ]
    if "strong_edge" in report:
        faster = methods[AHEAD]["tokens_per_second"]["median"] / report["strong_edge"]["tokens_per_second"]
        found.append({"of": f"tokens/s of {AHEAD} over {STRONG}", "at_least": STRONG_TARGET, "measured": faster})
    found.append(
        {"of": f"tokens sent up by {AHEAD}", "at_most": UPLINK_TARGET, "measured": methods[AHEAD]["escalated"]}
    )
    for row in found:
        met = row["measured"] >= row["at_least"] if "at_least" in row else row["measured"] <= row["at_most"]
        row["met"] = bool(met)
    return found


def print_row(row: Row) -> None:
    """What was measured, as it comes."""
    print({key: value for key, value in row.items() if key != "methods"})
    for name, method in row["methods"].items():
        print(
            f"  {name:14} {method['latency']['median']:6.3f} s {method['tokens_per_second']['median']:6.1f} tokens/s, "
            f"{AHEAD} {method['ahead_faster']['median']:.2f}× as fast, {100 * method['escalated']:.0f}% sent up, "
            f"{100 * method['acceptance']:.0f}% of it accepted, {method['wasted']:.1f} wasted",
            flush=True,
        )


def certificate(folder: Path, address: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=bench"]
    subprocess.run([*command, "-addext", f"subjectAltName=IP:{address}"], check=True, capture_output=True)
    return cert, key


def echo_rtt(address: str, rounds: int = 9) -> float:
    """Milliseconds that a byte takes to a socket in the other namespace and back, the median."""
    script = (
        "import socket,sys\n"
        f"s=socket.create_server(('{address}',7007));print(1,flush=True);c,_=s.accept()\n"
        "c.setsockopt(socket.IPPROTO_TCP,socket.TCP_NODELAY,1)\n"
        "while d:=c.recv(64): c.sendall(d)"
    )
    process = subprocess.Popen(["ip", "netns", "exec", CLOUD, "python3", "-c", script], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    taken = []
    with socket.create_connection((address, 7007)) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            started = time.perf_counter()
            end.sendall(b"x")
            end.recv(1)
            taken.append(1e3 * (time.perf_counter() - started))
    process.wait()
    return statistics.median(taken)


@contextmanager
def bench(quick: bool, count: int) -> Iterator[tuple[Bench, Link | None]]:
    """The server in one namespace, and this thread in the other; ``quick``: both on the loopback device."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        link, prefix, address = None, [], "127.0.0.1"
        if not quick:
            link = stack.enter_context(linked())
            prefix, address = ["ip", "netns", "exec", CLOUD], ADDRESSES[CLOUD]
        cert, key = certificate(folder, address)
        token = secrets.token_hex(16)
        settings = {"host": address, "token": token, "cert": str(cert), "key": str(key)}
        server = stack.enter_context(serving(settings, prefix))
        if link is not None:
            enter(DEVICE)
        connections = OpenConnection(Connector(token, ssl.create_default_context(cafile=str(cert))))
        patience = Patience(deadline=60.0, attempt=20.0)
        pair = load_pair(threads=1)
        tokenizer = pair.draft.tokenizer
        verifier = RemoteVerifier(server.url, token=token, tokenizer=tokenizer, connect=connections, patience=patience)
        stack.callback(verifier.close)
        yield Bench(pair, verifier, connections, server, server.url, [clip.path for clip in clips()[:count]]), link


def sweep(made: Bench, link: Link, device: Pace, server: Pace) -> list[Row]:
    """One device and one server under all conditions."""
    rows = []
    for conditions in GRID:
        link.set(conditions)
        row: Row = {"conditions": asdict(conditions), "echo_ms": echo_rtt(ADDRESSES[CLOUD])}
        row["methods"] = made.measure(device, server)
        rows.append(row)
        print_row(row)
    return rows


def pairs(made: Bench, link: Link, servers: dict[str, Pace]) -> list[Row]:
    """Every device with every server."""
    link.set(BASE)
    rows = []
    for (device, device_pace), (server, server_pace) in product(constants.DEVICES.items(), servers.items()):
        row: Row = {"device": device, "server": server, "methods": made.measure(device_pace, server_pace)}
        rows.append(row)
        print_row(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.network.latency", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="loopback, one clip, no delays: whether it runs")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--part", choices=("sweep", "pairs"), default=None, help="by default both")
    parser.add_argument("--servers", nargs="+", default=[], metavar="NAME", help="of the pairs; the others are kept")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="parts that are not run are kept in it")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    report: Row = {}
    if options.part and options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text(encoding="utf-8"))
    report |= {"schema": SCHEMA, "date": now(), "machine": machine(), "quick": options.quick}
    report["settings"] = {"ahead": MAX_AHEAD, "branches": BRANCHES, "block_size": 5, "clips": options.clips}
    own = constants.dispatch(1, layers=1) if options.quick else constants.dispatch()
    servers = {constants.TRANSFORMERS: own, **constants.SERVERS}
    none = Pace(0.0, 0.0, 0.0, "as fast as it is")
    with bench(options.quick, 1 if options.quick else options.clips) as (made, link):
        warm = made.measure(none, none)
        if link is None:
            report["sweep"] = [{"conditions": asdict(BASE), "methods": warm}]
        else:
            report["netem"] = netem()
            paces = {"devices": constants.DEVICES, "servers": servers}
            described = {kind: {name: asdict(pace) for name, pace in of.items()} for kind, of in paces.items()}
            described[STRONG] = asdict(constants.strong_on_device())
            if options.part != "pairs":
                report["sweep_paces"] = described
                device = constants.DEVICES[constants.ORIN_NANO]
                report["sweep"] = sweep(made, link, device, own)
                report["strong_edge"] = strong_edge(made.pair, made.heard[0])
            if options.part != "sweep":
                chosen = {name: servers[name] for name in options.servers or servers}
                before = report.get("pairs_paces", described)["servers"]
                described["servers"] |= {name: pace for name, pace in before.items() if name not in chosen}
                report["pairs_paces"] = described
                kept = [row for row in report.get("pairs", []) if row["server"] not in chosen]
                report["pairs"] = kept + pairs(made, link, chosen)
                if not options.servers:
                    report["cold"] = made.measure(constants.DEVICES[constants.ORIN_NANO], own, cold=True)
    if "sweep" in report:
        report["targets"] = judged(report)
        for target in report["targets"]:
            print(target)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
