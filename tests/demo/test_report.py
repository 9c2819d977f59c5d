"""The HTML report: its structure by a parser, and what Debian's Chromium makes of it from file://."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.demo.chromium import Chromium
from tests.demo.samples import decode, make_comparison, speculate
from ugsd_fast.audio import Audio
from ugsd_fast.decoding import BlockRecord, UGSDConfig
from ugsd_fast.demo import report
from ugsd_fast.demo.run import Comparison

VOID = {"meta", "link", "br", "input", "img", "hr", "rect", "line", "path", "circle", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {[tag for tag, *_ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.elements.append(element)
        if tag not in VOID or (tag in ("circle", "path") and element[1].get("class") in ("mark", "mark chosen")):
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        # what a screen reader hears, and what is not struck out
        hidden = [tag for tag, attributes, _ in self._open if tag == "del" or attributes.get("aria-hidden") == "true"]
        for tag, _, text in self._open:
            if not hidden or tag in hidden:
                text.append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements whose attributes contain these words."""
        return [
            (found, " ".join("".join(text).split()))
            for name, found, text in self.elements
            if name == tag
            and all(
                set(value.split()) <= set(found.get(key.strip("_").replace("_", "-"), "").split())
                for key, value in attributes.items()
            )
        ]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make_comparison()


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return report.render(comparison, title="A <title> & more")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_is_one_document_with_language_title_and_viewport(html: str, page: Page) -> None:
    assert html.startswith("<!doctype html>")
    assert page.find("html")[0][0]["lang"] == "en"
    assert page.find("title")[0][1] == "A <title> & more"
    assert "width=device-width" in page.find("meta", name="viewport")[0][0]["content"]


def test_loads_nothing_from_anywhere(html: str, page: Page) -> None:
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            if name in attributes:
                assert attributes[name].startswith("data:"), attributes
    assert not re.search(r"@import|url\(", html)
    assert not re.search(r"""["'(]\s*(https?:)?//""", html)
    policy = next(a["content"] for a, _ in page.find("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_headings_do_not_skip_levels(page: Page) -> None:
    levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_every_reference_to_an_id_has_its_element(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_tables_have_scopes_and_can_be_scrolled_by_keyboard(page: Page) -> None:
    assert all(attributes.get("scope") in ("row", "col") for attributes, _ in page.find("th"))
    regions = page.find("div", _class="scroll")
    assert len(regions) == len(page.find("table")) == 2
    assert all(a["tabindex"] == "0" and ("aria-label" in a or "aria-labelledby" in a) for a, _ in regions)


def test_pictures_players_and_checkboxes_have_names(page: Page) -> None:
    for attributes, _ in page.find("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
    assert all(attributes["aria-label"] for attributes, _ in page.find("audio"))
    labels = " ".join(text for _, text in page.find("label"))
    assert "entropy values" in labels
    assert len(page.find("label")) == len(page.find("input"))


def test_text_is_escaped(html: str) -> None:
    assert "&lt;the weather &amp; the sea&gt;" in html
    assert "<the weather" not in html


def test_captions_read_as_they_were_written(comparison: Comparison, page: Page) -> None:
    shown = page.find("p", _class="text")
    expected = []
    for index, utterance in enumerate(comparison.utterances):
        expected += [comparison.results[method][index].text for method in ("edge", "ugsd", "verifier")]
        expected.append(utterance.reference)
    assert len(shown) == len(expected)
    assert [text for _, text in shown] == expected


def test_every_token_has_its_entropy_and_source(comparison: Comparison, page: Page) -> None:
    shown = [a for a, _ in page.find("span", _class="t") if "title" in a]
    records = [
        token
        for index in range(len(comparison.utterances))
        for method in ("edge", "ugsd", "verifier")
        for token in comparison.results[method][index].trace.tokens()
    ]
    assert len(shown) == len(records)
    for attributes, token in zip(shown, records):
        marks = attributes["class"].split()
        assert f"{token.source}:" in attributes["title"]
        assert (token.source in marks) == (token.source in ("accepted", "corrected", "bonus"))
        if token.entropy is None:
            assert "data-h" not in attributes
        else:
            assert attributes["data-h"] == f"{token.entropy:.2f}"
            assert f"e{report.level_of(token.entropy)}" in marks


def test_escalated_blocks_are_outlined_with_their_verdict(comparison: Comparison, page: Page) -> None:
    blocks = [block for result in comparison.results["ugsd"] for block in result.trace.blocks if block.escalated]
    shown = [a for a, _ in page.find("span", _class="esc") if "title" in a]
    assert blocks
    assert len(shown) == len(blocks)
    for attributes, block in zip(shown, blocks):
        verdict = f"{block.num_accepted} of {len(block.draft_tokens)} draft tokens accepted"
        assert verdict in attributes["title"]
        assert f"uncertainty {block.uncertainty:.2f} > 1.0 nats" in attributes["title"]


def test_rejected_draft_tokens_are_kept(comparison: Comparison, page: Page) -> None:
    dropped = [
        decode(list(block.draft_tokens[block.num_accepted :]))
        for result in comparison.results["ugsd"]
        for block in result.trace.blocks
        if block.num_accepted < len(block.draft_tokens)
    ]
    assert dropped
    assert [text for _, text in page.find("del")] == dropped


def test_audio_is_inside_and_whole(comparison: Comparison, page: Page) -> None:
    players = page.find("audio")
    assert len(players) == len(comparison.utterances)
    for (attributes, _), utterance in zip(players, comparison.utterances):
        kind, data = attributes["src"].split(",", 1)
        assert kind == "data:audio/flac;base64"
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert rate == utterance.audio.rate
        np.testing.assert_allclose(samples, utterance.audio.samples, atol=1e-4)


def test_table_has_the_summaries(comparison: Comparison, page: Page) -> None:
    columns = [heading for heading, _ in report.table_columns(comparison)]
    assert columns[:3] == ["BLEU-1", "BLEU-4", "Attributes"]
    rows = dict(report.table_rows(comparison))
    assert list(rows) == ["edge", "ugsd", "verifier", "lossless"]
    summary = comparison.summaries["ugsd"]
    cells = dict(zip(columns, rows["ugsd"]))
    assert cells["BLEU-4"] == f"{summary.bleu4:.1f}"
    assert cells["Attributes"] == f"{100 * summary.attribute_accuracy:.1f}%"
    assert cells["Latency"] == f"{1e3 * summary.latency:.0f} ms"
    assert cells["Escalated"] == f"{100 * summary.escalated_share:.0f}%"
    assert dict(zip(columns, rows["edge"]))["Escalated"] == "–"
    shown = [text for _, text in page.find("td")]
    assert all(cell in shown for cell in rows["ugsd"])


def test_plot_says_every_point_in_words_and_shapes(comparison: Comparison) -> None:
    svg = str(report.quality_plot(comparison, "bleu4", "BLEU-4"))
    Page(svg)
    for point in comparison.sweep:
        assert f"threshold {point.threshold:g}: {point.summary.bleu4:.1f}" in svg
    assert svg.count("<circle") == len(comparison.sweep) - 1
    assert svg.count('class="mark chosen"') == svg.count('class="mark edge"') == svg.count('class="line verifier"') == 1
    assert "fill=" not in svg  # ink is the page's, in either theme


@pytest.mark.parametrize("share", [None, 0.0, 0.97])
def test_plot_stays_inside_its_box(comparison: Comparison, share: float | None) -> None:
    if share is not None:  # all points in one place
        summary = dataclasses.replace(comparison.sweep[0].summary, escalated_share=share)
        sweep = [dataclasses.replace(point, summary=summary) for point in comparison.sweep]
        comparison = dataclasses.replace(comparison, sweep=sweep)
    svg = str(report.quality_plot(comparison, "attribute_accuracy", "Attribute accuracy", 100.0, "%"))
    width, height = (float(value) for value in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    assert all(0 <= float(x) <= width for x in re.findall(r'\bc?x="([\d.]+)"', svg))
    for x, anchor, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]+)<', svg):
        share_before = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        assert float(x) - share_before * 7 * len(text) >= 0
        assert float(x) + (1 - share_before) * 7 * len(text) <= width
    assert all(0 <= float(y) <= height for y in re.findall(r'\bc?y="([\d.]+)"', svg))


@pytest.mark.parametrize(
    ("low", "high"),
    [(64.7, 75.8), (0, 100), (99.2, 99.9), (50, 50), (0, 0), (100, 100), (90, 100 + 1e-12), (0.31, 0.33)],
)
def test_axes_are_round_and_wide_enough(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high - 1e-9
    assert ticks[-1] <= max(100, high)
    assert ticks[0] >= 0


def test_says_what_is_lossless(page: Page, comparison: Comparison) -> None:
    text = " ".join(text for _, text in page.find("section", aria_labelledby="exact"))
    assert "UGSD is lossy by design" in text
    assert "the verifier's own first choice" in text  # rank 1
    assert "3 of 3 captions equal the verifier's own" in text
    lossless = dataclasses.replace(
        comparison, config=UGSDConfig(always_escalate=True, rule="greedy"), sweep=[], results=dict(comparison.results)
    )
    assert "This run is lossless." in report.render(lossless)


def test_carries_its_data(comparison: Comparison, page: Page) -> None:
    data = json.loads("".join(next(text for tag, a, text in page.elements if a.get("id") == "data")))
    assert data["config"]["entropy_threshold"] == 1.0
    assert [clip["results"]["ugsd"]["text"] for clip in data["clips"]] == [
        result.text for result in comparison.results["ugsd"]
    ]
    assert data["summaries"]["edge"]["bleu4"] == pytest.approx(comparison.summaries["edge"].bleu4, rel=1e-4)


def test_infinite_threshold_is_still_json(comparison: Comparison) -> None:
    endless = dataclasses.replace(comparison, config=UGSDConfig(entropy_threshold=math.inf), sweep=[])
    html = report.render(endless)
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1)
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_without_references_their_parts_are_absent() -> None:
    html = report.render(make_comparison(2, references=False))
    page = Page(html)
    assert not page.find("div", _class="reference")
    assert not page.find("figure")
    assert "BLEU" not in html
    assert "ttribute accuracy" not in html
    assert not page.find("p", _class="attributes")
    assert len(page.find("article")) == 2


@pytest.mark.parametrize("method", ["edge", "verifier"])
def test_one_method_alone(method: str) -> None:
    whole = make_comparison(1, references=False)
    alone = dataclasses.replace(whole, results={method: whole.results[method]})
    page = Page(report.render(alone))
    assert len(page.find("p", _class="text")) == 1


def test_failures_are_named() -> None:
    comparison = make_comparison(1, references=False)
    comparison.failures = {"bad.wav": "bad.wav: is <silent>"}
    assert "bad.wav: is &lt;silent&gt;" in report.render(comparison)


def test_unverified_blocks_say_so() -> None:
    block = BlockRecord(0, (1, 2), (2.0, 0.1), 2.0, True, 2, (1, 2), 0.1, 0.1, False)
    assert "stands unverified" in report._block_tip(1, block, 1.0)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("level", range(len(report.LEVELS)))
def test_ink_on_every_entropy_colour_has_contrast(theme: str, level: int) -> None:
    background, ink = getattr(report.LEVELS[level], theme)
    assert contrast(background, ink) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_entropy_colours_differ_in_lightness_alone(theme: str) -> None:
    lightness = [luminance(getattr(level, theme)[0]) for level in report.LEVELS]
    assert lightness == sorted(lightness, reverse=theme == "light")
    ratios = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in itertools.pairwise(lightness)]
    assert min(ratios) > 1.1


def test_levels_are_ordered_and_cover_all_entropies() -> None:
    assert [report.level_of(h) for h in (0.0, 0.05, 0.3, 0.99, 1.5, 11.9, math.inf)] == [0, 1, 2, 3, 4, 5, 5]
    assert report.level_of(None) is None


def test_pieces_join_to_the_text_whatever_the_tokens() -> None:
    tokens = list("naïve “quoted” 🙂".encode())

    def decode_bytes(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    parts = report.pieces(decode_bytes, tokens)
    assert len(parts) == len(tokens)
    assert "".join(parts) == "naïve “quoted” 🙂"
    assert "\ufffd" not in "".join(parts)
    assert report.pieces(decode_bytes, [0xC3]) == ["\ufffd"]


def test_clipping_audio_is_scaled_not_cut() -> None:
    samples = np.array([0.5, -2.0, 1.0] * 100, dtype=np.float32)
    data = report.audio_uri(Audio(samples, 16_000, "loud")).split(",")[1]
    decoded, _ = soundfile.read(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_allclose(decoded, samples / 2, atol=1e-3)


def test_waveform_of_the_shortest_clip() -> None:
    assert report.waveform(Audio(np.array([0.5], np.float32), 16_000, "click")).count("M") == 1


class TestWriting:
    def test_replaces_whole_and_leaves_nothing_beside(self, tmp_path: Path) -> None:
        target = tmp_path / "r.html"
        target.write_text("old")
        report.write(target, "new ü")
        assert target.read_text(encoding="utf-8") == "new ü"
        assert os.listdir(tmp_path) == ["r.html"]

    def test_a_failure_leaves_the_old_report(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "r.html"
        target.write_text("old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report.os, "replace", full)
        with pytest.raises(OSError, match=re.escape(f"{target}: cannot be written (No space left on device)")):
            report.write(target, "new")
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["r.html"]

    def test_check_leaves_no_trace(self, tmp_path: Path) -> None:
        assert report.check_writable(tmp_path / "r.html") == tmp_path / "r.html"
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [(".", "(is a directory)"), ("none/r.html", "(its folder does not exist)"), ("x" * 300, "too long)")],
    )
    def test_check_refuses(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(OSError, match=re.escape(message)) as caught:
            report.check_writable(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot be written")

    def test_check_refuses_a_protected_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "r.html"
        target.write_text("old")
        monkeypatch.setattr(report.os, "access", lambda path, mode: False)
        with pytest.raises(PermissionError, match="is write-protected"):
            report.check_writable(target)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def written(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(tmp_path_factory.mktemp("report") / "report.html", html)


VIEWS = [(360, False), (360, True), (1200, False), (1200, True)]


@pytest.mark.parametrize(("width", "dark"), VIEWS, ids=[f"{w}-{'dark' if d else 'light'}" for w, d in VIEWS])
class TestInChromium:
    def test_renders_without_complaint_or_request(
        self, chromium: Chromium, written: Path, width: int, dark: bool
    ) -> None:
        chromium.open(written, width=width, dark=dark)
        assert chromium.evaluate("document.readyState") == "complete"
        assert chromium.complaints() == []
        assert chromium.requests() == [written.as_uri()]

    def test_never_scrolls_sideways(self, chromium: Chromium, written: Path, width: int, dark: bool) -> None:
        chromium.open(written, width=width, dark=dark)
        script = """(() => {
          for (const box of document.querySelectorAll('input')) if (box.id != 'only-different') box.click();
          document.querySelector('details').open = true;
          const wide = [...document.body.querySelectorAll('*')].filter(one =>
            !one.closest('.scroll') && one.getBoundingClientRect().right > innerWidth + 0.5);
          return [document.documentElement.scrollWidth, innerWidth, wide.map(one => one.className || one.tagName)];
        })()"""
        content, window, wide = chromium.evaluate(script)
        assert (content, window, wide) == (width, width, [])

    def test_players_load_their_sound(self, chromium: Chromium, written: Path, width: int, dark: bool) -> None:
        chromium.open(written, width=width, dark=dark)
        script = """Promise.all([...document.querySelectorAll('audio')].map(audio => new Promise((ready, fail) => {
          if (audio.readyState >= 1) ready(audio.duration);
          audio.addEventListener('loadedmetadata', () => ready(audio.duration));
          audio.addEventListener('error', () => fail(audio.error.message));
        })))"""
        assert chromium.evaluate(script) == pytest.approx([1.0, 1.0, 1.0], abs=0.01)

    def test_text_has_contrast_in_its_theme(self, chromium: Chromium, written: Path, width: int, dark: bool) -> None:
        chromium.open(written, width=width, dark=dark)
        # every element with text of its own: its ink, and the nearest background that is not transparent
        script = """[...document.body.querySelectorAll('*')].filter(one => one.checkVisibility()
            && !one.closest('svg, script') && [...one.childNodes].some(c => c.nodeType == 3 && c.data.trim()))
          .map(one => {
            let behind = one, background;
            do { background = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
            while (background == 'rgba(0, 0, 0, 0)' && behind);
            return [one.className || one.tagName, getComputedStyle(one).color, background];
          })"""
        found = {tuple(one) for one in chromium.evaluate(script)}
        assert len(found) > 10
        for name, ink, background in found:
            assert contrast(background, ink) >= 4.5, (name, ink, background)

    def test_switches_work_without_script(self, chromium: Chromium, written: Path, width: int, dark: bool) -> None:
        chromium.open(written, width=width, dark=dark)
        shown = "[...document.querySelectorAll('%s')].filter(one => one.checkVisibility()).length"
        assert chromium.evaluate(shown % "del") == 0
        chromium.evaluate("document.getElementById('show-rejected').click()")
        assert chromium.evaluate(shown % "del") > 0
        chromium.evaluate("document.getElementById('only-different').click()")
        assert chromium.evaluate(shown % "article") == 2  # of the first clip all captions are the same


def test_prints_light_and_without_controls(chromium: Chromium, written: Path) -> None:
    chromium.open(written, width=800, dark=True, media="print")
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not chromium.evaluate("document.querySelector('.controls').checkVisibility()")


def test_thickness_says_the_entropy_too(chromium: Chromium, written: Path) -> None:
    chromium.open(written, width=1200)
    script = """[...document.querySelectorAll('.legend .t')].slice(0, %d)
      .map(one => parseFloat(getComputedStyle(one).borderBottomWidth))"""
    bars = chromium.evaluate(script % len(report.LEVELS))
    assert bars == sorted(set(bars))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG) of a #rrggbb or rgb(r, g, b) colour."""
    if colour.startswith("#"):
        channels = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        channels = [int(value) for value in re.findall(r"\d+", colour)[:3]]
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_speculation_of_the_samples_is_consistent() -> None:
    result = speculate("a b c", "a x c", np.random.default_rng(0), 0.1)
    assert result.text == "a x c"
    assert result.trace.tokens()[1].source == "corrected"
