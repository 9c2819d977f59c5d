"""Latency and token rate under network conditions: ``make bench-network``, as root.

Every method captions the same clips over the same link, one after the other. A caption begins with a new connection,
which is part of its latency; what the verifier is (a greeting, a tokenizer) is known from before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.network.link import CLOUD, CLOUD_ADDRESS, EDGE, Condition, network
from bench.network.speeds import SPEEDS, Speeds

RESULTS = Path(__file__).parents[1] / "results" / "network.json"
METHODS = ("edge-only", "cloud-only", "fixed block", "fixed block + ahead", "UGSD", "UGSD + ahead")
RTTS, LOSSES, RATES = (20, 50, 100, 200), (0, 1, 3), (1, 5, 20)
PORT = 8765


def conditions(full: bool) -> list[Condition]:
    """All combinations, or each quantity alone around 50 ms, no loss and 20 Mbit/s."""
    if full:
        return [Condition(rtt, loss, rate) for rtt in RTTS for loss in LOSSES for rate in RATES]
    chosen = [Condition(rtt=rtt) for rtt in RTTS]
    return chosen + [Condition(loss=loss) for loss in LOSSES[1:]] + [Condition(rate=rate) for rate in RATES[:-1]]


@contextmanager
def process(namespace: str, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a namespace, once it says that it is ready."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as started:
        assert started.stdout is not None
        if started.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{module} did not start in {namespace}")
        try:
            yield started
        finally:
            started.kill()


def measure(speeds: str, wanted: Sequence[Condition], clips: int) -> tuple[str, list[dict[str, Any]]]:
    """The name of the link, and a row for each condition and method."""
    rows = []
    url = f"ws://{CLOUD_ADDRESS}:{PORT}"
    with (
        network() as link,
        process(CLOUD, "bench.network.cloud", "--host", CLOUD_ADDRESS, "--port", str(PORT), "--speeds", speeds),
        process(EDGE, "bench.network.edge", "--url", url, "--speeds", speeds) as edge,
    ):
        assert edge.stdin is not None
        assert edge.stdout is not None
        captions: dict[str, Any] = {}
        for condition in wanted:
            link.set(condition)
            for method in METHODS:
                edge.stdin.write(json.dumps({"method": method, "clips": clips}) + "\n")
                edge.stdin.flush()
                results = json.loads(edge.stdout.readline())
                ids = [result.pop("ids") for result in results]
                if captions.setdefault(method, ids) != ids:
                    raise RuntimeError(f"{method}: the captions under {condition} are not those under {wanted[0]}")
                rows.append(summary(condition, method, results))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for method in ("fixed block", "fixed block + ahead"):
            if captions[method] != captions["cloud-only"]:
                raise RuntimeError(f"{method}: the captions are not the verifier's own")
        return link.name, rows


def summary(condition: Condition, method: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over the clips, and shares over all of them."""
    drafted = sum(result["drafted"] for result in results)
    latencies = sorted(result["latency"] for result in results)
    return {
        "rtt_ms": condition.rtt,
        "loss_percent": condition.loss,
        "rate_mbit": condition.rate,
        "method": method,
        "latency": statistics.median(latencies),
        "slowest": latencies[-1],
        "first_token": statistics.median(result["first"] for result in results),
        "tokens_per_second": sum(result["tokens"] for result in results) / sum(latencies),
        "escalated_share": sum(result["escalated"] for result in results) / drafted if drafted else None,
        "wasted_share": sum(result["wasted"] for result in results) / drafted if drafted else None,
        "uplink_bytes": statistics.mean(result["uplink"] for result in results),
        "audio_bytes": statistics.mean(result["audio"] for result in results),
        "downlink_bytes": statistics.mean(result["downlink"] for result in results),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Latencies as Markdown: a line for each condition, a column for each method."""
    by = {(row["rtt_ms"], row["loss_percent"], row["rate_mbit"], row["method"]): row for row in rows}
    lines = [
        "| RTT ms | loss | Mbit/s | "
        + " | ".join(METHODS)
        + " | of fixed block | of cloud-only | sent to the verifier |",
        "|" + "---|" * (len(METHODS) + 6),
    ]
    for rtt, loss, rate in dict.fromkeys(key[:3] for key in by):
        at = {method: by[rtt, loss, rate, method] for method in METHODS}
        ours = at["UGSD + ahead"]
        cells = [f"{1e3 * at[m]['latency']:.0f} ms, {at[m]['tokens_per_second']:.0f}/s" for m in METHODS]
        ratios = [at[m]["latency"] / ours["latency"] for m in ("fixed block", "cloud-only")]
        lines.append(
            f"| {rtt:g} | {loss:g}% | {rate:g} | {' | '.join(cells)} | {ratios[0]:.2f}× | {ratios[1]:.2f}× | "
            f"{100 * ours['escalated_share']:.0f}% |"
        )
    return "\n".join(lines)


def stated(speeds: Speeds) -> str:
    """The constants, in words."""
    return (
        f"{speeds.name}: {1e3 * speeds.draft_step:.1f} ms a draft step, {1e3 * speeds.verify_forward:.1f} ms a "
        f"verifier forward, {1e3 * speeds.verify_prompt:.0f} ms its prompt"
    )


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every combination of round trip, loss and rate")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--speeds", choices=SPEEDS, nargs="+", default=list(SPEEDS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"clips": arguments.clips, "profiles": {}}
    for name in arguments.speeds:
        wanted = conditions(arguments.full) if name == "dense" else [Condition(rtt=rtt) for rtt in RTTS]
        results["link"], rows = measure(name, wanted, arguments.clips)
        results["profiles"][name] = {"constants": SPEEDS[name].to_dict(), "rows": rows}
        print(f"\n{stated(SPEEDS[name])}; {results['link']}\n\n{table(rows)}\n", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
