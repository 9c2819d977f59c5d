"""The embedded pair: two small audio-language models and held-out clips that ship with the library.

They make the library's main job run offline, within seconds, on any CPU; how they were made and what they cannot do is
in ``pair/MODEL_CARD.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ugsd_fast.errors import ModelError

if TYPE_CHECKING:
    from ugsd_fast import AudioLM, LocalVerifier, UGSDConfig

PAIR_FOLDER = Path(__file__).parent / "pair"
CLIPS_FOLDER = Path(__file__).parent / "clips"


@dataclass(frozen=True)
class EmbeddedPair:
    """Drafter and verifier with the settings they were tuned for.

    Attributes
    ----------
    draft : AudioLM
        The small model.
    verifier : LocalVerifier
        The deep one.
    config : UGSDConfig
        The pair's own defaults: at its vocabulary of under a thousand tokens the paper's rank of 20 would accept
        anything.
    prompt : str
        The instruction that both were trained on.
    max_new_tokens : int
        Longer than any caption they write.
    """

    draft: AudioLM
    verifier: LocalVerifier
    config: UGSDConfig
    prompt: str
    max_new_tokens: int


@dataclass(frozen=True)
class Clip:
    """A held-out clip, of a voice and a sentence that neither model was trained on.

    Attributes
    ----------
    path : Path
        FLAC file.
    caption : str
        Reference caption.
    attributes : mapping of str to str
        What the clip was synthesised with, such as its emotion and pace.
    sentence : str
        The words that are spoken.
    voice : str
        Who speaks them.
    """

    path: Path
    caption: str
    attributes: Mapping[str, Any]
    sentence: str = ""
    voice: str = ""


def load_pair(folder: str | os.PathLike[str] | None = None, *, threads: int | None = None) -> EmbeddedPair:
    """Load the embedded pair on the CPU.

    Parameters
    ----------
    folder : path, optional
        Another pair in the same layout: ``draft`` and ``verifier`` checkpoints and ``pair.json``.
    threads : int, optional
        CPU threads of torch, for the whole process. One is fastest for models as small as these.

    Raises
    ------
    ModelError
        If the pair is missing or damaged.

    Examples
    --------
    >>> pair = load_pair(threads=1)
    >>> pair.config.rule, pair.config.rank
    ('rank', 1)
    """
    settings = pair_settings(folder)
    import torch

    from ugsd_fast import AudioLM, LocalVerifier

    if threads is not None:
        torch.set_num_threads(threads)
    root = Path(folder or PAIR_FOLDER)
    return EmbeddedPair(
        draft=AudioLM.from_pretrained(root / "draft", device="cpu"),
        verifier=LocalVerifier(AudioLM.from_pretrained(root / "verifier", device="cpu")),
        config=settings.config,
        prompt=settings.prompt,
        max_new_tokens=settings.max_new_tokens,
    )


@dataclass(frozen=True)
class PairSettings:
    """What ``pair.json`` holds: the fields of `EmbeddedPair` that are not models."""

    config: UGSDConfig
    prompt: str
    max_new_tokens: int


def pair_settings(folder: str | os.PathLike[str] | None = None) -> PairSettings:
    """The settings of the embedded pair, without loading its models.

    Raises
    ------
    ModelError
        If ``pair.json`` is missing or does not make sense.
    """
    path = Path(folder or PAIR_FOLDER) / "pair.json"
    from ugsd_fast import UGSDConfig

    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        config = UGSDConfig(**settings["config"])
        return PairSettings(config, str(settings["prompt"]), int(settings["max_new_tokens"]))
    except FileNotFoundError:
        raise ModelError(f"embedded pair: {path} does not exist, expected it to be installed") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"embedded pair: {path} is damaged ({type(error).__name__}: {error})") from error


def clips(folder: str | os.PathLike[str] | None = None) -> list[Clip]:
    """The held-out clips, in their fixed order.

    Raises
    ------
    ModelError
        If the clips are missing or their list is damaged.

    Examples
    --------
    >>> len(clips()) >= 24
    True
    """
    root = Path(folder or CLIPS_FOLDER)
    try:
        listed = json.loads((root / "clips.json").read_text(encoding="utf-8"))
        return [
            Clip(
                path=root / entry["file"],
                caption=entry["caption"],
                attributes=entry["attributes"],
                sentence=entry.get("sentence", ""),
                voice=str(entry.get("voice", "")),
            )
            for entry in listed
        ]
    except FileNotFoundError:
        raise ModelError(f"embedded clips: {root} has no clips.json, expected it to be installed") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"embedded clips: {root / 'clips.json'} is damaged ({error!r})") from error


__all__ = ["Clip", "EmbeddedPair", "PairSettings", "clips", "load_pair", "pair_settings"]
