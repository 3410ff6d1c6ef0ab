"""What tracking costs: how fast the replay is, what a search waits for it, and what a server that is down changes.

- replay: journals of several shapes brought into an empty SQLite store; epochs per second of wall time and of CPU time.
- sustained: a writer appends so many epochs a second for a while, the tracker brings them meanwhile; how far it is
  behind when the writer ends, and whether each value is there once.
- searches: the same small search (digits, real trials) without tracking, with SQLite, with a server that is dead (no
  one listens) and one that is silent (takes connections, never answers), all at once, several rounds. An epoch waits
  rather than computes: the wall time of computing trials differs by a fifth from one time to the next, and of 1 %
  nothing could be said. What the tracker computes, which would slow down trials that compute, stands beside it.

    python experiments/benchmarks/tracking/overhead.py [--parts replay sustained searches] [--rounds 2] [--quick]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import mlflow
from common import Table, keep, parser
from searches import print_searches, searches

from accumtune.tracking.journal import Journal
from accumtune.tracking.mlflow.tracker import Tracker

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
SHAPES = ((1, 10_000), (10, 1_000), (100, 100))
SUSTAINED_EPOCHS_PER_SECOND = 1_000


class Made:
    """Journals as a search writes them, without a search."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._search = Journal(folder / "search.jsonl")
        self._search.append("search_started", search_id="b" * 32, name="benchmark", max_trials=1)

    def trial(self, number: int, epochs: int = 0) -> Journal:
        """A trial, begun, that has reported so many epochs: written at once."""
        journal = Journal(self.folder / f"trial_{number:04d}" / "journal.jsonl")
        values = {"effective_batch_size": 64, "micro_batch_size": 32, "accumulation_steps": 2, "learning_rate": 0.01}
        journal.append("proposed", trial_id=f"{number:04d}", number=number, hyperparameters=values)
        journal.append("started", attempt=1, pid=0, device="CPU", memory_source="made")
        if epochs:
            lines = (json.dumps({"event": "epoch", "time": time.time(), **epoch(index)}) for index in range(epochs))
            with open(journal.path, "a") as file:
                file.write("\n".join(lines) + "\n")
        return journal

    def end(self, journal: Journal) -> None:
        journal.append("ended", status="completed", objective_value=0.5, best_epoch=0, peak_memory_bytes=2**20)

    def finish(self) -> None:
        self._search.append("search_ended", status="finished")


def epoch(index: int) -> dict[str, Any]:
    return {"attempt": 1, "execution": 0, "epoch": index, "logs": {name: 1.0 / (index + 1) for name in METRICS}}


def new_store(root: Path, name: str) -> str:
    """An SQLite store that MLflow has made: what is measured is the replay, not forty migrations."""
    root.mkdir(parents=True, exist_ok=True)
    empty = root / "empty.db"
    if not empty.exists():
        mlflow.MlflowClient(f"sqlite:///{empty}").search_experiments()
    shutil.copy(empty, root / f"{name}.db")
    return f"sqlite:///{root / name}.db"


def replay(root: Path, trials: int, epochs: int) -> dict[str, float]:
    """One shape."""
    made = Made(root / f"made_{trials}")
    for number in range(trials):
        made.end(made.trial(number, epochs))
    made.finish()
    tracker = Tracker(made.folder, new_store(root, f"replay_{trials}"))
    wall, cpu = time.perf_counter(), time.process_time()
    tracker.sync()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    total = trials * epochs
    return {
        "trials": trials, "epochs_each": epochs, "seconds": wall, "cpu_seconds": cpu,
        "epochs_per_second": total / wall, "epochs_per_cpu_second": total / cpu,
    }  # fmt: skip


def sustained(root: Path, seconds: float, rate: int, trials: int = 4) -> dict[str, Any]:
    """A writer at a steady rate, and the tracker behind it."""
    made = Made(root / "sustained")
    uri = new_store(root, "sustained")
    journals = [made.trial(number) for number in range(trials)]
    tracker = Tracker(made.folder, uri)
    tracker.start()
    began, written = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        while written < passed * rate:
            journals[written % trials].append("epoch", **epoch(written // trials))
            written += 1
        time.sleep(0.005)
    took = time.perf_counter() - began
    for journal in journals:
        made.end(journal)
    made.finish()
    behind = time.perf_counter()
    message = tracker.stop()
    behind = time.perf_counter() - behind
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("benchmark").experiment_id], max_results=1000)
    steps = [
        metric.step
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
        for metric in client.get_metric_history(run.info.run_id, "val_loss")
    ]
    return {
        "seconds": took, "epochs": written, "epochs_per_second": written / took, "behind_seconds": behind,
        "arrived": len(steps), "message": message,
    }  # fmt: skip


def main() -> int:
    parts = ("replay", "sustained", "searches")
    made = parser(__doc__)
    made.add_argument("--parts", nargs="+", choices=parts, default=parts)
    made.add_argument("--rounds", type=int, default=2, help="of searches")
    made.add_argument("--trials", type=int, default=4, help="of each search")
    made.add_argument("--epochs", type=int, default=60, help="of each trial")
    made.add_argument("--epoch-seconds", type=float, default=1.0, help="that an epoch waits")
    made.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options = made.parse_args()
    if options.quick:
        options.rounds, options.trials, options.epochs, options.epoch_seconds = 1, 2, 2, 0.1
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="accumtune-tracking-") as name:
        root = Path(name)
        if "searches" in options.parts:  # first: a fork must not take over another part's threads
            results["searches"] = searches(root, options.rounds, options.trials, options.epochs, options.epoch_seconds)
            print_searches(results["searches"])
        if "replay" in options.parts:
            shapes = [(trials, max(1, epochs // (100 if options.quick else 1))) for trials, epochs in SHAPES]
            replay(root / "first", 1, 1)  # MLflow's imports
            print()
            columns = {"trials": ">6", "epochs each": ">11,", "seconds": ">8.2f", "epochs/s": ">9,.0f"}
            table = Table(columns | {"epochs/CPU s": ">12,.0f"})
            table.print_header()
            results["replay"] = []
            for trials, epochs in shapes:
                row = replay(root, trials, epochs)
                results["replay"].append(row)
                per_second = row["epochs_per_second"], row["epochs_per_cpu_second"]
                table.print_row(trials, epochs, row["seconds"], *per_second)
            print(f"each epoch has {len(METRICS)} values")
        if "sustained" in options.parts:
            row = sustained(root, 2.0 if options.quick else 20.0, SUSTAINED_EPOCHS_PER_SECOND)
            results["sustained"] = row
            print(
                f"\n{row['epochs']:,} epochs written in {row['seconds']:.1f} s ({row['epochs_per_second']:,.0f}/s); "
                f"{row['arrived']:,} arrived, the last {row['behind_seconds']:.1f} s after the writer's end"
            )
    keep(options.json, results)
    complete = "sustained" not in results or results["sustained"]["arrived"] == results["sustained"]["epochs"]
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
