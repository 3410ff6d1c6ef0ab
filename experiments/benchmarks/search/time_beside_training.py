"""What a search takes beside the training of its trials, where each has a new architecture and where none has.

    python experiments/benchmarks/search/time_beside_training.py --trials 12

A random search over the widths of a network for the digits, and one over its learning rates, under a budget that holds
every listed micro-batch many times over ("ample"), and one that holds the smaller ones alone ("tight"). The seconds
beside training are those from one trial's end to the next one's, less its training, in the median. Keras Tuner's own
search does the same at micro-batch 32, in its own process.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import keras_tuner
from common import Table, keep, parser
from sklearn.datasets import load_digits

import accumtune
from accumtune.execution import profiling

BUDGETS = {"ample": "256MiB", "tight": "6MiB"}
SIZES, STEPS = (8, 32, 128, 512), (1, 4)


def builder(space: str):
    def build(hp):
        width, rate = 64, 1e-3
        if space == "architectures":
            width = hp.Int("width", 64, 640, step=4)
        else:
            rate = hp.Float("rate", 1e-4, 1e-2, sampling="log")
        layers = [keras.layers.Dense(width, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(10, "softmax")]
        model = keras.Sequential([keras.Input((64,)), *layers])
        model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
        return model

    return build


def ours(space: str, budget: str, trials: int, epochs: int, data, folder: str) -> dict[str, float]:
    lines: list[str] = []
    describe = profiling._describe_probe
    profiling._describe_probe = lambda *told: lines.append(describe(*told)) or lines[-1]
    tuner = accumtune.RandomSearch(
        builder(space), objective="val_loss", memory_budget=BUDGETS[budget], micro_batch_sizes=SIZES,
        accumulation_steps=STEPS, max_trials=trials, seed=1, tracking_uri=False, directory=folder,
        project_name=f"{space}-{budget}",
    )  # fmt: skip
    tuner.oracle.hyperparameters.Fixed("effective_batch_size", 128)
    x, y = data
    tuner.search(x[:1400], y[:1400], validation_data=(x[1400:], y[1400:]), epochs=epochs, verbose=0)
    profiling._describe_probe = describe
    record = tuner.record()
    ended = sorted(record.with_status("completed"), key=lambda trial: trial.ended_at)
    between = [
        after.ended_at - before.ended_at - after.training_seconds
        for before, after in zip(ended, ended[1:], strict=False)
    ]
    return {
        "seconds_beside": statistics.median(between),
        "training_seconds": statistics.median(trial.training_seconds for trial in ended),
        "probes": len(lines) / len(ended), "out_of_memory": sum("out of memory" in line for line in lines),
        "failed": len(record.with_status("failed")), "trials": len(ended),
    }  # fmt: skip


def theirs(space: str, trials: int, epochs: int, data, folder: str) -> dict[str, float]:
    tuner = keras_tuner.RandomSearch(
        builder(space), objective="val_loss", max_trials=trials, seed=1, directory=folder,
        project_name=f"{space}-stock",
    )  # fmt: skip
    ends, trainings = [], []

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.began = time.perf_counter()

        def on_train_end(self, logs=None):
            ends.append(time.perf_counter())
            trainings.append(ends[-1] - self.began)

    x, y = data
    validation = (x[1400:], y[1400:])
    tuner.search(
        x[:1400], y[:1400], validation_data=validation, epochs=epochs, batch_size=32, callbacks=[Clock()], verbose=0
    )
    between = [after - before - took for before, after, took in zip(ends, ends[1:], trainings[1:], strict=False)]
    return {
        "seconds_beside": statistics.median(between), "training_seconds": statistics.median(trainings),
        "trials": len(ends),
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trials", type=int, default=12)
    arguments.add_argument("--epochs", type=int, default=5)
    given = arguments.parse_args()
    x, y = load_digits(return_X_y=True)
    data = (x / 16).astype("float32"), y
    table = Table(
        {"space": "<14", "search": "<6", "trials": ">6", "beside s": ">8.2f", "training s": ">10.2f",
         "probes": ">6.2f", "out of memory": ">13", "failed": ">6"}
    )  # fmt: skip
    table.print_header()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for space in ("architectures", "learning rates"):
            for search in ("stock", *BUDGETS):
                call = theirs if search == "stock" else ours
                settings = (space,) if search == "stock" else (space, search)
                figures = call(*settings, given.trials, given.epochs, data, folder)
                row = {"space": space, "search": search, **figures}
                rows.append(row)
                names = ("trials", "seconds_beside", "training_seconds", "probes", "out_of_memory", "failed")
                table.print_row(space, search, *(row.get(name) for name in names))
    keep(given.json, rows)


if __name__ == "__main__":
    main()
