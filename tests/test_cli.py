"""The command line: what is printed where, and which code it ends with, in good times and bad."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from tests import checkpoints
from tests.demo import fake_pair
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig, cli, demo, doctor, errors
from ugsd_fast.audio import load_audio
from ugsd_fast.decoding import config
from ugsd_fast.demo import report

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_pair.build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_pair.build_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def run(pair_folder: Path, clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command inside an empty folder, with random models in place of the embedded pair."""
    monkeypatch.setattr(demo, "PAIR_FOLDER", pair_folder)
    monkeypatch.setattr(demo, "CLIPS_FOLDER", clips_folder)
    monkeypatch.chdir(tmp_path)

    def call(*args: object, stdin: bytes | None = None) -> Result:
        result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is never the answer
        return result

    return call


@pytest.fixture
def clip(clips_folder: Path) -> Path:
    return clips_folder / "clip-0.flac"


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    """One file for each thing that can be wrong with a file."""
    tone = fake_pair.tone(200)
    wrong = {
        "silent": tone * 0,
        "nan": np.where(np.arange(len(tone)) == 99, np.nan, tone),
        "empty": tone[:0],
        "long": fake_pair.tone(200, seconds=5.0),
    }
    paths = {name: tmp_path / f"{name}.wav" for name in wrong}
    for name, samples in wrong.items():
        soundfile.write(paths[name], samples, fake_pair.RATE, subtype="FLOAT")
    paths["text"] = tmp_path / "text.wav"
    paths["text"].write_text("This is not audio.")
    paths["zero"] = tmp_path / "zero.wav"
    paths["zero"].touch()
    paths["missing"] = tmp_path / "missing.wav"
    paths["folder"] = tmp_path / "folder.wav"
    paths["folder"].mkdir()
    return paths


def one_line(result: Result) -> str:
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


class TestCaption:
    def test_prints_the_decoder_s_caption_bare(self, run: Run, clip: Path, pair_folder: Path) -> None:
        result = run("caption", clip)
        pair = demo.load_pair(pair_folder)
        expected = Decoder(pair.draft, pair.verifier, pair.config).generate(
            clip, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens
        )
        assert (result.exit_code, result.stdout, result.stderr) == (0, expected.text + "\n", "")

    def test_json_is_the_only_output_and_complete(self, run: Run, clips_folder: Path) -> None:
        clips = sorted(clips_folder.glob("*.flac"))[:2]
        result = run("caption", "--json", *clips)
        assert (result.exit_code, result.stderr) == (0, "")
        records = [
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
            for line in result.stdout.splitlines()
        ]
        assert [record["file"] for record in records] == [str(clip) for clip in clips]
        for record in records:
            assert list(record) == ["file", "text", "tokens", "blocks", "metrics"]
            assert [token for block in record["blocks"] for token in block["emitted"]] == record["tokens"]
            assert len(record["tokens"]) <= 12
            assert record["metrics"]["latency"] > 0
            assert len(record["blocks"][0]["draft_tokens"]) == fake_pair.CONFIG["block_size"]

    def test_several_files_are_a_line_each(self, run: Run, clips_folder: Path) -> None:
        clips = sorted(clips_folder.glob("*.flac"))
        result = run("caption", *clips)
        assert result.exit_code == 0
        assert [line.split("\t")[0] for line in result.stdout.rstrip("\n").split("\n")] == [str(c) for c in clips]

    @pytest.mark.parametrize("batch", [2, 3, 9])
    def test_captions_do_not_depend_on_the_batch(self, batch: int, run: Run, clips_folder: Path) -> None:
        clips = sorted(clips_folder.glob("*.flac"))
        assert run("caption", *clips, "--batch", batch).stdout == run("caption", *clips).stdout
        one, several = (run("caption", clips[0], *options).stdout for options in ((), ("--batch", batch)))
        assert one == several

    def test_dash_reads_a_wav_from_standard_input(self, run: Run, clip: Path) -> None:
        buffer = io.BytesIO()
        soundfile.write(buffer, *soundfile.read(clip), format="WAV")
        assert run("caption", "-", stdin=buffer.getvalue()).stdout == run("caption", clip).stdout

    def test_any_rate_and_channels(self, run: Run, tmp_path: Path) -> None:
        stereo = np.stack([fake_pair.tone(200)] * 2, axis=1)
        soundfile.write(tmp_path / "stereo.wav", stereo, 44_100)
        assert run("caption", tmp_path / "stereo.wav").exit_code == 0

    def test_options_reach_the_decoder(self, run: Run, clip: Path) -> None:
        options = ("--threshold", 0, "--block-size", 3, "--rule", "rank", "--rank", 2, "--gate", "mean")
        record = json.loads(run("caption", clip, "--json", "--max-new-tokens", 7, *options).stdout)
        assert len(record["tokens"]) == 7
        assert all(block["escalated"] for block in record["blocks"])
        first = record["blocks"][0]
        assert len(first["draft_tokens"]) == 3
        assert first["uncertainty"] == pytest.approx(sum(first["entropy"]) / 3)

    def test_always_escalate_with_greedy_is_the_verifier(self, run: Run, clip: Path) -> None:
        lossless = json.loads(run("caption", clip, "--json", "--always-escalate", "--rule", "greedy").stdout)
        verifier = json.loads(run("caption", clip, "--json", "--only", "verifier").stdout)
        assert lossless["tokens"] == verifier["tokens"]
        assert verifier["metrics"]["drafter_forwards"] == 0

    def test_only_edge_asks_no_verifier(self, run: Run, clip: Path) -> None:
        record = json.loads(run("caption", clip, "--json", "--only", "edge", "--threshold", 0).stdout)
        assert record["metrics"]["verifier_forwards"] == 0

    def test_sampling_follows_the_seed(self, run: Run, clip: Path) -> None:
        options = ("caption", clip, "--temperature", 3, "--rule", "exact", "--always-escalate")
        one, same, other = (run(*options, "--seed", seed).stdout for seed in (1, 1, 2))
        assert one == same != other

    def test_models_by_path_have_the_paper_s_settings(self, run: Run, clip: Path, pair_folder: Path) -> None:
        models = ("--draft", pair_folder / "draft", "--verifier", pair_folder / "verifier")
        record = json.loads(run("caption", clip, "--json", "--max-new-tokens", 8, *models).stdout)
        assert len(record["blocks"][0]["draft_tokens"]) == UGSDConfig().block_size == 5

    def test_a_terminal_sees_the_text_and_a_summary(
        self, run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rich.console import Console

        monkeypatch.setattr(cli, "_console", lambda: Console(force_terminal=True, no_color=True, width=200))
        plain = run("caption", "--json", clip)
        shown = run("caption", clip)
        assert json.loads(plain.stdout)["text"].split()[0] in shown.stdout
        assert "12 tokens in " in shown.stdout
        assert "escalated" in run("caption", clip, "--threshold", 0).stdout
        together = run("caption", clip, clip, "--batch", 2).stdout
        assert together.count("12 tokens in ") == together.count(str(clip)) == 2


class TestFamilies:
    """``caption --draft Qwen/Qwen2.5-Omni-3B --verifier Qwen/Qwen3-Omni-30B-A3B-Instruct`` and its like, by path."""

    PAIRS = (
        ("qwen2_5_omni", "qwen3_omni"),
        ("qwen2_audio", "qwen2_5_omni"),
        ("qwen3_omni", "qwen2_audio"),
    )

    @pytest.mark.parametrize(("draft", "verifier"), PAIRS)
    def test_checkpoints_in_hub_layout(
        self, run: Run, clip: Path, checkpoint: Callable[..., Path], draft: str, verifier: str
    ) -> None:
        models = ("--draft", checkpoint(draft), "--verifier", checkpoint(verifier), "--dtype", "float32")
        lossless = ("--always-escalate", "--rule", "greedy", "--max-new-tokens", 12, "--json")
        result = run("caption", clip, *models, *lossless)
        assert (result.exit_code, result.stderr) == (0, "")
        found = json.loads(result.stdout)
        alone = json.loads(run("caption", clip, *models[2:], "--only", "verifier", *lossless[3:]).stdout)
        assert found["tokens"] == alone["tokens"]
        assert found["metrics"]["drafter_forwards"] == sum(len(block["draft_tokens"]) for block in found["blocks"])
        assert alone["metrics"]["drafter_forwards"] == 0

    def test_settings_are_the_papers(self, run: Run, clip: Path, checkpoint: Callable[..., Path]) -> None:
        models = ("--draft", checkpoint("qwen2_5_omni"), "--verifier", checkpoint("qwen3_omni"))
        blocks = json.loads(run("caption", clip, *models, "--max-new-tokens", 15, "--json").stdout)["blocks"]
        assert all(block["escalated"] == (block["uncertainty"] > UGSDConfig().entropy_threshold) for block in blocks)
        assert all(len(block["draft_tokens"]) <= 5 for block in blocks)


class TestReport:
    def test_compares_three_ways(self, run: Run, clips_folder: Path, tmp_path: Path) -> None:
        clips = sorted(clips_folder.glob("*.flac"))[:2]
        result = run("caption", "--report", "out.html", "--json", *clips)
        assert (result.exit_code, result.stderr) == (0, "report: out.html\n")
        html = (tmp_path / "out.html").read_text(encoding="utf-8")
        data = json.loads(html.split('id="data">')[1].split("</script>")[0])
        assert [clip["name"] for clip in data["clips"]] == ["clip-0.flac", "clip-1.flac"]
        assert set(data["clips"][0]["results"]) == {"edge", "ugsd", "verifier"}
        printed = [json.loads(line)["text"] for line in result.stdout.splitlines()]
        assert [clip["results"]["ugsd"]["text"] for clip in data["clips"]] == printed

    def test_names_what_it_left_out(self, run: Run, clip: Path, bad: dict[str, Path], tmp_path: Path) -> None:
        assert run("caption", "--report", "out.html", bad["silent"], clip).exit_code == 1
        assert "silent.wav: is silent" in (tmp_path / "out.html").read_text(encoding="utf-8")

    def test_none_is_written_where_nothing_was_captioned(self, run: Run, bad: dict[str, Path], tmp_path: Path) -> None:
        assert run("caption", "--report", "out.html", bad["silent"]).exit_code == 3
        assert not list(tmp_path.glob("*.html*"))

    @pytest.mark.parametrize("target", ["none/out.html", "."])
    def test_an_unwritable_target_is_found_before_the_work(
        self, run: Run, clip: Path, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(AudioLM, "from_pretrained", lambda *_, **__: pytest.fail("models were loaded"))
        result = run("caption", "--report", target, clip)
        assert (result.exit_code, result.stdout) == (5, "")
        assert "cannot be written" in one_line(result)

    def test_a_disk_that_fills_up_later(
        self, run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report.os, "replace", full)
        result = run("caption", "--report", "out.html", clip)
        assert result.exit_code == 5
        assert result.stdout.strip()  # the caption is not lost
        assert "No space left on device" in one_line(result)
        assert not list(tmp_path.iterdir())


class TestBadAudio:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing", "no such file"),
            ("folder", "is a directory"),
            ("zero", "is empty (0 bytes)"),
            ("empty", "is empty (0 samples)"),
            ("text", "is not audio that libsndfile reads"),
            ("silent", "is silent"),
            ("nan", "1 of 16000 samples are NaN"),
            ("long", "5.00 s"),
        ],
    )
    def test_is_one_line_and_code_3(self, run: Run, bad: dict[str, Path], name: str, message: str) -> None:
        result = run("caption", bad[name])
        assert (result.exit_code, result.stdout) == (3, "")
        said = one_line(result)
        assert said.startswith(str(bad[name]))
        assert message in said

    def test_does_not_wait_for_models(self, run: Run, bad: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(AudioLM, "from_pretrained", lambda *_, **__: pytest.fail("models were loaded"))
        assert run("caption", bad["silent"], bad["text"]).exit_code == 3

    def test_does_not_touch_the_other_files(self, run: Run, clips_folder: Path, bad: dict[str, Path]) -> None:
        first, second = sorted(clips_folder.glob("*.flac"))[:2]
        result = run("caption", "--json", first, bad["nan"], bad["long"], second)
        assert result.exit_code == 1
        assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == [str(first), str(second)]
        assert result.stderr.count("error: ") == 2

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_files_captioned_together_fail_each_for_itself(
        self, batch: int, run: Run, clips_folder: Path, bad: dict[str, Path]
    ) -> None:
        first, second = sorted(clips_folder.glob("*.flac"))[:2]
        files = (bad["silent"], first, bad["long"], second, bad["missing"])
        result = run("caption", *files, "--batch", batch)
        assert result.exit_code == 1
        assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [str(first), str(second)]
        told = [line.removeprefix("error: ") for line in result.stderr.splitlines()]
        assert [line.startswith(str(bad[name])) for line, name in zip(told, ("silent", "long", "missing"), strict=True)]
        assert all("expected" in line or "no such file" in line for line in told)

    def test_a_verifier_that_fails_for_one_file(
        self, run: Run, clips_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clips = sorted(clips_folder.glob("*.flac"))[:3]
        open_session, opened = LocalVerifier.open, []

        def open_some(self: LocalVerifier, *args: object, **kwargs: object) -> object:
            opened.append(1)
            if len(opened) == 2:
                raise errors.VerifierUnavailable("verifier: no answer")
            return open_session(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(LocalVerifier, "open", open_some)
        for batch in (1, 3):
            opened.clear()
            result = run("caption", *clips, "--batch", batch)
            assert result.exit_code == 1
            assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [str(clips[0]), str(clips[2])]
            assert one_line(result) == f"{clips[1]}: verifier: no answer"

    def test_nothing_on_standard_input(self, run: Run) -> None:
        result = run("caption", "-", stdin=b"")
        assert result.exit_code == 3
        assert one_line(result) == "-: standard input: is empty (0 bytes), expected audio"


class TestBadModels:
    def test_no_such_folder(self, run: Run, clip: Path, tmp_path: Path) -> None:
        result = run("caption", clip, "--draft", tmp_path / "none", "--verifier", tmp_path / "none")
        assert (result.exit_code, result.stdout) == (4, "")
        assert "cannot load model" in one_line(result)

    def test_unknown_hub_id(self, run: Run, clip: Path) -> None:
        result = run("caption", clip, "--draft", "nobody/nothing", "--verifier", "nobody/nothing")
        assert result.exit_code == 4
        assert "nobody/nothing" in one_line(result)

    def test_damaged_weights(self, run: Run, clip: Path, pair_folder: Path, tmp_path: Path) -> None:
        broken = checkpoints.copy_checkpoint(pair_folder / "draft", tmp_path / "broken")
        (broken / "model.safetensors").write_bytes(b"broken")
        result = run("caption", clip, "--draft", broken, "--verifier", broken)
        assert result.exit_code == 4
        assert "broken" in one_line(result)

    def test_vocabularies_that_differ(
        self, run: Run, clip: Path, pair_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise errors.VocabularyMismatchError("vocabularies differ in 3 of 448 text tokens")

        monkeypatch.setattr("ugsd_fast.decoding.decoder.translation_between", refuse)
        result = run("caption", clip)
        assert result.exit_code == 4
        assert "vocabularies differ" in one_line(result)

    def test_no_embedded_pair(self, run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "PAIR_FOLDER", tmp_path)
        result = run("caption", clip)
        assert result.exit_code == 4
        assert "pair.json does not exist" in one_line(result)

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried 7 GiB")])
    def test_out_of_memory(self, run: Run, clip: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        def exhaust(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Decoder, "generate", exhaust)
        result = run("caption", clip)
        assert result.exit_code == 4
        assert "out of memory" in one_line(result)

    def test_a_bug_is_not_hidden(self, run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(Decoder, "generate", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            run("caption", clip)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("caption",), "Missing argument"),
        (("caption", "x.wav", "--rule", "best"), "--rule"),
        (("caption", "x.wav", "--rank", "0"), "--rank"),
        (("caption", "x.wav", "--threshold", "-1"), "--threshold"),
        (("caption", "x.wav", "--threshold", "nan"), "--threshold"),
        (("caption", "x.wav", "--draft", "a"), "--verifier is missing"),
        (("caption", "x.wav", "--verifier", "a"), "--draft is missing"),
        (("caption", "x.wav", "--only", "edge", "--verifier", "a"), "no meaning"),
        (("caption", "x.wav", "--only", "verifier", "--draft", "a"), "no meaning"),
        (("caption", "-", "-"), "more than once"),
        (("caption", "x.wav", "--batch", "0"), "--batch"),
        (("caption", "x.wav", "--batch", "2", "--report", "out.html"), "--batch has no meaning with --report"),
        (("caption", "x.wav", "--unknown"), "No such option"),
        (("demo", "--clips", "0"), "--clips"),
        (("nonsense",), "No such command"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_code_2(run: Run, args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rule", "greedy", "--temperature", "1"), "rule='greedy' with temperature=1.0"),
        (("--device", "abacus"), "--device abacus cannot be used here"),
    ],
)
def test_settings_without_meaning_are_code_2(run: Run, clip: Path, options: tuple[str, ...], message: str) -> None:
    result = run("caption", clip, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in one_line(result)


def test_choices_are_those_of_the_config() -> None:
    assert tuple(rule.value for rule in cli.Rule) == get_args(config.Rule)
    assert tuple(gate.value for gate in cli.Gate) == get_args(config.Gate)


class TestDemo:
    def test_shows_captions_and_writes_the_report(self, run: Run, tmp_path: Path) -> None:
        result = run("demo")
        assert result.exit_code == 0
        assert result.stderr == "report: demo-report.html\n"
        for wanted in ("clip-0.flac", "clip-3.flac", "UGSD", "reference", "% escalated", "Latency, median", "BLEU-4"):
            assert wanted in result.stdout
        html = (tmp_path / "demo-report.html").read_text(encoding="utf-8")
        data = json.loads(html.split('id="data">')[1].split("</script>")[0])
        assert len(data["clips"]) == 4
        assert {point["threshold"] for point in data["sweep"]} == {5.0, 0.2, 1.0, 1.5}
        assert set(data["summaries"]) == {"edge", "ugsd", "verifier", "lossless"}
        for clip in data["clips"]:
            assert clip["results"]["lossless"]["tokens"] == clip["results"]["verifier"]["tokens"]
        assert "4 of 4 captions equal the verifier" in html

    def test_fewer_clips(self, run: Run) -> None:
        result = run("demo", "--clips", 2, "--report", "two.html")
        assert result.exit_code == 0
        assert [f"clip-{index}.flac" in result.stdout for index in range(4)] == [True, True, False, False]

    def test_unwritable_report(self, run: Run) -> None:
        result = run("demo", "--report", "none/out.html")
        assert (result.exit_code, result.stdout) == (5, "")

    def test_missing_clips(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "CLIPS_FOLDER", tmp_path)
        result = run("demo")
        assert result.exit_code == 4
        assert "clips.json" in one_line(result)


class TestDoctor:
    def test_json_has_every_op_and_its_backend(self, run: Run) -> None:
        result = run("doctor", "--json")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["problems"] == []
        assert found["versions"]["torch"]
        assert found["pair"]["present"]
        assert found["pair"]["bytes"] > 100_000
        assert found["cpu"]["threads"] >= 1
        assert set(found["ops"]) >= {"token_stats", "accept_block", "gate_block", "sample"}
        for op in found["ops"].values():
            assert op["uses"]["cpu"] in op["available"]
            assert set(op["missing"]).isdisjoint(op["available"])
        if found["cpu"]["isa"] is not None:
            assert found["cpu"]["isa"] in found["cpu"]["isa_available"]
            assert found["ops"]["token_stats"]["uses"]["cpu"] == "cpp"

    def test_says_reference_where_there_is_nothing_else(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from ugsd_fast import ops
        from ugsd_fast.ops.backend import Backends

        listed = Backends({"sample": ("reference",)}, {"sample": {"cpp": "not built"}})
        monkeypatch.setattr(ops, "backends", lambda: listed)
        assert json.loads(run("doctor", "--json").stdout)["ops"]["sample"] == {
            "uses": {"cpu": "reference"},
            "available": ["reference"],
            "missing": {"cpp": "not built"},
        }

    def test_leaves_the_instruction_set_as_it_was(self, run: Run) -> None:
        from ugsd_fast.ops.backend import isa

        before = isa()
        assert json.loads(run("doctor", "--json").stdout)["cpu"]["isa"] == before
        assert isa() == before

    def test_cuda_kernels_built_or_not(self, run: Run) -> None:
        found = json.loads(run("doctor", "--json").stdout)["cuda_kernels"]
        built = importlib.util.find_spec("ugsd_fast._cuda") is not None
        assert (found["architectures"] is not None) == built
        if not torch.cuda.is_available():
            assert found["reason"]
        line = next(line for line in run("doctor").stdout.splitlines() if line.startswith("CUDA kernels"))
        assert ("built for sm_" in line) == built
        assert ("not built: " in line) != built

    @pytest.mark.parametrize(
        ("capability", "driver", "line"),
        [
            ("9.0", "13.0", "built for sm_90, PTX of compute_80; driver of CUDA 13.0"),
            ("12.0", "13.0", "built for sm_90, PTX of compute_80; driver of CUDA 13.0"),
            (None, None, "built for sm_90, PTX of compute_80; no driver; not used: there is no CUDA driver"),
            (None, "13.0", "driver of CUDA 13.0; not used: torch sees no CUDA device"),
            ("7.5", "13.0", "not used: the GPU has compute capability 7.5: set UGSD_CUDA_ARCHS and build anew"),
        ],
    )
    def test_cuda_kernels_of_a_build(
        self, monkeypatch: pytest.MonkeyPatch, capability: str | None, driver: str | None, line: str
    ) -> None:
        kernels = SimpleNamespace(architectures=lambda: "sm_90 compute_80")
        monkeypatch.setitem(sys.modules, "ugsd_fast.kernels.cuda", kernels)
        monkeypatch.setattr("ugsd_fast.kernels.cuda", kernels, raising=False)
        monkeypatch.setattr(doctor, "_driver", lambda: driver)
        assert line in doctor._cuda_line(doctor._cuda_kernels(capability))

    def test_prints_what_is_wrong(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "PAIR_FOLDER", tmp_path)
        result = run("doctor")
        assert result.exit_code == 1
        assert "problem: embedded pair" in result.stdout
        assert "token_stats" in result.stdout


def command(*args: str, **settings: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ugsd_fast.cli", *args], capture_output=True, timeout=60, check=False, **settings
    )


def test_help_is_quick_and_tells_the_exit_codes() -> None:
    best = 60.0
    for _ in range(3):
        start = time.perf_counter()
        result = command("caption", "--help", text=True)
        best = min(best, time.perf_counter() - start)
    assert result.returncode == 0
    assert "5: the report cannot be written" in result.stdout
    assert best < 0.5 or os.getloadavg()[0] > os.cpu_count(), f"{best:.2f} s"


def test_help_and_bad_files_import_no_torch() -> None:
    script = "import sys; from ugsd_fast.cli import app\ntry: app({args!r})\nexcept SystemExit: pass\n"
    script += "assert not {{'torch', 'transformers', 'matplotlib'}} & sys.modules.keys()"
    for args in (["--help"], ["caption", "--help"], ["--version"], ["caption", "nowhere.wav"]):
        result = subprocess.run(
            [sys.executable, "-c", script.format(args=args)], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr


def test_version() -> None:
    import ugsd_fast

    assert command("--version", text=True).stdout.strip() == ugsd_fast.__version__


def test_letters_that_the_output_does_not_have(pair_folder: Path, clip: Path) -> None:
    script = """import pathlib, sys
from ugsd_fast import cli, demo
demo.PAIR_FOLDER = pathlib.Path(sys.argv.pop(1))
for options in ([], ["--json"]):
    try:
        sys.argv[2:] = [sys.argv[2], *options]
        cli.main()
    except SystemExit as end:
        assert end.code == 0
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(pair_folder), "caption", str(clip)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    plain, record = result.stdout.decode("ascii").rsplit("\n", 2)[:2]
    assert "?" in plain
    assert "\ufffd" in json.loads(record)["text"]


def test_a_reader_that_goes_away_is_no_error() -> None:
    result = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m ugsd_fast.cli caption --help | head -c 1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert len(result.stdout) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not (demo.PAIR_FOLDER / "pair.json").exists(), reason="the embedded pair is not built here")
def test_the_embedded_pair_captions_an_embedded_clip() -> None:
    clip = demo.clips()[0]
    result = command("caption", str(clip.path), text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("The speaker sounds ")


def test_local_verifier_is_what_the_decoder_gets(run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        Decoder, "generate", lambda self, audio, **request: seen.append((self, audio, request)) or _empty_result()
    )
    assert run("caption", clip, "--prompt", "Say it.", "--max-new-tokens", 3).exit_code == 0
    decoder, audio, request = seen[0]
    assert isinstance(decoder.verifier, LocalVerifier)
    assert request == {"prompt": "Say it.", "max_new_tokens": 3}
    np.testing.assert_array_equal(audio.samples, load_audio(clip).samples)


def _empty_result() -> object:
    from ugsd_fast.decoding import Result as Decoded
    from ugsd_fast.decoding import Trace

    trace = Trace()
    metrics = trace.metrics(latency=0.1, time_to_first_token=0.1, verifier_forwards=0, drafter_forwards=0)
    return Decoded("", [], trace, metrics)
