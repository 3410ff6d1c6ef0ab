"""Measures how close N workers come to N times the speed.

    python experiments/benchmarks/cluster/parallel.py [--workers 8] [--trials 64] [--seconds 60] [--quick]

Real trials in processes of their own wait instead of computing (otherwise two cores would be the limit). The time from
the first trial's start to the last one's end is compared with the waiting alone, divided by the workers. Trials wait
for a minute; those of a real search take from ten seconds to hours, but starting and ending one costs the same. The
script prints where that time goes, per trial. It is computing and the disk, so use `--seconds 20` only on a machine
that does nothing else: eight workers start their processes on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import keras_tuner
import numpy as np
from common import Table, keep, parser

import accumtune
from accumtune.tracking.journal import read_search

LEAST_EFFICIENCY = 0.9


def build_model(hp: Any) -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-1)), loss="mse")
    return model


class Waiting(keras.callbacks.Callback):
    """A training that, at its end, only waits; notes when that begins."""

    def __init__(self, seconds: float, notes: Path) -> None:
        super().__init__()
        self.seconds, self.notes = seconds, str(notes)

    def on_train_end(self, logs: Any = None) -> None:
        Path(self.notes, str(os.getpid())).write_text(json.dumps([time.time(), time.process_time()]))
        time.sleep(self.seconds)


def efficiency(folder: Path, workers: int, trials: int, seconds: float) -> dict[str, Any]:
    """A search of trials that wait."""
    x = np.zeros((32, 8), "float32")
    notes = folder / "notes"
    notes.mkdir()
    tuner = accumtune.RandomSearch(
        build_model, objective=keras_tuner.Objective("loss", "min"), max_trials=trials, seed=1,
        memory_budget="256MiB", micro_batch_sizes=(8,), accumulation_steps=(1,), workers=workers, tracking_uri=False,
        directory=folder, project_name=f"waiting_{workers}",
    )  # fmt: skip
    began, own = time.time(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        tuner.search(x, x[:, :1], callbacks=[Waiting(seconds, notes)])
    whole, own = time.time() - began, time.process_time() - own
    done = read_search(folder / f"waiting_{workers}").with_status("completed")
    # From the first proposal that knows what its model costs: probes come before it, once in a search.
    span = max(t.ended_at or 0 for t in done) - min(t.proposed_at or 0 for t in done)
    ideal = len(done) / workers * seconds
    return {
        "workers": workers, "trials": len(done), "waiting_seconds": seconds, "ideal_seconds": ideal,
        "trials_seconds": span, "search_seconds": whole, "efficiency": ideal / span,
        "own_cpu_seconds": own / len(done), **parts(done, notes, seconds, span * workers / len(done)),
    }  # fmt: skip


def parts(done: Any, notes: Path, seconds: float, whole: float) -> dict[str, float]:
    """Where a worker's time goes, in seconds per trial."""
    began = {trial.trial_id: json.loads((notes / str(trial.pid)).read_text()) for trial in done}
    forked = fmean((trial.started_at or 0) - (trial.proposed_at or 0) for trial in done)
    built = fmean(began[trial.trial_id][0] - (trial.started_at or 0) for trial in done)
    ended = fmean((trial.ended_at or 0) - began[trial.trial_id][0] - seconds for trial in done)
    return {
        "fork_seconds": forked, "build_seconds": built, "end_seconds": ended,
        "between_seconds": whole - seconds - forked - built - ended,
        "training_process_cpu_seconds": fmean(cpu for _, cpu in began.values()),
    }  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--trials", type=int, default=64)
    made.add_argument("--seconds", type=float, default=60.0, help="how long each trial waits")
    made.add_argument("--quick", action="store_true", help="four workers, eight trials of two seconds")
    options = made.parse_args()
    if options.quick:
        options.workers, options.trials, options.seconds = 4, 8, 2.0
    with tempfile.TemporaryDirectory(prefix="accumtune-parallel-") as root:
        row = efficiency(Path(root), options.workers, options.trials, options.seconds)
    table = Table({"workers": ">7", "trials": ">6", "ideal s": ">7.0f", "took s": ">7.1f", "efficiency": ">10.3f"})
    table.print_header()
    table.print_row(row["workers"], row["trials"], row["ideal_seconds"], row["trials_seconds"], row["efficiency"])
    print(
        f"the whole search, from its start to its report: {row['search_seconds']:.1f} s\n"
        f"per trial: {row['fork_seconds']:.2f} s from its proposal to its process, {row['build_seconds']:.2f} s until "
        f"it waits, {row['end_seconds']:.2f} s from then to the end in the journal, {row['between_seconds']:.2f} s to "
        f"the next one's proposal (a process that inspects its model)\n"
        f"CPU per trial: {row['training_process_cpu_seconds']:.2f} s until it waits, {row['own_cpu_seconds']:.2f} s in "
        f"the search process"
    )
    keep(options.json, row)
    return 0 if row["efficiency"] >= LEAST_EFFICIENCY or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
