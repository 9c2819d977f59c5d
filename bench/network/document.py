"""Makes docs/network.md of ``bench/results/network.json`` and ``load.json``: ``python -m bench.network.document``."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bench.harness import Row
from bench.markdown import number, table
from bench.network.constants import BUSY, IDLE, ORIN_NANO, TRANSFORMERS
from bench.network.latency import (
    AHEAD,
    BASE,
    CLOUD_ONLY,
    EDGE,
    FIXED,
    FIXED_AHEAD,
    STRONG,
    STRONG_TARGET,
    TARGETS,
    UGSD,
    UPLINK_TARGET,
)
from bench.network.link import ROOT

RESULTS, DOCUMENT = ROOT / "bench" / "results", ROOT / "docs" / "network.md"
HOW = """\
**How.** The embedded pair captions demo clips (some 43 tokens). Device and server are processes in two network
namespaces; between their TUN devices a process delays, paces and drops whole IP packets, each way, as `tc netem` does,
so that both kernels' TCP meets the conditions. TLS and a bearer token are on; a connection is open before a clip comes
(*cold*: it is not, and TCP, TLS and WebSocket begin with the clip). The methods take turns on every clip. The models
are as slow as those that they stand for: a forward sleeps what is left of the times below. *cloud only* is one request
and the server's stream of tokens, greedy. *fixed blocks* is lossless greedy speculative decoding. UGSD has the rule of
the pair (rank 1) and a threshold of {threshold:g} nats; *ahead* drafts up to {ahead} tokens while a block is in flight.
*sent up*: draft tokens in escalated blocks; *carried*: token ids in verify frames, those the verifier has to be told of
included, over the caption's."""


def methods(rows: dict[str, Row]) -> Iterator[list[str]]:
    """Lines of a table: one a method."""
    for name, row in rows.items():
        latency, faster = row["latency"], row["ahead_faster"]
        yield [
            name,
            f"{latency['median']:.2f} ({latency['p10']:.2f} – {latency['p90']:.2f})",
            f"{row['first']['median']:.2f}",
            number(row["tokens_per_second"]["median"]),
            "–" if name == AHEAD else f"{faster['median']:.2f}× ({faster['p10']:.2f} – {faster['p90']:.2f})",
            f"{100 * row['escalated']:.0f}%",
            f"{100 * row['carried']:.0f}%",
            f"{100 * row['acceptance']:.0f}%",
            number(row["wasted"]),
            f"{100 * row['same_as_cloud']:.0f}%",
            f"{row['uplink_bytes']:.0f} + {row['audio_bytes'] / 1024:.1f} Ki",
        ]


HEADER = ["method", "latency, s (p10 – p90)", "first token, s", "tokens/s", f"{AHEAD} is", "sent up", "carried"]
HEADER += ["accepted of it", "wasted", "captions as the cloud's", "uplink bytes + audio"]


def verdict(target: Row) -> str:
    """A target as a line of a list."""
    bound = f"≥ {target['at_least']:g}" if "at_least" in target else f"≤ {target['at_most']:g}"
    return f"- {target['of']}: **{target['measured']:.2f}** ({bound}): {'met' if target['met'] else '**missed**'}"


def network(report: Row) -> Iterator[str]:
    """The section of captions over a link."""
    settings = report["settings"]
    yield "# Edge and cloud over a network\n"
    yield f"Written by `make bench-network` ({report['date']}); the numbers are in `bench/results/network.json`.\n"
    yield HOW.format(**settings) + "\n"
    if report["netem"]:
        yield f"The kernel of this run has no netem (`{report['netem']}`), hence the process in between.\n"
    yield "## How fast the models are\n"
    yield "Milliseconds of a forward over one token, for each token more, and over the prompt with its audio.\n"
    paces = report["pairs_paces"]
    rows = [
        [name, number(pace["step"]), number(pace["more"]), number(pace["prompt"]), pace["source"]]
        for name, pace in [*paces["devices"].items(), *paces["servers"].items(), (STRONG, paces[STRONG])]
    ]
    yield "\n".join(table(["model on", "token", "more", "prompt", "from"], rows, 1)) + "\n"
    own = report["sweep_paces"]["servers"][TRANSFORMERS]["step"]
    yield f"(`{TRANSFORMERS}` is timed anew in every run; the sweep of conditions below had {own:.1f} ms.)\n"
    yield "## Every device with every server\n"
    yield f"Round trip {BASE.rtt:g} ms, {BASE.rate:g} Mbit/s, no loss: tokens a second of {AHEAD}, and times those of\n"
    lines = []
    for row in report["pairs"]:
        found = row["methods"]
        ratios = [found[name]["ahead_faster"]["median"] for name in (FIXED, CLOUD_ONLY)]
        marks = [f"**{ratio:.2f}×**" if ratio >= TARGETS[FIXED] else f"{ratio:.2f}×" for ratio in ratios]
        speed = found[AHEAD]["tokens_per_second"]["median"]
        lines.append([row["device"], row["server"], number(speed), *marks, f"{100 * found[AHEAD]['escalated']:.0f}%"])
    header = ["device", "server", f"{AHEAD}, tokens/s", FIXED, CLOUD_ONLY, "sent up"]
    yield "\n".join(table(header, lines, 2)) + "\n"
    yield f"Bold: the target of {TARGETS[FIXED]:g}× is met.\n"
    yield from findings(report)
    yield "## Targets\n"
    yield f"Of the device and the server of the sweep ({ORIN_NANO}, `{TRANSFORMERS}`), at {BASE.rtt:g} ms:\n"
    yield "\n".join(verdict(target) for target in report["targets"]) + "\n"
    strong = report["strong_edge"]
    yield (
        f"Edge only can mean two things. The drafter alone bounds every method that drafts each token with it once, so "
        f"that no factor of {STRONG_TARGET:g} over it can be had. The factor is over the model whose captions UGSD "
        f"approaches, on the same device: {STRONG} wrote {strong['tokens_per_second']:.1f} tokens/s.\n"
    )
    for row in report["sweep"]:
        at = row["conditions"]
        yield f"## {at['rtt']:g} ms, {at['loss']:g}% loss, {at['rate']:g} Mbit/s\n"
        yield f"A byte took {row['echo_ms']:.1f} ms there and back.\n"
        yield "\n".join(table(HEADER, methods(row["methods"]), 1)) + "\n"
    yield f"## {BASE.rtt:g} ms, no loss, {BASE.rate:g} Mbit/s, cold\n"
    yield "\n".join(table(HEADER, methods(report["cold"]), 1)) + "\n"


def findings(report: Row) -> Iterator[str]:
    """What the table of pairs shows, with its figures."""
    by_pair = {(row["device"], row["server"]): row["methods"] for row in report["pairs"]}
    met = [
        pair
        for pair, found in by_pair.items()
        if all(found[name]["ahead_faster"]["median"] >= least for name, least in TARGETS.items())
    ]
    named = "; ".join(f"{device} with {server}" for device, server in met) or "none"
    idle, busy = (by_pair[ORIN_NANO, server][CLOUD_ONLY]["ahead_faster"]["median"] for server in (IDLE, BUSY))
    base = by_pair[ORIN_NANO, TRANSFORMERS]
    ahead_gain = base[UGSD]["latency"]["median"] / base[AHEAD]["latency"]["median"]
    fixed = base[FIXED]["latency"]["median"] / base[FIXED_AHEAD]["latency"]["median"]
    ahead, alone = base[AHEAD], base[EDGE]["latency"]["median"]
    bound = base[FIXED]["latency"]["median"] / alone
    yield "\n".join(
        (
            f"- Both factors of {TARGETS[FIXED]:g} are reached by: {named}.",
            "- Against a stream of the cloud's own tokens, what counts is how long a token takes on the device and on "
            f"the server: with {ORIN_NANO}, {AHEAD} is {idle:.2f}× as fast as an idle server and {busy:.2f}× as fast "
            "as one with 16 streams. The round trip matters little, as a stream pays it once a caption.",
            f"- UGSD cannot be faster than its drafter alone: on {ORIN_NANO} that leaves at most {bound:.2f}× over "
            f"fixed blocks. It takes {ahead['latency']['median'] - alone:.2f} s more than the drafter's {alone:.2f} s.",
            f"- Drafting ahead makes fixed blocks {fixed:.2f}× faster, UGSD {ahead_gain:.2f}×: the gate sends the "
            f"blocks that the drafter doubts, of which {100 * ahead['acceptance']:.0f}% of the tokens stand "
            f"({100 * base[FIXED]['acceptance']:.0f}% of fixed blocks'), so that most of what is drafted behind them "
            f"is thrown away ({ahead['wasted']:.1f} tokens a caption), and a verdict waits for the step under way.",
            f"- {100 * ahead['escalated']:.0f}% of the draft tokens are sent up (target: {100 * UPLINK_TARGET:g}%).\n",
        )
    )


def load(report: Row) -> Iterator[str]:
    """The section of one server under load."""
    last = report["stages"][-1]
    memory = last["rss_mib"]
    yield "## One server under load\n"
    yield f"Written by `make bench-load` ({report['date']}); the numbers are in `bench/results/load.json`.\n"
    yield (
        "One `ugsd-fast serve` process (embedded pair's verifier as fast as it is, level `features`, no TLS) and the "
        f"devices' one asyncio loop share {report['machine']['cores']} cores. Devices play recorded captions "
        f"({report['blocks_per_caption']:.1f} blocks of five each, every block verified) without a pause, and compare "
        "every verdict with the recorded one. A short session is a caption; a long one goes back to its beginning and "
        f"has {last['laps']} times as many verdicts for its prompt. *First* verdicts wait for the prompt.\n"
    )
    rows = [
        [
            f"{stage['sessions']} {'long' if stage['laps'] > 1 else 'short'}",
            f"{stage['seconds']:.0f}",
            str(len(stage["errors"])),
            number(stage["verdicts_per_second"]),
            number(stage["ended"] / stage["seconds"]),
            *(f"{stage[name]['p50']:.1f} / {stage[name]['p99']:.1f}" for name in ("latency_ms", "first_latency_ms")),
            f"{stage['cpu_ms_per_verdict']:.2f}",
            f"{stage['cpu_cores']:.2f} + {stage['device_cores']:.2f}",
            f"{stage['sessions_per_forward']:.1f}",
            f"{stage['prompts_per_forward']:.1f}",
        ]
        for stage in report["stages"]
    ]
    header = ["sessions", "s", "errors", "verdicts/s", "sessions/s", "verdict p50 / p99, ms", "first p50 / p99, ms"]
    yield (
        "\n".join(
            table(
                [*header, "CPU ms a verdict", "cores, server + devices", "sessions a forward", "prompts a forward"],
                rows,
                1,
            )
        )
        + "\n"
    )
    yield (
        f"Its memory with {last['sessions']} long sessions: {memory['first_tenth']:.0f} MiB in the first tenth, "
        f"{memory['middle']:.0f} in the middle, {memory['last_tenth']:.0f} in the last, {memory['most']:.0f} at most.\n"
    )
    yield "\n".join(verdict(target) for target in report["targets"]) + "\n"
    one, many = report["stages"][:2]
    prompt = one["first_latency_ms"]["p50"] - one["latency_ms"]["p50"]
    yield (
        f"Factors are medians of rounds. A prompt takes {prompt:.0f} ms more than a verdict. Prompts are computed in a "
        f"thread of their own, {many['prompts_per_forward']:.1f} in a forward, beside blocks, "
        f"{many['sessions_per_forward']:.1f} of them in one. The two threads share caches, memory and Python's lock: "
        "together they do not do twice as much as one.\n"
    )
    yield (
        "What the memory grows by is not held by anything. In seven minutes of 64 long sessions what the server has "
        "allocated stayed at 301 to 327 MiB; free chunks in between grew to some 180 MiB within a minute and no "
        "further, and `malloc_trim` gave 45 MiB back.\n"
    )


def document() -> str:
    """The document of the results that are there."""
    parts: list[str] = []
    for name, section in {"network": network, "load": load}.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += section(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
