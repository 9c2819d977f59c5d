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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

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
ONE, WHOLE, WHOLE_ONE = "one branch", "whole blocks", "whole blocks, one branch"
STRONG = "30B on the device"
MAX_AHEAD, BRANCHES = 40, 8
SWEPT = constants.ORIN, constants.TRANSFORMERS  # the device and the server of the sweep over conditions
STRONG_AT = constants.ORIN_NANO, constants.TRANSFORMERS  # the 30B does not fit into that device's memory
CLIPS, PAIR_CLIPS = 6, 4  # of the sweep and of each pair
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
        lossless = replace(self.pair.config, rule="greedy", always_escalate=True)
        gated = replace(self.pair.config, adaptive="entropy", max_block=5)  # a block ends at its first uncertain token
        ahead: dict[str, Any] = {"ahead": MAX_AHEAD, "branches": BRANCHES}
        return {
            EDGE: Decoder(draft, None, gated),
            CLOUD_ONLY: Decoder(None, remote, lossless),
            FIXED: Decoder(draft, remote, lossless),
            FIXED_AHEAD: Decoder(draft, remote, replace(lossless, **ahead)),
            UGSD: Decoder(draft, remote, gated),
            AHEAD: Decoder(draft, remote, replace(gated, **ahead)),
        }

    def variants(self) -> dict[str, Decoder]:
        """UGSD + ahead without what it owes its speed to."""
        draft, remote, plain = self.pair.draft, self.verifier, self.pair.config
        gated = replace(plain, adaptive="entropy", max_block=5)
        return {
            ONE: Decoder(draft, remote, replace(gated, ahead=MAX_AHEAD)),
            WHOLE: Decoder(draft, remote, replace(plain, ahead=MAX_AHEAD, branches=BRANCHES)),
            WHOLE_ONE: Decoder(draft, remote, replace(plain, ahead=MAX_AHEAD)),
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

    def measure(
        self, device: Pace, server: Pace, clips: int, *, cold: bool = False, variants: bool = False
    ) -> dict[str, Row]:
        """All methods in turns on every clip."""
        self.server.pace(server)
        decoders = self.decoders() | (self.variants() if variants else {})
        rows: dict[str, list[Row]] = {name: [] for name in decoders}
        with paced(self.pair.draft.model, device):
            for shift, clip in enumerate(self.heard[:clips]):
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
    speed, ours, drafter = ([row["tokens"] / row["latency"] for row in of] for of in (samples, ahead, rows[EDGE]))
    return {
        "latency": spread(latency),
        "first": spread([row["first"] for row in samples]),
        "tokens_per_second": spread(speed),
        "ahead_faster": spread([mine / theirs for mine, theirs in zip(ours, speed, strict=True)]),
        "ahead_latency": spread([theirs["latency"] / mine["latency"] for mine, theirs in zip(ahead, samples)]),
        "edge_faster": spread([mine / theirs for mine, theirs in zip(drafter, speed, strict=True)]),
        "same_as_cloud": statistics.mean(agreeing),
        **{name: statistics.mean(row[name] for row in samples) for name in means},
    }


def without_network(pair: EmbeddedPair) -> Row:
    """UGSD on all clips, both models here and as fast as they are: what is sent up, and what comes of it."""
    config = replace(pair.config, adaptive="entropy", max_block=5)
    steps: list[torch.Tensor] = []  # the drafter's logits, forward by forward
    hook = pair.draft.model.register_forward_hook(lambda *call: steps.append(call[-1].logits[0, -1]))
    shares, same, alone = [], [], []
    ranks: Counter[int] = Counter()
    for clip in clips():
        request = {"prompt": pair.prompt, "max_new_tokens": pair.max_new_tokens}
        cloud = Decoder(None, pair.verifier, replace(config, rule="greedy")).generate(clip.path, **request)
        alone.append(Decoder(pair.draft, None, config).generate(clip.path, **request).tokens == cloud.tokens)
        steps.clear()
        result = Decoder(pair.draft, pair.verifier, config).generate(clip.path, **request)
        same.append(result.tokens == cloud.tokens)
        shares.append(result.metrics.escalated_share)
        drafted = 0
        for block in result.trace.blocks:
            if block.num_accepted < len(block.draft_tokens):
                logits = steps[drafted + block.num_accepted]
                ranks[int((logits > logits[block.emitted[-1]]).sum()) + 1] += 1
            drafted += len(block.draft_tokens)
    hook.remove()
    return {
        "clips": len(same),
        "same_as_cloud": sum(same),
        "edge_same_as_cloud": sum(alone),
        "escalated": statistics.mean(shares),
        "most_escalated": max(shares),
        "corrections_by_rank": {str(rank): ranks[rank] for rank in sorted(ranks)},
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
    strong = [row["methods"] for row in report.get("pairs", []) if (row["device"], row["server"]) == STRONG_AT]
    if strong and "strong_edge" in report:
        faster = strong[0][AHEAD]["tokens_per_second"]["median"] / report["strong_edge"]["tokens_per_second"]
        name = f"tokens/s of {AHEAD} over {STRONG} ({STRONG_AT[0]})"
        found.append({"of": name, "at_least": STRONG_TARGET, "measured": faster})
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


def sweep(made: Bench, link: Link, device: Pace, server: Pace, count: int) -> list[Row]:
    """One device and one server under all conditions; with the variants at the first target's."""
    rows = []
    for conditions in GRID:
        link.set(conditions)
        row: Row = {"conditions": asdict(conditions), "echo_ms": echo_rtt(ADDRESSES[CLOUD])}
        row["methods"] = made.measure(device, server, count, variants=conditions == BASE)
        print_row(row)
        if conditions == BASE:
            row["variants"] = {name: row["methods"].pop(name) for name in made.variants()}
        rows.append(row)
    return rows


def pairs(made: Bench, link: Link, servers: dict[str, Pace], count: int) -> list[Row]:
    """Every device with every server."""
    link.set(BASE)
    rows = []
    for (device, device_pace), (server, server_pace) in product(constants.DEVICES.items(), servers.items()):
        row: Row = {"device": device, "server": server, "methods": made.measure(device_pace, server_pace, count)}
        rows.append(row)
        print_row(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.network.latency", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="loopback, one clip, no delays: whether it runs")
    parser.add_argument("--clips", type=int, default=CLIPS, help="of the sweep")
    parser.add_argument("--pair-clips", type=int, default=PAIR_CLIPS, help="of each device with each server")
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
    report["settings"] = {"ahead": MAX_AHEAD, "branches": BRANCHES}
    report["settings"] |= {"clips": options.clips, "pair_clips": options.pair_clips}
    own = constants.dispatch(1, layers=1) if options.quick else constants.dispatch()
    servers = {constants.TRANSFORMERS: own, **constants.SERVERS}
    none = Pace(0.0, 0.0, 0.0, "as fast as it is")
    with bench(options.quick, max(options.clips, options.pair_clips)) as (made, link):
        report["settings"]["threshold"] = made.pair.config.entropy_threshold
        warm = made.measure(none, none, 1)
        if not options.quick:
            report["without_network"] = without_network(made.pair)
        if link is None:
            report["sweep"] = [{"conditions": asdict(BASE), "methods": warm}]
        else:
            report["netem"] = netem()
            paces = {"devices": constants.DEVICES, "servers": servers}
            described = {kind: {name: asdict(pace) for name, pace in of.items()} for kind, of in paces.items()}
            described[STRONG] = asdict(constants.strong_on_device())
            if options.part != "pairs":
                report["sweep_paces"] = described
                report["sweep"] = sweep(made, link, constants.DEVICES[SWEPT[0]], servers[SWEPT[1]], options.clips)
                report["strong_edge"] = strong_edge(made.pair, made.heard[0])
            if options.part != "sweep":
                chosen = {name: servers[name] for name in options.servers or servers}
                before = report.get("pairs_paces", described)["servers"]
                described["servers"] |= {name: pace for name, pace in before.items() if name not in chosen}
                report["pairs_paces"] = described
                kept = [row for row in report.get("pairs", []) if row["server"] not in chosen]
                report["pairs"] = kept + pairs(made, link, chosen, options.pair_clips)
                if not options.servers:
                    device, server = constants.DEVICES[SWEPT[0]], servers[SWEPT[1]]
                    report["cold"] = made.measure(device, server, options.clips, cold=True)
    if "sweep" in report:
        report["targets"] = judged(report)
        for target in report["targets"]:
            print(target)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
