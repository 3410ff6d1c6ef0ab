"""Measures how the cost of a trial beside its training grows with the number of trials.

    python experiments/benchmarks/search/scale.py --trials 2000

Trials train nothing: the executor answers at once with made-up outcomes. Everything else is real: the oracle and its
files, journals, profiles, the choice of the pair, and with tracking the copy in MLflow (SQLite). The cost of the last
tenth of the trials is compared with that of the first.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
from common import Table, keep, parser

import accumtune
from accumtune.execution.executors import Outcome
from accumtune.search import processes
from accumtune.tracking.journal import Journal
from accumtune.worker import main as worker

PEAK_PER_SAMPLE, PEAK_BASE = 2**18, 2**20


def build_model(hp):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")), loss="mse")
    return model


class FreeExecutor:
    """Answers at once. The space is discovered in this process; what models cost and achieve is made up."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def submit(self, directory, environment=None, timeout_seconds=None, is_memory_limited=False) -> Future:
        name, arguments = directory.read_task()
        answer = getattr(self, f"_{name}", None)
        result = answer(directory, **arguments) if answer else worker.task_function(name)(directory, **arguments)
        future: Future = Future()
        future.set_result(Outcome("completed", result=result))
        return future

    def close(self) -> None:
        pass

    def _inspect(self, directory, **_):
        return {
            "signature": "made", "device": "made", "static_bytes": 20, "sample_bytes": 20, "batch_coupled_layers": [],
            "precision_policy": "float32", "sample_shapes": None,
        }  # fmt: skip

    def _probe(self, directory, micro_batch_size, accumulation_steps, memory_budget_bytes, **_):
        measurements = [
            {
                "micro_batch_size": micro_batch_size, "accumulation_steps": steps,
                "peak_memory_bytes": PEAK_BASE + PEAK_PER_SAMPLE * micro_batch_size,
                "seconds_per_update": steps * (0.001 + 1e-5 * micro_batch_size), "memory_source": "made",
                "memory_limit_bytes": memory_budget_bytes,
            }
            for steps in accumulation_steps
        ]  # fmt: skip
        return {"measurements": measurements, "device": "made"}

    def _train(self, directory, hyperparameters, attempt, **_):
        values = hyperparameters["values"]
        loss = abs(np.log2(values["effective_batch_size"] / 64)) + abs(np.log10(values["learning_rate"] / 1e-2))
        journal = Journal(directory.journal_file)
        journal.append("started", attempt=attempt, pid=os.getpid(), device="made", memory_source="made")
        for epoch in range(2):
            journal.append("epoch", attempt=attempt, execution=0, epoch=epoch, logs={"loss": loss, "val_loss": loss})
        return {
            "metrics": {"loss": loss, "val_loss": loss}, "best_epoch": 1, "best_value": loss,
            "pruned_after_epochs": None, "memory_source": "made", "device": "made",
            "peak_memory_bytes": PEAK_BASE + PEAK_PER_SAMPLE * values["micro_batch_size"],
            "seconds_per_update": 0.001, "throughput_samples_per_second": 1000.0 * values["effective_batch_size"],
            "updates": 10, "training_seconds": 0.01, "precision_policy": "float32",
        }  # fmt: skip


def no_processes():
    """Within this, a search starts none."""
    return patch.object(processes, "open_executor", lambda pool, backend: FreeExecutor(backend))


def data():
    x = np.zeros((64, 4), "float32")
    return x, x[:, :1]


def many(kind: str, trials: int, tracking: bool, folder: Path) -> dict[str, object]:
    """Wall and CPU time of each trial of a long search, from one proposal to the next."""
    tuner = getattr(accumtune, kind)(
        build_model, objective="val_loss", max_trials=trials, seed=1, memory_budget="64MiB",
        tracking_uri=f"sqlite:///{folder}/mlflow.db" if tracking else False, directory=folder, project_name="scale",
    )  # fmt: skip
    wall: list[float] = []
    cpu: list[float] = []
    create_trial = tuner.oracle.create_trial

    def timed(tuner_id):  # called once more at the end, when there is no more
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        return create_trial(tuner_id)

    tuner.oracle.create_trial = timed
    x, y = data()
    tuner.search(x, y, validation_data=(x, y), epochs=2, verbose=0)
    tenth = trials // 10
    found: dict[str, object] = {"tuner": kind, "tracking": tracking, "trials": trials}
    for name, clock in (("wall", wall), ("cpu", cpu)):
        seconds = np.diff(clock)
        # The very first one profiles the model.
        first, last = seconds[1:tenth], seconds[-tenth:]
        found[name] = {
            "first_seconds": statistics.median(first), "last_seconds": statistics.median(last),
            "ratio": statistics.median(last) / statistics.median(first),
            "mean_ratio": float(np.mean(last) / np.mean(first)),
        }  # fmt: skip
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=2000)
    options.add_argument("--tuner", default="RandomSearch", choices=("RandomSearch", "OptunaSearch"))
    options.add_argument("--tracking", nargs="+", default=("off", "on"), choices=("off", "on"))
    arguments = options.parse_args()
    found: list[dict[str, object]] = []
    print(f"{arguments.tuner}, {arguments.trials} free trials: ms per trial, medians of the first and last tenth")
    columns = {"tracking": "<8", "clock": "<5", "first": ">7.1f", "last": ">7.1f", "ratio": ">5.2f"}
    table = Table(columns | {"of means": ">8.2f"})
    table.print_header()
    for name in arguments.tracking:
        # On a busy machine the last of the replay goes on in the background, into a folder that is being removed.
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with temporary as folder, contextlib.chdir(folder), no_processes():
            run = many(arguments.tuner, arguments.trials, name == "on", Path(folder))
        found.append(run)
        for clock in ("wall", "cpu"):
            it = run[clock]
            first, last = 1000 * it["first_seconds"], 1000 * it["last_seconds"]
            table.print_row(name, clock, first, last, it["ratio"], it["mean_ratio"])
    keep(arguments.json, found)


if __name__ == "__main__":
    main()
