"""Make the embedded pair from seeds: data, drafter, verifier, export, evaluation. This is what ``make pair`` runs.

Shards and trainings that have finished are not repeated; a training that was cut off continues from its last
checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.embedded_pair import evaluate, export
from examples.embedded_pair.dataset import make_dataset
from examples.embedded_pair.train import RECIPES, run

TRAIN_SHARDS = 20
UNTUNED_THRESHOLD = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("build/embedded_pair"))
    arguments = parser.parse_args()
    work = arguments.work_dir
    make_dataset(work / "data", TRAIN_SHARDS)
    for name, recipe in RECIPES.items():
        run(name, recipe, work, TRAIN_SHARDS)
    training = export.export_models(work, TRAIN_SHARDS)
    export.export_clips(work)
    export.write_settings(UNTUNED_THRESHOLD, training, TRAIN_SHARDS)
    evaluate.evaluate_pair(work)


if __name__ == "__main__":
    main()
