"""Makes docs/network.md of ``bench/results/network.json`` and ``load.json``: ``python -m bench.network.document``."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bench.harness import Row
from bench.markdown import machine_lines, number, table
from bench.network.constants import ACTIVE, BUSY, FOUR_BITS, IDLE, ORIN_NANO, TRANSFORMERS
from bench.network.latency import (
    AHEAD,
    BASE,
    CLOUD_ONLY,
    EDGE,
    FIXED,
    ONE,
    STRONG,
    STRONG_AT,
    STRONG_TARGET,
    SWEPT,
    TARGETS,
    UGSD,
    WHOLE,
)
from bench.network.link import ROOT
from ugsd_fast.decoding.ahead import RUNNERS_UP

RESULTS, DOCUMENT = ROOT / "bench" / "results", ROOT / "docs" / "network.md"
HOW = """\
**How.** The embedded pair captions the first {clips} of the demo's 32 clips (some 43 tokens each). Device and server
are processes in two network namespaces; between their TUN devices a process delays, paces and drops whole IP packets,
each way, as `tc netem` does, so that both kernels' TCP meets the conditions. TLS and a bearer token are on; a
connection is open before a clip comes (*cold*: it is not, and TCP, TLS and WebSocket begin with the clip). The methods
take turns on every clip. The models are as slow as those that they stand for: a forward sleeps what is left of the
times below.
- *edge only*: the drafter, whatever it writes. *cloud only*: one request and the server's stream of tokens, greedy.
- *fixed blocks*: lossless greedy speculative decoding, five tokens a block; the session opens with the request.
- *UGSD*: the pair's own rule (rank 1) and threshold ({threshold:g} nats); a block has up to five tokens, ends with the
  first one over the threshold (`adaptive="entropy"`), and is sent then. A caption without one sends nothing.
- *ahead*: up to {ahead} tokens are drafted while a block is in flight, in up to {branches} continuations that share
  their forwards: the draft itself, and the drafter's second to fourth choice wherever it is uncertain (`branches`).
- *sent up*: draft tokens in escalated blocks. *carried*: token ids in verify frames, those the verifier has to be told
  of included, over the caption's. *wasted*: tokens drafted ahead in vain; those of branches come in rows beside others.
"""


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
    yield "\n".join(machine_lines(report["machine"])) + "\n"
    yield HOW.format(**settings)
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
    yield (
        f"Round trip {BASE.rtt:g} ms, {BASE.rate:g} Mbit/s, no loss, {settings['pair_clips']} clips: tokens a second "
        f"of {AHEAD}, and times those of fixed blocks and of cloud only. *At most*: what {EDGE} is of them. However "
        "good the network, no method that drafts each token once can be faster, but for corrections, each of which "
        "spares a step.\n"
    )
    lines = []
    for row in report["pairs"]:
        found = row["methods"]
        cells = []
        for name in (FIXED, CLOUD_ONLY):
            ratio, most = (found[name][of]["median"] for of in ("ahead_faster", "edge_faster"))
            cells += [f"**{ratio:.2f}×**" if ratio >= TARGETS[name] else f"{ratio:.2f}×", f"{most:.2f}×"]
        speed = found[AHEAD]["tokens_per_second"]["median"]
        lines.append([row["device"], row["server"], number(speed), *cells, f"{100 * found[AHEAD]['escalated']:.0f}%"])
    header = ["device", "server", "tokens/s", "× fixed blocks", "at most", "× cloud only", "at most", "sent up"]
    yield "\n".join(table(header, lines, 2)) + "\n"
    yield f"Bold: the target of {TARGETS[FIXED]:g}× is met.\n"
    yield from findings(report)
    yield "## Targets\n"
    (most,) = [
        row["methods"][CLOUD_ONLY]["edge_faster"]["median"]
        for row in report["pairs"]
        if (row["device"], row["server"]) == STRONG_AT
    ]
    yield (
        f"Of the device and the server of the sweep ({SWEPT[0]}, `{SWEPT[1]}`), at {BASE.rtt:g} ms. (With "
        f"{STRONG_AT[0]} the drafter alone is {most:.2f}× as fast as cloud only: there {TARGETS[CLOUD_ONLY]:g}× "
        "cannot be had.)\n"
    )
    yield "\n".join(verdict(target) for target in report["targets"]) + "\n"
    strong = report["strong_edge"]
    yield (
        "Edge only can mean two things. The drafter alone bounds every method that drafts each token with it once, "
        f"so that no factor of {STRONG_TARGET:g} over it can be had. The factor is over the model whose captions UGSD "
        f"approaches, on the same device, where that has too little memory for it: on {STRONG_AT[0]} (8 GB), {STRONG} "
        f"wrote {strong['tokens_per_second']:.1f} tokens/s. A device of 32 GB or more holds its 4-bit weights. There "
        f"it takes {1e3 * ACTIVE * FOUR_BITS / (0.7 * 204.8e9):.0f} ms a token at the rate of the memory of "
        f"{SWEPT[0]}, and that factor cannot be had either.\n"
    )
    yield from apart(report)
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

    lines = []
    for name in TARGETS:
        missed = [
            f"{device} with {server} (at most {found[name]['edge_faster']['median']:.2f}×)"
            for (device, server), found in by_pair.items()
            if found[name]["ahead_faster"]["median"] < TARGETS[name]
        ]
        but = f", all but {'; '.join(missed)}" if missed else ""
        lines.append(
            f"- {TARGETS[name]:g}× over {name}: met by {len(by_pair) - len(missed)} of {len(by_pair)} pairs{but}."
        )
    idle, busy = (by_pair[ORIN_NANO, server][CLOUD_ONLY]["ahead_faster"]["median"] for server in (IDLE, BUSY))
    slowest = min(found[EDGE]["ahead_faster"]["median"] for found in by_pair.values())
    lines += [
        "- Against a stream of the cloud's own tokens, what counts is how long a token takes on the device and on "
        "the server, as a stream pays the round trip once a caption: a device that is no faster than the server "
        f"cannot win. With {ORIN_NANO}, {AHEAD} is {idle:.2f}× as fast as an idle server and {busy:.2f}× as fast as "
        "one with 16 streams.",
        f"- {AHEAD} has at least {slowest:.2f}× the rate of the drafter alone, whose captions are not the cloud's.\n",
    ]
    yield "\n".join(lines)


def apart(report: Row) -> Iterator[str]:
    """What UGSD + ahead owes its speed to, and what its captions are worth."""
    (base,) = [row for row in report["sweep"] if "variants" in row]
    methods, variants = base["methods"], base["variants"]
    yield f"## What it owes to what\n\n{SWEPT[0]} with `{SWEPT[1]}`, {BASE.rtt:g} ms, the same clips.\n"
    lines = []
    for name, row in {AHEAD: methods[AHEAD], **variants, f"{UGSD}, nothing ahead": methods[UGSD]}.items():
        slower = row["ahead_faster"]["median"]
        lines.append(
            [
                name,
                number(row["tokens_per_second"]["median"]),
                "–" if name == AHEAD else f"{1 / slower:.2f}×",
                f"{1 / row['edge_faster']['median']:.2f}×",
                f"{100 * row['escalated']:.0f}%",
                f"{100 * row['acceptance']:.0f}%",
                f"{row['wasted']:.0f}",
                f"{100 * row['same_as_cloud']:.0f}%",
            ]
        )
    header = [
        "method",
        "tokens/s",
        f"× {AHEAD}",
        f"× {EDGE}",
        "sent up",
        "accepted of it",
        "wasted",
        "captions as the cloud's",
    ]
    yield "\n".join(table(header, lines, 1)) + "\n"
    whole, all_clips = variants[WHOLE], report["without_network"]
    ranks = all_clips["corrections_by_rank"]
    tried = sum(count for rank, count in ranks.items() if int(rank) <= RUNNERS_UP + 1)
    yield (
        f"*{ONE}*: only the draft itself is continued ahead. The gate sends what the drafter doubts, so that most of "
        f"that is thrown away. *{WHOLE}*: the gate is asked once in five tokens, of which the uncertain one is seldom "
        f"the last: {100 * whole['escalated']:.0f}% are sent up, and what was drafted behind it is corrected with "
        "it.\n"
    )
    yield (
        f"On all {all_clips['clips']} clips, whatever the network: {100 * all_clips['escalated']:.0f}% are sent up "
        f"({100 * all_clips['most_escalated']:.0f}% of one caption at most), and {all_clips['same_as_cloud']} "
        f"captions are the cloud's ({EDGE}: {all_clips['edge_same_as_cloud']}). Of {sum(ranks.values())} corrections "
        f"{tried} were one of the drafter's {RUNNERS_UP + 1} best tokens, {ranks.get('2', 0)} its second. That is "
        "this pair's; and rows that share a forward take little time on a device that waits for its memory, but not "
        "no energy.\n"
    )


def load(report: Row) -> Iterator[str]:
    """The section of one server under load."""
    last = report["stages"][-1]
    memory = last["rss_mib"]
    yield "## One server under load\n"
    yield f"Written by `make bench-load` ({report['date']}); the numbers are in `bench/results/load.json`.\n"
    yield "\n".join(machine_lines(report["machine"])) + "\n"
    if report.get("note"):
        yield f"{report['note']}\n"
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
        "What the memory grows by at first is not held by anything, as a look by hand showed that this bench does not "
        "repeat: what the server had allocated stayed level, while glibc's free chunks in between grew, and then "
        "stopped.\n"
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
