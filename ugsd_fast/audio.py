"""Speech from wherever it lies, as the one form that the models take: mono float32 samples and their rate.

Whatever would caption silently wrong (silence, NaN, a rate of 0, samples on the int16 scale held as floats)
is refused here with an `AudioError` that names what was wrong, what was got and what is expected.
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from ugsd_fast.errors import AudioError

SILENCE_DBFS = -90.0  # below the least significant bit of 16-bit audio
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz; what libsndfile and soxr both take in earnest
MAX_CHANNELS = 32
_MAX_PEAK = 32.0  # +30 dBFS: beyond it a float array holds integers that nobody divided
_READ_FRAMES = 1 << 18

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | tuple[Any, int] | Audio"


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono audio in memory.

    Parameters
    ----------
    samples : np.ndarray
        float32 ``[N]``, full scale is ±1.
    rate : int
        Samples per second, Hz.
    name : str
        Where it came from, for messages and reports.

    Examples
    --------
    >>> Audio(np.zeros(8000, dtype=np.float32), 16_000, "pause").duration
    0.5
    """

    samples: np.ndarray
    rate: int
    name: str

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate

    def wav(self) -> bytes:
        """The audio as a WAV file of float32 samples."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, self.samples, self.rate, format="WAV", subtype="FLOAT")
        return file.getvalue()

    def resampled(self, rate: int) -> Audio:
        """The same audio at another rate (soxr, very high quality); itself where the rate is right."""
        rate = _checked_rate(rate, self.name)
        if rate == self.rate:
            return self
        import soxr

        samples = soxr.resample(self.samples, self.rate, rate, quality="VHQ")
        if samples.size == 0:
            had = f"{len(self.samples)} samples at {self.rate} Hz"
            raise AudioError(f"{self.name}: {had} leave nothing at {rate} Hz, expected speech")
        return Audio(np.ascontiguousarray(samples, dtype=np.float32), rate, self.name)


def load_audio(source: AudioSource, *, rate: int | None = None, max_seconds: float | None = None) -> Audio:
    """Read audio, mix it down to mono and resample it.

    Parameters
    ----------
    source : path, "-", bytes, binary file object, (array, rate) or Audio
        A path or bytes hold any format that libsndfile reads (WAV, FLAC, OGG/Opus, MP3, AIFF, ...); ``"-"``
        is standard input. An array is ``[N]``, ``[N, C]`` or ``[C, N]`` (the shorter axis is the channels);
        floats have full scale ±1, integers of 8 to 32 bits have that of their type.
    rate : int, optional
        Rate wanted, Hz; by default the source's own.
    max_seconds : float, optional
        Refuse what is longer; a file is refused before it is read to its end.

    Returns
    -------
    Audio
        Mono float32 samples.

    Raises
    ------
    AudioError
        If the source is missing, not audio, broken, empty, silent (peak below -90 dBFS), not finite, too
        long, or has an impossible rate, shape or dtype.

    Examples
    --------
    >>> tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    >>> audio = load_audio((tone, 48_000), rate=16_000)
    >>> audio.samples.shape, audio.samples.dtype.name, audio.duration
    ((16000,), 'float32', 1.0)
    >>> load_audio("no-such-file.wav")
    Traceback (most recent call last):
        ...
    ugsd_fast.errors.AudioError: no-such-file.wav: no such file
    """
    if isinstance(source, Audio):
        samples, source_rate, name = source.samples, source.rate, source.name
    elif isinstance(source, tuple):
        if len(source) != 2:
            raise AudioError(f"audio: got a tuple of {len(source)} items, expected (array, rate)")
        samples, source_rate, name = source[0], source[1], "array"
    else:
        samples, source_rate, name = _read(source, max_seconds)
    source_rate = _checked_rate(source_rate, name)
    samples = _mono(_as_float(samples, name), name)
    _check_length(len(samples) / source_rate, max_seconds, name)
    audio = Audio(samples, source_rate, name)
    return audio if rate is None else audio.resampled(rate)


def _read(source: Any, max_seconds: float | None) -> tuple[np.ndarray, int, str]:
    """Samples ``[N, C]``, rate and name of a path, "-", bytes or a binary file object."""
    if isinstance(source, (str, os.PathLike)):
        name = "standard input" if source == "-" else os.fspath(source)
        try:
            if source == "-":
                data: object = sys.stdin.buffer.read()
            elif os.path.isdir(source):
                raise AudioError(f"{name}: is a directory, expected an audio file")
            else:
                data = Path(source).read_bytes()
        except FileNotFoundError:
            raise AudioError(f"{name}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            if isinstance(error, AudioError):
                raise
            raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', error)})") from None
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name, data = "bytes", bytes(source)
    elif hasattr(source, "read"):
        name, data = str(getattr(source, "name", "file object")), source.read()
    else:
        expected = "a path, bytes, a binary file object, (array, rate) or Audio"
        raise AudioError(f"audio: got {type(source).__name__}, expected {expected}")
    if not isinstance(data, bytes):
        got = type(data).__name__
        raise AudioError(f"{name}: reading it gives {got}, expected bytes (open it in mode 'rb')")
    samples, rate = _decode(data, name, max_seconds)
    return samples, rate, name


def _decode(data: bytes, name: str, max_seconds: float | None) -> tuple[np.ndarray, int]:
    import soundfile

    if not data:
        raise AudioError(f"{name}: is empty (0 bytes), expected audio")
    blocks: list[np.ndarray] = []
    rate = frames = 0
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = int(file.samplerate)
            # block by block: a header may promise more than there is
            while len(block := file.read(_READ_FRAMES, dtype="float32", always_2d=True)):
                blocks.append(block)
                frames += len(block)
                if max_seconds is not None and frames > max_seconds * rate:
                    _check_length(max(frames, file.frames) / rate, max_seconds, name)
    except (soundfile.SoundFileError, TypeError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(". ")
        if frames:
            raise AudioError(f"{name}: is broken after {frames / rate:.2f} s ({reason})") from None
        raise AudioError(f"{name}: is not audio that libsndfile reads ({reason})") from None
    if not blocks:
        raise AudioError(f"{name}: is empty (0 samples), expected audio")
    return np.concatenate(blocks), rate


def _as_float(samples: Any, name: str) -> np.ndarray:
    """A float32 or float64 array with full scale ±1."""
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors elsewhere than on the CPU
        raise AudioError(f"{name}: samples cannot become a numpy array ({str(error).split('.')[0]})") from None
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "f":
        array = array.astype(np.float32 if bits <= 32 else np.float64, copy=False)
    elif kind == "i" and bits <= 32:
        array = array.astype(np.float64) / 2.0 ** (bits - 1)
    elif kind == "u" and bits <= 32:  # offset binary, as 8-bit WAV
        array = array.astype(np.float64) / 2.0 ** (bits - 1) - 1.0
    elif array.size:
        expected = "floats of full scale 1 or integers of 8 to 32 bits"
        raise AudioError(f"{name}: samples have dtype {array.dtype}, expected {expected}")
    if array.size == 0:
        raise AudioError(f"{name}: is empty (shape {tuple(array.shape)}), expected audio")
    if not np.isfinite(array).all():
        bad = np.count_nonzero(~np.isfinite(array))
        raise AudioError(f"{name}: {bad} of {array.size} samples are NaN or infinite, expected finite ones")
    return array


def _mono(array: np.ndarray, name: str) -> np.ndarray:
    """float32 ``[N]``: the mean over channels."""
    channels = 1
    if array.ndim == 2:
        axis = int(array.shape[1] > array.shape[0])  # of time; [N, C] wins a tie
        channels = array.shape[1 - axis]
        if channels > MAX_CHANNELS:
            shape = f"[N], [N, C] or [C, N] with at most {MAX_CHANNELS} channels"
            raise AudioError(f"{name}: samples have shape {array.shape}, expected {shape}")
    elif array.ndim != 1:
        raise AudioError(f"{name}: samples have shape {array.shape}, expected [N], [N, C] or [C, N]")
    peak = float(np.abs(array).max())
    if peak > _MAX_PEAK:
        raise AudioError(
            f"{name}: float samples peak at {peak:g}, expected full scale 1 (divide 16-bit samples by 32768)"
        )
    if channels > 1:
        array = array.mean(axis=1 - axis, dtype=np.float64)
    array = np.ascontiguousarray(array.reshape(-1), dtype=np.float32)
    if float(np.abs(array).max()) < 10 ** (SILENCE_DBFS / 20):
        why = "" if peak < 10 ** (SILENCE_DBFS / 20) else f" once its {channels} channels are mixed"
        raise AudioError(f"{name}: is silent{why} (peak below {SILENCE_DBFS:.0f} dBFS), expected speech")
    return array


def _checked_rate(rate: Any, name: str) -> int:
    whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if isinstance(rate, (float, np.floating)) and float(rate).is_integer():
        whole = True
    if not whole or not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name}: rate is {rate!r}, expected whole Hz from {MIN_RATE} to {MAX_RATE}")
    return int(rate)


def _check_length(seconds: float, max_seconds: float | None, name: str) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(f"{name}: lasts {seconds:.2f} s, expected at most {max_seconds:g} s")


__all__ = ["Audio", "AudioSource", "load_audio"]
