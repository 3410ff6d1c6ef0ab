"""Many trials at once: how close N workers come to N times the speed, and what the search process does for each trial.

Two tables. In the first, real trials in processes of their own wait instead of computing (two cores would be the
limit otherwise): the time from the first trial's start to the last one's end against waiting alone, divided by the
workers. They wait for a minute; a trial of a real search takes from ten seconds to hours, and what it costs to start
and end one does not depend on that. Where that time goes is told per trial. It is computing and the disk, so `--seconds
20` is for a machine that does nothing else: eight workers have two cores to start their processes on.

In the second, an executor that answers at once leaves the search process with nothing but its own work, whose CPU time
per trial is taken in quarters of a search: it should neither grow with the trials that were nor with the workers.

    python experiments/benchmarks/parallel.py [--workers 8] [--trials 64] [--seconds 60] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_tuner  # noqa: E402
import numpy as np  # noqa: E402

import accumtune  # noqa: E402
from accumtune.execution.placement import Place, Places  # noqa: E402
from accumtune.memory.prediction.profile import Measurement, Profile  # noqa: E402
from accumtune.oracles import persistence as state  # noqa: E402
from accumtune.search.console.display import Display  # noqa: E402
from accumtune.search.scheduler import SearchSession  # noqa: E402
from accumtune.search.trial.settings import SearchSettings  # noqa: E402
from accumtune.search.trial.trial_runner import TrialRunner  # noqa: E402
from accumtune.tracking.journal import Journal, read_search  # noqa: E402
from accumtune.worker.transport.outcome import Outcome  # noqa: E402
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory  # noqa: E402

LEAST_EFFICIENCY = 0.9
# The last quarter of a search may cost this much more per trial than the first.
MOST_GROWTH = 1.5


class Waiting(keras_tuner.HyperModel):
    """A model that is built, and a training that only waits."""

    def __init__(self, seconds: float, notes: Path) -> None:
        super().__init__()
        self.seconds, self.notes = seconds, str(notes)

    def build(self, hp: Any) -> Any:
        import keras

        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-1)), loss="mse")
        return model

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        Path(self.notes, str(os.getpid())).write_text(json.dumps([time.time(), time.process_time()]))
        time.sleep(self.seconds)
        return float(hp.get("learning_rate"))


def efficiency(folder: Path, workers: int, trials: int, seconds: float) -> dict[str, Any]:
    """A search of trials that wait."""
    x = np.zeros((32, 8), "float32")
    notes = folder / "notes"
    notes.mkdir()
    tuner = accumtune.RandomSearch(
        Waiting(seconds, notes), objective=keras_tuner.Objective("loss", "min"), max_trials=trials, seed=1,
        memory_budget="256MiB", micro_batch_sizes=(8,), accumulation_steps=(1,), workers=workers, tracking_uri=False,
        directory=folder, project_name=f"waiting_{workers}",
    )  # fmt: skip
    began, own = time.time(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        tuner.search(x, x[:, :1])
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


class Profiles:
    """What the models of a search cost, without any probe."""

    def profile(self, space: Mapping[str, Any]) -> Profile:
        return Profile((Measurement(8, 1, 2**20, 0.01, "made"),), "CPU:0", "made", signature="s")

    def learn(self, signature: str, measurement: Measurement) -> None:
        pass


class Answers:
    """An executor whose tasks have been done when they come."""

    backend = "tensorflow"

    def submit(self, directory: TaskDirectory, *args: Any, **kwargs: Any) -> Future[Outcome]:
        result = {
            "metrics": {"val_loss": 0.5}, "best_epoch": 0, "peak_memory_bytes": 2**20, "memory_source": "made",
            "device": "CPU:0", "seconds_per_update": 0.01, "throughput_samples_per_second": 800.0, "updates": 2,
            "training_seconds": 0.1, "precision_policy": "float32",
        }  # fmt: skip
        Journal(directory.journal_file).append("started", attempt=1, pid=1, device="CPU:0", memory_source="made")
        directory.write_outcome({"status": "completed", "result": result})
        future: Future[Outcome] = Future()
        future.set_result(Outcome("completed", result))
        return future

    def kill(self, directory: TaskDirectory) -> None:
        pass

    def close(self) -> None:
        pass


def own_work(folder: Path, workers: int, trials: int) -> dict[str, Any]:
    """CPU milliseconds of the search process per trial, in quarters of a search."""
    space = keras_tuner.HyperParameters()
    space.Choice("effective_batch_size", [8], ordered=True)
    space.Float("learning_rate", 1e-4, 1e-1)
    oracle = keras_tuner.oracles.RandomSearchOracle("val_loss", trials, seed=3, hyperparameters=space)
    oracle._set_project_dir(str(folder), f"own_{workers}")
    oracle = state.with_whole_state(oracle)
    oracle.verbose = 0
    files = SearchDirectory(folder / f"own_{workers}")
    settings = SearchSettings(None, (8,), False, False, 1, 3, "val_loss", None)
    runner = TrialRunner(settings, files, Answers(), Profiles(), places=Places([Place()] * workers))
    marks = [time.process_time()]
    ended = 0

    def after_trial() -> None:
        nonlocal ended
        # Several trials may end at once.
        ended = len(oracle.end_order)
        while len(marks) <= 4 and ended >= trials * len(marks) // 4:
            marks.append(time.process_time())

    display = Display("val_loss", trials, 0, workers=workers)
    SearchSession(oracle, runner, files, display, workers=workers, after_trial=after_trial).run()
    quarters = [1000 * (after - before) / (trials / 4) for before, after in zip(marks, marks[1:], strict=False)]
    return {"workers": workers, "trials": ended, "ms_per_trial": quarters, "growth": quarters[-1] / quarters[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each trial waits")
    parser.add_argument("--only", choices=("efficiency", "own"), default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="PATH", default=None)
    options = parser.parse_args()
    if options.quick:
        options.workers, options.trials, options.seconds = 4, 8, 2.0
    real, own = [], []
    with tempfile.TemporaryDirectory(prefix="accumtune-parallel-") as root:
        if options.only != "own":
            print(f"{'workers':>7}  {'trials':>6}  {'each waits':>10}  {'ideal':>7}  {'took':>7}  efficiency")
            row = efficiency(Path(root), options.workers, options.trials, options.seconds)
            real.append(row)
            print(
                f"{row['workers']:>7}  {row['trials']:>6}  {row['waiting_seconds']:>8.1f} s  "
                f"{row['ideal_seconds']:>5.0f} s  {row['trials_seconds']:>5.1f} s  {row['efficiency']:.3f}   "
                f"(the whole search, from its start to its report: {row['search_seconds']:.1f} s)\n"
                f"  per trial: {row['fork_seconds']:.2f} s from its proposal to its process, "
                f"{row['build_seconds']:.2f} s until it waits, "
                f"{row['end_seconds']:.2f} s from then to the end in the journal, "
                f"{row['between_seconds']:.2f} s to the next one's proposal (a process that inspects its model)\n"
                f"  CPU per trial: {row['training_process_cpu_seconds']:.2f} s until it waits, "
                f"{row['own_cpu_seconds']:.2f} s in the search process\n",
                flush=True,
            )
        if options.only != "efficiency":
            print("The search process's own CPU time, ms per trial")
            print(f"{'workers':>7}  {'trials':>6}  {'1st quarter':>11}  {'2nd':>6}  {'3rd':>6}  {'4th':>6}  growth")
            for workers, trials in ((1, 200), (4, 200)) if options.quick else ((8, 2000), (64, 2000)):
                row = own_work(Path(root), workers, trials)
                own.append(row)
                quarters = row["ms_per_trial"]
                print(
                    f"{workers:>7}  {row['trials']:>6}  {quarters[0]:>11.2f}  "
                    + "  ".join(f"{value:>6.2f}" for value in quarters[1:])
                    + f"  {row['growth']:.2f}",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps({"efficiency": real, "own_work": own}, indent=2))
    good = all(row["efficiency"] >= LEAST_EFFICIENCY for row in real) and all(
        row["growth"] <= MOST_GROWTH for row in own
    )
    return 0 if good or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
