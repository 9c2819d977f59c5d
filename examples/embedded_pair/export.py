"""From checkpoints to what ships: two model folders, the settings, and the held-out clips."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import soundfile

from examples.embedded_pair.captions import MAX_NEW_TOKENS, PROMPT, build_processor, build_tokenizer
from examples.embedded_pair.dataset import SAMPLE_RATE, load_audio, load_split, plan
from examples.embedded_pair.train import RECIPES, build_model, load_checkpoint
from ugsd_fast.demo import CLIPS_FOLDER, PAIR_FOLDER

BLOCK_SIZE, RANK = 5, 1


def export_models(work: Path, shards: int, target: Path = PAIR_FOLDER) -> dict[str, dict]:
    """Write ``draft`` and ``verifier`` in hub layout, weights in float16.

    Returns
    -------
    dict
        Per model: its recipe, the steps trained and the number of parameters.
    """
    tokenizer = build_tokenizer(load_split(work / "data", [f"train-{i:02d}" for i in range(shards)]).captions)
    processor = build_processor(tokenizer)
    training = {}
    for name, recipe in RECIPES.items():
        saved = load_checkpoint(work / "training" / f"{name}.safetensors")
        model = build_model(recipe, tokenizer, grown=saved.step > recipe.stages["growing"][0])
        model.load_state_dict(saved.part("model"))
        folder = target / name
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        training[name] = {
            **asdict(recipe),
            "steps_done": saved.step,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return training


def export_clips(work: Path, target: Path = CLIPS_FOLDER) -> None:
    """Write the held-out demo clips as 16-bit FLAC, and ``clips.json``."""
    target.mkdir(parents=True, exist_ok=True)
    listed = []
    records = load_split(work / "data", ["clips"]).records
    for index, (record, wave) in enumerate(zip(records, load_audio(work / "data", "clips"), strict=True)):
        file = f"{index + 1:02d}-{record['attributes']['emotion']}.flac"
        soundfile.write(target / file, wave, SAMPLE_RATE, subtype="PCM_16")
        listed.append({"file": file, **record})
    (target / "clips.json").write_text(json.dumps(listed, indent=1) + "\n")


def write_settings(threshold: float, training: dict[str, dict], shards: int, target: Path = PAIR_FOLDER) -> None:
    """Write ``pair.json``."""
    settings = {
        "prompt": PROMPT,
        "max_new_tokens": MAX_NEW_TOKENS,
        "config": {"block_size": BLOCK_SIZE, "entropy_threshold": threshold, "rule": "rank", "rank": RANK},
        "seeds": {shard.name: shard.seed for shard in plan(shards)},
        "training": training,
    }
    (target / "pair.json").write_text(json.dumps(settings, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("build/embedded_pair"))
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--threshold", type=float, default=0.5, help="until evaluate.py has chosen one")
    arguments = parser.parse_args()
    training = export_models(arguments.work_dir, arguments.shards)
    export_clips(arguments.work_dir)
    write_settings(arguments.threshold, training, arguments.shards)


if __name__ == "__main__":
    main()
