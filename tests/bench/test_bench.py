"""The benchmarks run, their arithmetic is right and their reports render. No timing is judged here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, inputs, run, summary
from bench.baselines import FILTERS, warp, warpers
from bench.decoding import assisted, cache
from bench.harness import FLOOR, QUICK, SUBJECT, Calls, Case, Settings, Target
from bench.kernels import gate_block, kv_compact
from bench.kernels.accept_block import VERDICTS, needed_rows
from bench.kernels.token_stats import eager_statistics
from ugsd_fast import ops
from ugsd_fast.reference import spec

SETTINGS = Settings(rounds=2, sample_seconds=0.0, judged=False)
ROW_KEYS = {
    "case", "shape", "dtype", "logits", "cache", "threads", "bytes", "subject", "floor", "baselines", "targets"
}  # fmt: skip


class Clock:
    """Stands in for the clock: calls that the test makes take exactly as long as they say."""

    def __init__(self) -> None:
        self.now = 0

    def call(self, microseconds: int) -> Any:
        def take() -> None:
            self.now += 1000 * microseconds

        return take


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: clock.now)
    return clock


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """What ``kernels.json`` holds, of every case of every op at tiny sizes."""
    runs = []
    for op in run.OPS:
        cases = import_module(f"bench.kernels.{op}").cases(QUICK, False)
        conditions = {"date": harness.now(), "threads": 1, "rounds": 2, "quick": True, "malloc_thresholds_raised": True}
        rows = harness.run_cases(cases, SETTINGS)
        backend = ops.backends()[op][0]
        load = {"load_before": 0.5, "load_after": 0.5, "preemptions": 0}
        runs.append({"op": op, "backend": backend, "conditions": conditions | load, "rows": rows})
    return {"schema": harness.SCHEMA, "date": harness.now(), "machine": harness.machine(), "runs": runs}


def numbers(value: Any) -> Iterator[float]:
    """Every number in JSON data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def test_quantiles_interpolate() -> None:
    assert harness.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert harness.quantile([1.0, 2.0], 0.1) == pytest.approx(1.1)
    assert harness.quantile([7.0], 0.9) == 7.0


def test_spread_scales_median_and_percentiles() -> None:
    found = harness.spread([float(i) for i in range(1, 12)], 10.0)
    assert found == pytest.approx({"median": 60.0, "p10": 20.0, "p90": 100.0})


def test_ratio_is_taken_within_a_round() -> None:
    # A machine that is ten times slower in one round leaves the ratio alone.
    subject, baseline = [1.0, 10.0, 1.0], [4.0, 40.0, 4.0]
    assert harness.spread(harness.ratios(baseline, subject)) == {"median": 4.0, "p10": 4.0, "p90": 4.0}


def test_floor_of_a_round_is_its_fastest_read() -> None:
    samples = {SUBJECT: [9.0, 9.0], f"{FLOOR}: a": [1.0, 4.0], f"{FLOOR}: b": [2.0, 3.0]}
    assert harness.floor_of_rounds(samples) == [1.0, 3.0]


def test_targets_compare_the_right_way_round() -> None:
    faster = Target("torch", at_least=20).judge(25.0)
    assert faster == {"of": "torch", "at_least": 20, "measured": 25.0, "met": True}
    assert not Target("torch", at_least=20).judge(19.0)["met"]
    near = Target(FLOOR, at_most=1.5).judge(0.5)  # the floor takes half of the op's time
    assert near == {"of": FLOOR, "at_most": 1.5, "measured": 2.0, "met": False}
    assert Target(FLOOR, at_most=1.5).judge(0.8)["met"]
    assert harness.target_text(faster) == "≥ 20× torch"
    assert harness.target_text(near) == "≤ 1.5× the floor"


def test_measure_reports_what_the_clock_says(clock: Clock) -> None:
    def build(seed: int) -> Calls:
        return Calls(clock.call(20), {"slow": clock.call(10), "fast": clock.call(5)}, {"torch": clock.call(100)})

    targets = (Target("torch", at_least=4), Target(FLOOR, at_most=3))
    case = Case("case", "1 × 1", "float32", 4, build, targets=targets)
    row = harness.measure(case, Settings(rounds=3, sample_seconds=1e-3))
    assert row["subject"]["median"] == pytest.approx(20)
    assert row["subject"]["calls"] == 3 * 50  # a millisecond of 20 µs calls, three times
    assert row["baselines"]["torch"]["ratio"]["median"] == pytest.approx(5)
    assert row["floor"]["share"]["median"] == pytest.approx(0.25)
    assert row["floor"]["by"] == pytest.approx({"slow": 10, "fast": 5})
    assert [target["met"] for target in row["targets"]] == [True, False]
    two_threads = harness.measure(case, Settings(threads=2, rounds=1))
    assert two_threads["targets"] == []


def test_cold_cases_walk_through_copies() -> None:
    seen: list[int] = []

    def build(seed: int) -> Calls:
        return Calls(lambda: seen.append(seed), {"read": lambda: None})

    case = Case("case", "1", "float32", bytes=100, build=build, cold=True)
    call = harness.contenders(case, Settings(cold_bytes=250))[SUBJECT]
    for _ in range(4):
        call()
    assert seen == [0, 1, 2, 0]


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=harness.dtype_name)
def test_bare_reads_cover_the_bytes(dtype: torch.dtype) -> None:
    reads = harness.bare_reads(inputs.logits("peaked", (2, 1000), dtype, seed=0))
    assert set(reads) <= {"wmemchr", "int64 sum"}
    assert "int64 sum" in reads
    for read in reads.values():
        read()


@pytest.mark.parametrize("op", ["token_stats", "logprob_rank", "filter_logits", "sample", "lm_head_stats"])
def test_bytes_are_the_floor_of_the_spec(op: str) -> None:
    for case in import_module(f"bench.kernels.{op}").cases(QUICK, False):
        if case.label.endswith("the cost of a call"):
            continue
        sizes = [int(size) for size in case.shape.split(" × ")]
        rows = int(case.label.split()[0]) if op == "lm_head_stats" else sizes[0]
        problem = spec.Case(rows=rows, vocabulary=QUICK.vocabulary, width=QUICK.width, dtype=getattr(torch, case.dtype))
        inputs_of_spec = spec.SPECS[op].inputs(problem)
        assert case.bytes == spec.SPECS[op].floor(**inputs_of_spec), case.label


@pytest.mark.parametrize("label", ["all but the first slot", "a random half"])
def test_moved_bytes_are_the_floor_of_the_spec(label: str) -> None:
    keep = kv_compact.full_masks(QUICK.slots, seed=0)[label]
    shape = (kv_compact.BATCH, kv_compact.HEADS, QUICK.slots, kv_compact.HEAD_WIDTH)
    kv = [torch.empty(shape, dtype=kv_compact.DTYPE)] * (2 * QUICK.layers)
    (case,) = (case for case in kv_compact.cases(QUICK, False) if case.label.endswith(label))
    assert case.bytes == spec.SPECS["kv_compact"].floor(kv, keep)


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("accepted", sorted({n for turns in VERDICTS.values() for n in turns}))
def test_drafted_blocks_have_their_verdict(rule: str, accepted: int) -> None:
    for kind in inputs.LOGITS:
        for dtype in inputs.DTYPES:
            block = inputs.drafted_block(kind, 5, 1000, dtype, accepted, seed=3)
            for offset in range(8):
                verdict = ops.accept_block(block.tokens, block.target, block.draft, rule=rule, offset=offset)
                assert verdict.num_accepted.tolist() == [accepted]


def test_needed_rows() -> None:
    assert needed_rows("exact", 0, carried=True) == (1, 1)
    assert needed_rows("exact", 2, carried=False) == (3, 3)
    assert needed_rows("exact", 5, carried=True) == (6, 0)
    assert needed_rows("block", 0, carried=True) == (5, 1)
    assert needed_rows("block", 5, carried=False) == (6, 5)


def test_baselines_compute_what_the_ops_do() -> None:
    z = inputs.logits("normal", (3, 1000), torch.float32, seed=0)
    stats = ops.token_stats(z)
    entropy, argmax, margin = eager_statistics(z)
    torch.testing.assert_close(entropy, stats.entropy)
    torch.testing.assert_close(margin, stats.margin)
    assert argmax.tolist() == stats.argmax.tolist()
    for filters in FILTERS.values():
        torch.testing.assert_close(warp(warpers(filters), z), ops.filter_logits(z, **filters))


def test_every_op_has_a_benchmark_with_the_schema(kernels: dict[str, Any]) -> None:
    assert [one["op"] for one in kernels["runs"]] == list(ops.backends())
    for one in kernels["runs"]:
        assert one["rows"], one["op"]
        for row in one["rows"]:
            assert row.keys() == ROW_KEYS
            assert row["baselines"], (one["op"], row["case"])
            assert all(value > 0 for value in numbers([row["subject"]["median"], row["floor"]["share"]]))
    data = harness.rounded(kernels)
    assert json.loads(json.dumps(data)) == data


def test_machine_has_no_name_of_it() -> None:
    text = json.dumps(harness.machine())
    assert harness.platform.node() not in text
    assert "/" not in text


def test_command_line_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["gate_block", "--quick", "--threads", "1", "--json", str(output)])
    monkeypatch.setattr(harness, "raise_malloc_thresholds", lambda: True)
    harness.main("gate_block", gate_block.cases)
    result = json.loads(output.read_text())
    assert result["op"] == "gate_block"
    assert result["conditions"]["quick"]
    assert all(row.keys() == ROW_KEYS for row in result["rows"])


def test_runs_of_other_ops_are_kept(tmp_path: Path) -> None:
    def result(*ops: str, machine: str = "one") -> dict[str, Any]:
        runs = [{"op": op, "conditions": {"threads": 1}, "rows": [len(ops)]} for op in ops]
        return {"schema": harness.SCHEMA, "machine": machine, "runs": runs}

    path = tmp_path / "kernels.json"
    run.write(path, result("sample", "token_stats"))
    merged = run.merged(result("sample"), path)
    assert [(one["op"], one["rows"]) for one in merged["runs"]] == [("token_stats", [2]), ("sample", [1])]
    assert run.merged(result("sample", machine="another"), path)["runs"] == result("sample")["runs"]


def test_summary_renders(kernels: dict[str, Any], tmp_path: Path) -> None:
    judged = kernels["runs"][0]["rows"][0]
    judged["targets"] = [Target("torch eager", at_least=20).judge(21.0), Target(FLOOR, at_most=1.5).judge(0.5)]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- kernels -->\nold\n<!-- /kernels -->\nafter\n")
    run.write(tmp_path / "kernels.json", kernels)
    summary.write(tmp_path, docs=tmp_path / "docs", readme=readme)

    document = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| `token_stats` | 1 row | float32 | ≥ 20× torch eager | 21.0× | yes |" in document
    assert "| `token_stats` | 1 row | float32 | ≤ 1.5× the floor | 2.00× | **no** |" in document
    for op in run.OPS:
        assert f"## `{op}`" in document
    for block in document.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, "a table's lines have one number of columns"
    assert (tmp_path / "docs" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")

    text = readme.read_text()
    assert text.startswith("before\n<!-- kernels -->\n")
    assert text.endswith("\n<!-- /kernels -->\nafter\n")
    assert "old" not in text
    for headline in summary.HEADLINES:
        assert f"| `{headline.op}` | {headline.case} |" in text


def test_the_cache_is_measured_and_reported() -> None:
    step = cache.measure_step(64, SETTINGS)
    ragged = cache.measure_ragged(3, 16, SETTINGS)
    assert step["bytes"] == cache.LAYERS * 2 * cache.HEADS * cache.WIDTH * 2
    lines = summary.cache_lines({"shape": "28 layers", "step": step, "ragged": ragged})
    for name in (cache.OURS, cache.THEIRS, cache.FLOOR, cache.IN_PLACE, cache.HOLES, cache.COMPACTED):
        assert any(line.startswith(f"| {name} |") for line in lines)


def test_readme_section_of_the_embedded_pair() -> None:
    method = {"attribute_accuracy": 0.925, "bleu4": 80.0, "escalated_share": 0.25}
    speed = {"latency_ms": 21.4, "speedup": 1.5}
    split = {
        "clips": 300,
        "methods": dict.fromkeys(summary.NAMES, method),
        "speed": dict.fromkeys(summary.NAMES, speed),
    }
    section = summary.embedded_pair_section({"splits": dict.fromkeys(summary.SPLITS, split)})
    assert "92.5% | 80.0 | 25.0% | 21 ms | 1.50×" in section
    assert "92.5% | 80.0 | – | 21 ms | 1.50×" in section


def test_text_without_markers_stays() -> None:
    assert summary.replace_section("text\n", "kernels", "table") == "text\n"


def test_assisted_generation_hears_once_it_is_patched_and_all_decode_the_same() -> None:
    (pair,) = assisted.tiny_pairs((0.02,), 16)
    row = assisted.measure(pair, SETTINGS)
    assert row["targets"] == {}  # nothing is judged at these sizes
    assert row["tokens"] == 16
    assert set(row["faster"]) == {"stock", "hearing", "verifier's generate"}
    text = "\n".join(summary.assisted_lines({"rows": [row]}))
    assert "| tiny random pair, noise 0.02 |" in text
    model, heard = pair.draft.model, []
    hook = model.model.audio_tower.register_forward_pre_hook(lambda *_: heard.append(True))
    settings = {"do_sample": False, "max_new_tokens": 4, "assistant_model": model}
    pair.verifier.model.generate(**pair.inputs[0], **settings)
    assert not heard
    with assisted.hearing(model):
        pair.verifier.model.generate(**pair.inputs[0], **settings)
    hook.remove()
    assert heard == [True]
