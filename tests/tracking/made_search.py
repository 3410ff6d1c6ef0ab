"""Made-up searches: folders with the journals and the report that a real search writes."""

import math
from pathlib import Path

from accumtune.tracking.journal import Journal

MIB = 2**20


class MadeSearch:
    """Writes the journals of a search, step by step."""

    def __init__(self, folder: Path, search_id: str = "f00d" * 8, name: str = "made"):
        self.folder = folder
        self.search_id = search_id
        self.name = name
        self.journal = Journal(folder / "search.jsonl")

    def start(self, **fields):
        values = {
            "search_id": self.search_id,
            "name": self.name,
            "objective": {"name": "val_loss", "direction": "min"},
            "memory_budget_bytes": 64 * MIB,
            "micro_batch_sizes": [8, 16, 32, 64],
            "accumulation_steps": [1, 2, 4],
            "search_over": "effective_batch_size",
            "learning_rate_scaling": None,
            "tuner": "RandomSearch",
            "max_trials": 4,
            "backend": "tensorflow",
            "device": "CPU",
            "versions": {"keras": "3.15.1", "accumtune": "0.1.0"},
            "data": {"name": "digits", "shapes": {"x": [100, 8, 8], "y": [100]}, "digest": "abc"},
        }
        self.journal.append("search_started", **values | fields)
        return self

    def trial(self, trial_id: str) -> Journal:
        return Journal(self.folder / f"trial_{trial_id}" / "journal.jsonl")

    def propose(self, trial_id, number=0, micro=16, steps=4, rate=0.01, peak=40 * MIB):
        batch = {"effective_batch_size": micro * steps, "micro_batch_size": micro, "accumulation_steps": steps}
        self.trial(trial_id).append(
            "proposed",
            trial_id=trial_id,
            number=number,
            hyperparameters={"learning_rate": rate, "width": 32, **batch},
            predicted_peak_memory_bytes=peak,
            predicted_throughput_samples_per_second=1000.0 * micro**0.5,
            description=f"effective batch {micro * steps}",
        )

    def begin(self, trial_id, attempt=1):
        self.trial(trial_id).append("started", attempt=attempt, pid=1, device="CPU", memory_source="BFC allocator")

    def epoch(self, trial_id, epoch, loss, attempt=1, execution=0):
        logs = {"loss": loss, "val_loss": loss * 1.1}
        self.trial(trial_id).append("epoch", attempt=attempt, execution=execution, epoch=epoch, logs=logs)

    def end(self, trial_id, status="completed", objective=0.5, peak=38 * MIB, **fields):
        values = {
            "status": status,
            "objective_value": objective,
            "best_epoch": 2,
            "peak_memory_bytes": peak,
            "memory_source": "BFC allocator",
            "device": "CPU",
            "throughput_samples_per_second": 4000.0,
            "updates": 30,
            "training_seconds": 1.5,
        }
        self.trial(trial_id).append("ended", **values | fields)

    def complete(self, trial_id, number=0, epochs=3, objective=0.5, **proposal):
        self.propose(trial_id, number, **proposal)
        self.begin(trial_id)
        for epoch in range(epochs):
            self.epoch(trial_id, epoch, objective / 1.1 * (epochs - epoch))
        self.end(trial_id, objective=objective)
        (self.folder / f"trial_{trial_id}" / "log.txt").write_text("one line\nsaid http://me:secret@host/\n")

    def fail(self, trial_id, number=0):
        self.propose(trial_id, number)
        self.begin(trial_id)
        self.epoch(trial_id, 0, math.nan)
        nothing = dict(objective=None, peak=None, throughput_samples_per_second=None)
        self.end(trial_id, "failed", reason="ValueError: boom", traceback="Traceback ...\nValueError: boom", **nothing)

    def infeasible(self, number):
        journal = Journal(self.folder / f"infeasible_{number:04d}" / "journal.jsonl")
        journal.append(
            "proposed", trial_id=f"infeasible_{number:04d}", number=number,
            hyperparameters={"effective_batch_size": 4096, "learning_rate": 0.1}, predicted_peak_memory_bytes=90 * MIB,
        )  # fmt: skip
        journal.append("ended", status="infeasible", reason="not even micro-batch 1 fits in 64.0 MiB")

    def finish(self, status="finished", reason=""):
        self.journal.append("search_ended", status=status, reason=reason)


def report(made, note="# The answer", **files):
    folder = made.folder / "report"
    folder.mkdir(exist_ok=True)
    for name, text in {"note.md": note, "candidates.csv": "a,b\n", "pareto.png": "png", **files}.items():
        (folder / name).write_text(text)
