"""Measures how ghost batches change quality: networks with BatchNormalization, in groups of several sizes.

    python experiments/benchmarks/engine/ghost_quality.py [--tasks fashion_mnist segmentation] [--seeds 3]
        [--effective 32 128 512] [--epochs 5] [--samples 8192] [--pixels 32] [--results FOLDER] [--json PATH]

The networks and the data of `experiments/fashion_mnist.py` and `experiments/segmentation.py` (there with
BatchNormalization in the place of GroupNormalization, and pictures of `--pixels` on a side), trained once for each
seed, effective batch and column:

- `plain`: Keras at the whole effective batch;
- `ghost 32`, `ghost 16`: the effective batch in groups of 32 or 16 samples;
- `micro 8`, `micro 2`: accumulated over micro-batches of 8 or 2 samples, without ghost batches.

All columns of a row start from the same weights and see the same batches. The learning rate grows with the root of the
effective batch, from 1e-3 at 32. A cell is the mean of the last epoch's val_loss over the seeds, and its largest
difference from that mean. `--results` keeps every training, with all epochs and the task's metric; one that is there is
not repeated, so the table can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the gallery
sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Table, keep, parser

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

RESULTS = Path("mlruns/benchmarks/ghost_quality")
COLUMNS = {"plain": None, "ghost 32": 32, "ghost 16": 16, "micro 8": 8, "micro 2": 2}


def fashion_mnist(options: argparse.Namespace) -> tuple[Any, Any]:
    import fashion_mnist

    return fashion_mnist.make_build_model(True), fashion_mnist.load_data(options.samples)


def segmentation(options: argparse.Namespace) -> tuple[Any, Any]:
    import keras
    import segmentation

    segmentation.SIZE = options.pixels
    # A momentum for the few updates of a short training, as in the other task.
    normalization = keras.layers.BatchNormalization
    return segmentation.make_build_model(lambda: normalization(momentum=0.9)), segmentation.load_data(options.samples)


TASKS = {"fashion_mnist": fashion_mnist, "segmentation": segmentation}


def curves(build: Any, data: Any, column: str, effective: int, seed: int, epochs: int) -> dict[str, list[float]]:
    """What each epoch's validation gave, by metric."""
    import keras
    import keras_tuner

    import accumtune

    x, y, x_val, y_val = data
    keras.utils.set_random_seed(seed)
    model = build(keras_tuner.HyperParameters())
    model.optimizer.learning_rate = 1e-3 * (effective / 32) ** 0.5
    kind, size = column.split()[0], COLUMNS[column]
    if kind == "ghost":
        accumtune.accumulate(model, micro_batch_size=effective, ghost_batch_size=size)
    elif kind == "micro":
        accumtune.accumulate(model, micro_batch_size=size)
    history = model.fit(x, y, batch_size=effective, epochs=epochs, validation_data=(x_val, y_val), verbose=0).history
    keras.backend.clear_session()
    return {name: [float(value) for value in values] for name, values in history.items() if name.startswith("val_")}


def trained(task: str, effective: int, column: str, seed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """The curves of one training, which `--results` may have already."""
    pixels = f"-{options.pixels}" if task == "segmentation" else ""
    name = f"{task}{pixels}-{options.samples}x{options.epochs}-{effective}-{column.replace(' ', '_')}-{seed}.json"
    file: Path = options.results / name
    if not file.exists():
        build, data = TASKS[task](options)
        keep(file, curves(build, data, column, effective, seed, options.epochs))
    found: dict[str, list[float]] = json.loads(file.read_text())
    return found


def main() -> None:
    arguments = parser(__doc__, results=RESULTS)
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, default=["fashion_mnist"])
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--samples", type=int, default=8192)
    arguments.add_argument("--pixels", type=int, default=32, help="a side of segmentation's pictures, a multiple of 8")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--effective", type=int, nargs="+", default=(32, 128, 512))
    options = arguments.parse_args()

    trainings = []
    for task in options.tasks:
        print(f"{task}: val_loss after {options.epochs} epochs of {options.samples} samples, {options.seeds} seeds")
        table = Table({"effective": ">9", **{column: ">15" for column in COLUMNS}})
        table.print_header()
        for effective in options.effective:
            cells: list[str | None] = []
            for column, size in COLUMNS.items():
                if column != "plain" and size is not None and size >= effective:
                    cells.append(None)  # one group: plain
                    continue
                found = [trained(task, effective, column, seed, options) for seed in range(options.seeds)]
                about = {"task": task, "effective_batch_size": effective, "normalized": column}
                trainings.append({**about, "by_seed": found})
                last = [one["val_loss"][-1] for one in found]
                mean = statistics.mean(last)
                cells.append(f"{mean:.4f} ± {max(abs(value - mean) for value in last):.4f}")
            table.print_row(effective, *cells)
    keep(options.json, {"epochs": options.epochs, "samples": options.samples, "trainings": trainings})


if __name__ == "__main__":
    main()
