"""The embedded pair's loader, its clips, and the three-way comparison."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from tests.demo import fake_pair
from tests.demo.samples import make_comparison
from ugsd_fast import Decoder, UGSDConfig, demo
from ugsd_fast.audio import Audio, load_audio
from ugsd_fast.demo import run
from ugsd_fast.demo.attributes import ATTRIBUTES, attribute_accuracy, compose, matches
from ugsd_fast.errors import ModelError

BUILT = pytest.mark.skipif(not (demo.PAIR_FOLDER / "pair.json").exists(), reason="the embedded pair is not built here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_pair.build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> demo.EmbeddedPair:
    return demo.load_pair(folder, threads=1)


def utterance(pitch: float = 150.0, reference: str | None = "The speaker sounds happy.") -> run.Utterance:
    return run.Utterance(f"{pitch}", Audio(fake_pair.tone(pitch), fake_pair.RATE, "tone"), reference)


class TestLoading:
    def test_models_settings_and_threads(self, pair: demo.EmbeddedPair) -> None:
        assert pair.config == UGSDConfig(**fake_pair.CONFIG)
        assert (pair.prompt, pair.max_new_tokens) == ("Describe the voice.", 12)
        assert torch.get_num_threads() == 1
        assert pair.draft.device.type == "cpu"
        assert pair.verifier.model.device.type == "cpu"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist"),
            ("{", "is damaged"),
            ("{}", "is damaged"),
            ('{"prompt": "", "max_new_tokens": 1, "config": {"rank": 0}}', "rank is 0"),
            ('{"prompt": "", "max_new_tokens": 1, "config": {"colour": 0}}', "is damaged"),
        ],
    )
    def test_a_damaged_pair_says_so(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "pair.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            demo.load_pair(tmp_path)

    def test_missing_weights(self, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "pair.json").write_bytes((folder / "pair.json").read_bytes())
        with pytest.raises(ModelError, match="draft"):
            demo.load_pair(tmp_path)

    def test_clips_in_their_order(self, tmp_path: Path) -> None:
        found = demo.clips(fake_pair.build_clips(tmp_path))
        assert [clip.path.name for clip in found] == [f"clip-{index}.flac" for index in range(4)]
        assert found[1].voice == "v1"
        assert load_audio(found[2].path).duration == 1.0

    @pytest.mark.parametrize(("content", "message"), [(None, "no clips.json"), ('[{"file": "a"}]', "is damaged")])
    def test_a_damaged_list_of_clips_says_so(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "clips.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            demo.clips(tmp_path)


class TestComparer:
    @pytest.fixture
    def comparer(self, pair: demo.EmbeddedPair) -> run.Comparer:
        config = UGSDConfig(block_size=4, rank=1, entropy_threshold=1.0)
        return run.Comparer(pair.draft, pair.verifier, config, prompt="Go.", max_new_tokens=10, methods=run.FOUR_WAYS)

    def test_each_method_is_the_decoder_of_its_name(self, comparer: run.Comparer, pair: demo.EmbeddedPair) -> None:
        clip = utterance()
        results = comparer.add(clip)
        request = {"prompt": "Go.", "max_new_tokens": 10}
        config = comparer.comparison.config
        edge = Decoder(pair.draft, None, config).generate(clip.audio, **request)
        verifier = Decoder(None, pair.verifier, config).generate(clip.audio, **request)
        assert results["edge"].tokens == edge.tokens
        assert results["verifier"].tokens == results["lossless"].tokens == verifier.tokens
        assert results["lossless"].metrics.escalated_share == 1.0
        assert results["edge"].metrics.verifier_forwards == results["verifier"].metrics.drafter_forwards == 0
        assert comparer.comparison.agreement("lossless") == (1, 1)

    def test_a_result_that_is_there_is_not_made_again(self, comparer: run.Comparer) -> None:
        clip = utterance()
        ready = comparer.decoders["ugsd"].generate(clip.audio, max_new_tokens=2)
        assert comparer.add(clip, {"ugsd": ready})["ugsd"] is ready
        assert comparer.comparison.results["ugsd"] == [ready]

    def test_methods_take_turns(self, comparer: run.Comparer, monkeypatch: pytest.MonkeyPatch) -> None:
        ready = comparer.add(utterance())
        order: list[str] = []
        names = {id(decoder): method for method, decoder in comparer.decoders.items()}

        def note(self: Decoder, audio: object, **_: object) -> object:
            order.append(names[id(self)])
            return ready[names[id(self)]]  # type: ignore[index]

        monkeypatch.setattr(Decoder, "generate", note)
        comparer.add(utterance())
        comparer.add(utterance())
        assert order[:4] == ["ugsd", "verifier", "lossless", "edge"]
        assert order[4:] == ["verifier", "lossless", "edge", "ugsd"]

    def test_warming_up_leaves_nothing(self, comparer: run.Comparer) -> None:
        comparer.warm_up(utterance())
        assert comparer.comparison.utterances == []
        assert all(results == [] for results in comparer.comparison.results.values())

    def test_sweep_rises_and_reuses_the_configured_threshold(self, comparer: run.Comparer) -> None:
        for pitch in (150, 220):
            comparer.add(utterance(pitch))
        points = list(comparer.sweep((0.0, 1.0, 100.0)))
        assert [point.threshold for point in points] == [0.0, 1.0, 100.0]
        assert points[1].summary == comparer.comparison.summaries["ugsd"]
        assert points[0].summary.escalated_share == 1.0
        assert points[2].summary.escalated_share == 0.0
        assert comparer.comparison.sweep == points

    def test_one_model_alone(self, pair: demo.EmbeddedPair) -> None:
        for draft, verifier, method in ((pair.draft, None, "edge"), (None, pair.verifier, "verifier")):
            comparer = run.Comparer(draft, verifier, pair.config, max_new_tokens=4)
            assert list(comparer.add(utterance())) == [method]
            assert comparer.comparison.decode([]) == ""

    def test_sampling_has_no_lossless_row(self, pair: demo.EmbeddedPair) -> None:
        config = UGSDConfig(temperature=1.0, rule="exact")
        assert list(run.Comparer(pair.draft, pair.verifier, config, methods=run.FOUR_WAYS).decoders) == [
            *run.THREE_WAYS
        ]


class TestSummary:
    def test_pools_blocks_and_takes_medians_of_times(self) -> None:
        comparison = make_comparison(3)
        results = comparison.results["ugsd"]
        summary = comparison.summaries["ugsd"]
        assert summary.latency == statistics.median(result.metrics.latency for result in results)
        blocks = [block for result in results for block in result.trace.blocks]
        escalated = sum(len(block.draft_tokens) for block in blocks if block.escalated)
        assert summary.escalated_share == escalated / sum(len(block.draft_tokens) for block in blocks)
        total = sum(result.metrics.latency for result in results)
        assert summary.tokens_per_second == pytest.approx(sum(len(r.tokens) for r in results) / total)

    def test_accuracy_is_the_mean_over_clips(self) -> None:
        comparison = make_comparison(3)
        references = comparison.references
        assert references is not None
        expected = statistics.fmean(
            attribute_accuracy(result.text, reference)
            for result, reference in zip(comparison.results["edge"], references, strict=True)
        )
        assert comparison.summaries["edge"].attribute_accuracy == pytest.approx(expected)
        assert 0 < expected < 1

    def test_no_quality_without_references(self) -> None:
        comparison = make_comparison(2, references=False)
        assert comparison.references is None
        summary = comparison.summaries["ugsd"]
        assert summary.bleu1 is summary.bleu4 is summary.attribute_accuracy is None
        assert comparison.gap_recovered("bleu4") is None

    def test_one_clip_without_reference_is_enough_to_leave_quality_out(self) -> None:
        comparison = make_comparison(2)
        comparison.utterances[0] = run.Utterance("bare", comparison.utterances[0].audio)
        assert comparison.references is None

    def test_gap(self) -> None:
        comparison = make_comparison(3)
        edge, ugsd, verifier = (comparison.summaries[method].bleu4 for method in run.THREE_WAYS)
        assert comparison.gap_recovered("bleu4") == pytest.approx((ugsd - edge) / (verifier - edge))
        comparison.results["edge"] = comparison.results["verifier"]
        del comparison.__dict__["summaries"]
        assert comparison.gap_recovered("bleu4") is None

    def test_bleu_is_sacrebleu_s(self) -> None:
        from sacrebleu import corpus_bleu

        captions = ["the speaker sounds sad and slow today", "a loud and happy voice"]
        references = ["the speaker sounds sad and quick today", "a loud and angry voice"]
        assert run.bleu(captions, references, order=4) == corpus_bleu(captions, [references]).score
        assert run.bleu(captions, references, order=1) == pytest.approx(100 * 10 / 12)

    def test_everything_is_json(self) -> None:
        text = json.dumps(make_comparison(1).to_dict())
        assert json.loads(text)["clips"][0]["results"]["ugsd"]["blocks"]

    def test_machine_names_what_figures_depend_on(self) -> None:
        found = run.machine()
        assert found["Threads used"] == str(torch.get_num_threads())
        assert torch.__version__ in found["Versions"]
        assert found["Processor"]


@pytest.fixture(scope="module")
def built() -> demo.EmbeddedPair:
    return demo.load_pair(threads=1)


@BUILT
class TestEmbedded:
    def test_ships_its_own_settings(self, built: demo.EmbeddedPair) -> None:
        assert (built.config.rule, built.config.rank) == ("rank", 1)
        assert 0 < built.config.entropy_threshold < math.inf

    def test_weighs_at_most_32_mib(self) -> None:
        assert sum(path.stat().st_size for path in demo.PAIR_FOLDER.rglob("*")) <= 32 * 2**20

    def test_clips_are_real_and_captioned(self) -> None:
        clips = demo.clips()
        assert len(clips) >= 24
        for clip in clips:
            audio = load_audio(clip.path)
            assert 0.5 < audio.duration <= 4.0
            assert clip.sentence
            assert all(matches(compose(dict(clip.attributes)), clip.caption).values())  # type: ignore[arg-type]
            assert set(clip.attributes) >= set(ATTRIBUTES)

    def test_captions_name_attributes(self, built: demo.EmbeddedPair) -> None:
        comparer = run.Comparer(
            built.draft,
            built.verifier,
            built.config,
            prompt=built.prompt,
            max_new_tokens=built.max_new_tokens,
            methods=run.FOUR_WAYS,
            matches=matches,
        )
        for clip in demo.clips()[:5]:
            comparer.add(run.Utterance(clip.path.name, load_audio(clip.path), clip.caption))
        summaries = comparer.comparison.summaries
        assert summaries["verifier"].attribute_accuracy >= 0.6
        assert summaries["ugsd"].escalated_share < 0.6
        same, clips = comparer.comparison.agreement("lossless")
        assert same == clips
