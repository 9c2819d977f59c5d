"""The network benchmarks run, and the link does to packets what its conditions say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.network import constants, document, latency, load
from bench.network.constants import Pace, paced
from bench.network.link import Conditions, Direction
from ugsd_fast import Decoder
from ugsd_fast.demo import clips, load_pair

ROOT = Path(__file__).resolve().parents[2]


def test_packets_take_half_the_round_trip_and_the_time_to_send_them() -> None:
    way = Direction(Conditions(rtt=100, rate=1))
    arrivals = [way.arrival(0.0, 125) for _ in range(3)]  # a millisecond each
    assert arrivals == pytest.approx([0.051, 0.052, 0.053])
    assert way.arrival(1.0, 125) == pytest.approx(1.051)


def test_packets_are_lost_as_often_as_asked_for() -> None:
    way = Direction(Conditions(loss=3), seed=1)
    lost = sum(way.arrival(float(n), 100) is None for n in range(20_000))
    assert 0.026 < lost / 20_000 < 0.034
    assert all(Direction(Conditions()).arrival(0.0, 1500) is not None for _ in range(2000))


def test_a_queue_that_is_full_drops_packets() -> None:
    way = Direction(Conditions(rate=1))
    assert sum(way.arrival(0.0, 1500) is not None for _ in range(1200)) == 1000


def test_forwards_take_the_time_they_are_given() -> None:
    pair = load_pair(threads=1)
    clip = pair.draft.prepare(clips()[0].path, pair.prompt)
    decoder = Decoder(pair.draft, None, pair.config)
    tokens = decoder.generate(inputs=clip, max_new_tokens=6).tokens
    with paced(pair.draft.model, Pace(step=20.0, more=0.0, prompt=100.0, source="")):
        started = time.perf_counter()
        assert decoder.generate(inputs=clip, max_new_tokens=6).tokens == tokens
        assert time.perf_counter() - started >= 0.1 + 5 * 0.02
    assert not pair.draft.model._forward_hooks


def test_constants_are_what_they_are_derived_from() -> None:
    assert constants.more_experts(1, 1e12) == pytest.approx(0.0)
    whole = constants.more_experts(10_000, 1e12)  # all experts but those of one token: 54 GB in bfloat16
    assert whole == pytest.approx((128 - 8) * 48 * 3 * 2048 * 768 * 2 / 1e12 * 1e3)
    strong = constants.strong_on_device()
    assert strong.prompt > strong.step > constants.DEVICES[constants.ORIN_NANO].step


def run(module: str, path: Path) -> dict[str, Any]:
    """The report of a quick run."""
    command = [sys.executable, "-m", module, "--quick", "--json", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return json.loads(path.read_text())


def test_captions_over_the_loopback_device(tmp_path: Path) -> None:
    report = run("bench.network.latency", tmp_path / "network.json")
    (row,) = report["sweep"]
    found = row["methods"]
    assert found[latency.EDGE]["uplink_bytes"] == found[latency.EDGE]["audio_bytes"] == 0
    assert found[latency.FIXED]["escalated"] == found[latency.FIXED_AHEAD]["escalated"] == 1
    assert found[latency.FIXED]["same_as_cloud"] == found[latency.FIXED_AHEAD]["same_as_cloud"] == 1  # lossless
    assert 0 < found[latency.AHEAD]["escalated"] == found[latency.UGSD]["escalated"] < 0.5
    assert all(method["latency"]["median"] > 0 for method in found.values())


def test_load(tmp_path: Path) -> None:
    report = run("bench.network.load", tmp_path / "load.json")
    assert [stage["sessions"] for stage in report["stages"]] == [*load.ROUNDS * load.SHORT, *load.LONG]
    assert all(stage["errors"] == [] and stage["verdicts"] > 0 for stage in report["stages"])
    text = "\n".join(document.load(report))
    assert (text.count("| 64 long |"), text.count("| 64 short |")) == (1, load.ROUNDS)


def test_document_is_that_of_the_committed_results() -> None:
    text = document.document()
    assert text == document.DOCUMENT.read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1
    network, load_report = (json.loads((document.RESULTS / f"{name}.json").read_text()) for name in ("network", "load"))
    assert network["targets"] == latency.judged(network)
    assert len(load_report["targets"]) == len(load.judged(load_report["stages"]))


def test_dispatch_is_timed() -> None:
    pace = constants.dispatch(1, layers=2)
    assert pace.step > 0
    assert pace.more >= 0
