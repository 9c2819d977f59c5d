"""Every way in which audio comes, and every way in which it must not come through."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ugsd_fast.audio import Audio, load_audio
from ugsd_fast.errors import AudioError

RATE = 16_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def encoded(samples: np.ndarray = TONE, rate: int = RATE, format: str = "WAV", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0.0),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.6),  # a coder with a delay: only its length and level are compared
    ],
)
def test_reads_what_libsndfile_reads(tmp_path: Path, format: str, subtype: str, tolerance: float) -> None:
    path = tmp_path / f"tone.{format.lower()}"
    path.write_bytes(encoded(format=format, subtype=subtype))
    audio = load_audio(path)
    assert (audio.rate, audio.name, audio.samples.dtype) == (RATE, str(path), np.float32)
    assert audio.duration == pytest.approx(1.0, abs=0.1)
    assert np.abs(audio.samples).max() == pytest.approx(0.5, abs=0.05)
    if format != "MP3":
        np.testing.assert_allclose(audio.samples, TONE, rtol=0, atol=tolerance)


@pytest.mark.parametrize("as_source", [str, Path, lambda p: p.read_bytes(), lambda p: io.BytesIO(p.read_bytes())])
def test_paths_bytes_and_file_objects_are_alike(tmp_path: Path, as_source: Any) -> None:
    path = tmp_path / "tone.wav"
    path.write_bytes(encoded(subtype="FLOAT"))
    np.testing.assert_array_equal(load_audio(as_source(path)).samples, TONE)


def test_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(encoded(subtype="FLOAT"))))
    audio = load_audio("-")
    np.testing.assert_array_equal(audio.samples, TONE)
    assert audio.name == "standard input"


@pytest.mark.parametrize("size", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"], ids=["ffmpeg", "sox"])
def test_wav_of_a_pipe_does_not_know_its_size(size: bytes) -> None:
    data = bytearray(encoded())
    at = data.find(b"data") + 4
    data[at : at + 4] = data[4:8] = size
    assert len(load_audio(bytes(data)).samples) == len(TONE)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([16384, -16384], np.int16), [0.5, -0.5]),
        (np.array([2**30, -(2**31)], np.int32), [0.5, -1.0]),
        (np.array([64, -128], np.int8), [0.5, -1.0]),
        (np.array([192, 0], np.uint8), [0.5, -1.0]),
        (np.array([49152, 0], np.uint16), [0.5, -1.0]),
        (np.array([0.5, -0.5], np.float16), [0.5, -0.5]),
        (np.array([0.5, -0.5], np.float64), [0.5, -0.5]),
        ([0.5, -0.5], [0.5, -0.5]),
        (torch.tensor([0.5, -0.5]), [0.5, -0.5]),
        (np.array([0.5, 9, -0.5, 9], np.float32)[::2], [0.5, -0.5]),
    ],
    ids=["int16", "int32", "int8", "uint8", "uint16", "float16", "float64", "list", "tensor", "strided"],
)
def test_every_dtype_has_full_scale_one(samples: Any, expected: list[float]) -> None:
    audio = load_audio((samples, RATE))
    np.testing.assert_array_equal(audio.samples, np.float32(expected))
    assert audio.samples.flags.c_contiguous
    assert audio.samples.dtype == np.float32


@pytest.mark.parametrize("shape", ["[N, C]", "[C, N]"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged_in_either_layout(shape: str, channels: int) -> None:
    levels = np.linspace(0.2, 1.0, channels, dtype=np.float32)
    samples = TONE[:, None] * levels
    audio = load_audio((samples if shape == "[N, C]" else samples.T, RATE))
    np.testing.assert_allclose(audio.samples, TONE * levels.mean(), atol=1e-6)


def test_stereo_file_becomes_mono() -> None:
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    np.testing.assert_allclose(load_audio(encoded(stereo, subtype="FLOAT")).samples, TONE / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_resampling_keeps_pitch_level_and_length(rate: int) -> None:
    seconds = np.arange(2 * rate) / rate
    audio = load_audio((0.5 * np.sin(2 * np.pi * 440 * seconds), rate), rate=RATE)
    assert audio.rate == RATE
    assert len(audio.samples) == 2 * RATE
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    inner = slice(RATE // 4, -RATE // 4)  # the edges ring
    np.testing.assert_allclose(audio.samples[inner], wanted[inner], atol=1e-4)


def test_resampling_removes_what_would_alias() -> None:
    seconds = np.arange(48_000) / 48_000
    audio = load_audio((np.sin(2 * np.pi * 11_000 * seconds) + 0.1, 48_000), rate=RATE)
    assert np.abs(audio.samples[2000:-2000] - 0.1).max() < 1e-3


def test_audio_passes_through_untouched() -> None:
    audio = Audio(TONE, RATE, "tone")
    assert load_audio(audio).samples is not None
    np.testing.assert_array_equal(load_audio(audio, rate=RATE).samples, TONE)
    assert load_audio(audio).name == "tone"
    assert audio.resampled(RATE) is audio


BAD = {
    "no such file": ("nowhere.wav", "nowhere.wav: no such file"),
    "folder": (os.curdir, "is a directory, expected an audio file"),
    "null byte in the path": ("a\0b.wav", "cannot be read"),
    "text": (b"this is not audio at all, it is a sentence", "is not audio that libsndfile reads"),
    "no bytes": (b"", "is empty (0 bytes)"),
    "no samples in a file": (encoded(TONE[:0]), "is empty (0 samples)"),
    "no samples in an array": ((TONE[:0], RATE), "is empty (shape (0,))"),
    "zeros": ((TONE * 0, RATE), "is silent (peak below -90 dBFS)"),
    "below -90 dBFS": ((TONE * 5e-5, RATE), "is silent"),
    "channels that cancel": ((np.stack([TONE, -TONE]), RATE), "is silent once its 2 channels are mixed"),
    "NaN": ((np.array([0.1, np.nan, 0.2]), RATE), "1 of 3 samples are NaN or infinite"),
    "infinity": ((np.array([0.1, np.inf, -np.inf]), RATE), "2 of 3 samples are NaN or infinite"),
    "NaN in a file": (encoded(np.array([0.1, np.nan] * 50), subtype="FLOAT"), "50 of 100 samples are NaN"),
    "int16 scale as floats": ((TONE * 32768, RATE), "peak at 16384, expected full scale 1"),
    "int64": ((np.array([1, 2]), RATE), "dtype int64, expected floats"),
    "bool": ((np.array([True, False]), RATE), "dtype bool, expected floats"),
    "complex": ((np.array([1j]), RATE), "dtype complex128, expected floats"),
    "strings": ((np.array(["a"]), RATE), "expected floats"),
    "ragged": (([[0.1, 0.2], [0.3]], RATE), "cannot become a numpy array"),
    "three dimensions": ((np.ones((2, 3, 4)), RATE), "shape (2, 3, 4), expected [N], [N, C] or [C, N]"),
    "scalar": ((np.float32(0.5), RATE), "shape (), expected [N]"),
    "a picture": ((np.full((64, 48), 0.5), RATE), "with at most 32 channels"),
    "rate 0": ((TONE, 0), "rate is 0, expected whole Hz from 1000 to 768000"),
    "negative rate": ((TONE, -16_000), "rate is -16000"),
    "broken rate": ((TONE, 16_000.5), "rate is 16000.5"),
    "NaN rate": ((TONE, float("nan")), "rate is nan"),
    "rate in words": ((TONE, "16k"), "rate is '16k'"),
    "rate True": ((TONE, True), "rate is True"),
    "kHz": ((TONE, 16), "rate is 16, expected whole Hz"),
    "a triple": ((TONE, RATE, 1), "a tuple of 3 items, expected (array, rate)"),
    "a bare array": (TONE, "got ndarray, expected a path"),
    "None": (None, "got NoneType, expected a path"),
    "text file object": (io.StringIO("RIFF"), "reading it gives str, expected bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    source, message = BAD[case]
    with pytest.raises(AudioError, match=re.escape(message)) as caught:
        load_audio(source)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_messages_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "quiet.wav"
    path.write_bytes(encoded(TONE * 0))
    with pytest.raises(AudioError, match=re.escape(f"{path}: is silent")):
        load_audio(path)


def test_refuses_a_bad_target_rate() -> None:
    with pytest.raises(AudioError, match="rate is 0"):
        load_audio((TONE, RATE), rate=0)


def test_refuses_what_resampling_leaves_nothing_of() -> None:
    with pytest.raises(AudioError, match="1 samples at 768000 Hz leave nothing at 1000 Hz"):
        load_audio((np.array([0.5]), 768_000), rate=1_000)


def test_a_file_that_breaks_off_gives_what_is_there_or_says_so() -> None:
    data = encoded(np.tile(TONE, 40), format="FLAC")
    with pytest.raises(AudioError, match="is broken after|is not audio"):
        load_audio(data[: len(data) // 2])


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AudioError, match=r"locked.wav: cannot be read \(Permission denied\)"):
        load_audio(tmp_path / "locked.wav")


@pytest.mark.parametrize("source", [(TONE, RATE), encoded(), Audio(TONE, RATE, "tone")])
def test_too_long(source: Any) -> None:
    assert load_audio(source, max_seconds=1.0).duration == 1.0
    with pytest.raises(AudioError, match="lasts 1.00 s, expected at most 0.5 s"):
        load_audio(source, max_seconds=0.5)
