"""Searches a recorded grid: with the real tuners, oracles, profiles and journals, and a table instead of training.

Keras Tuner's side is its own tuner with its own oracle; `run_trial` looks the result up, or fails as training does when
it runs out of memory. accumtune's side is its own tuner too: only the executor, which would start processes, answers
from the record.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import keras_tuner
from cost_tasks import OURS, STOCK, Record
from unchecked_gaussian import unchecked

import accumtune
from accumtune.execution.executors import Outcome
from accumtune.memory.probe import STEADY_MICRO_STEPS
from accumtune.search import processes
from accumtune.search.results.search_results import SearchResults
from accumtune.search.results.selection import select
from accumtune.search.tuner import Tuner
from accumtune.tracking.journal import Journal

# What `accumtune.memory.probe` runs for each number of accumulation steps: a first update and 3 more, or as many
# micro-steps as give a steady peak where that is more.
PROBED_UPDATES = 3
NEVER = 10**6


@dataclass
class Run:
    """One search: what it had spent whenever a training ended, and what it came to.

    Args:
        events: `(objective, presentations, seconds, seconds without waiting for memory)` after each training.
        failures: trials that ran out of memory, in order of all trials (True where one failed).
        pick: the objective of what it would train with.
    """

    presentations: float = 0.0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    events: list[tuple[float, float, float, float]] = field(default_factory=list)
    failures: list[bool] = field(default_factory=list)
    pick: float = math.nan

    def spend(self, seconds: float, presentations: float = 0.0, waited_seconds: float = 0.0) -> None:
        self.seconds += seconds
        self.presentations += presentations
        self.waited_seconds += waited_seconds

    def run_out_of_memory(self, seconds: float, start_seconds: float) -> None:
        self.spend(seconds, waited_seconds=max(0.0, seconds - start_seconds))

    def trained(self, objective: float) -> None:
        self.failures.append(False)
        self.events.append((objective, self.presentations, self.seconds, self.seconds - self.waited_seconds))

    def would_have_ended(self) -> bool:
        """Keras Tuner's default: three failures in a row end the search with an error."""
        return any(all(self.failures[start : start + 3]) for start in range(len(self.failures) - 2))

    def to_reach(self, target: float) -> tuple[bool, float, float, float]:
        """Whether it did, and what it had spent by then; all it spent where it did not."""
        for objective, *spent in self.events:
            if objective <= target:
                return True, *spent
        return False, self.presentations, self.seconds, self.seconds - self.waited_seconds


# Keras Tuner as it is


def stock(record: Record, tuner_class: Any, seed: int) -> Run:
    run = Run()

    class Replayed(tuner_class):
        def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
            values = trial.hyperparameters.values
            micro, steps, width = (values[name] for name in ("micro_batch_size", "accumulation_steps", "width"))
            if not record.fits(STOCK, width, micro, steps):
                run.failures.append(True)
                run.run_out_of_memory(record.out_of_memory_seconds, record.start_seconds[STOCK])
                raise RuntimeError("ResourceExhaustedError: out of memory")
            run.spend(record.start_seconds[STOCK])
            presentations = record.samples * record.epochs
            seconds = record.costs[STOCK, width, micro].seconds(steps, presentations / (micro * steps))
            run.spend(seconds, presentations)
            objective = record.best_of(micro * steps, values["learning_rate"], width)
            run.trained(objective)
            return {"val_loss": objective}

    space = record.space

    def build(hp: Any) -> None:
        hp.Choice("micro_batch_size", list(space.micro_batch_sizes), ordered=True)
        hp.Choice("accumulation_steps", list(space.accumulation_steps), ordered=True)
        space.declare(hp)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()), unchecked():
        tuner = Replayed(
            build, "val_loss", max_trials=record.max_trials, seed=seed, directory=folder,
            max_consecutive_failed_trials=NEVER,
        )  # fmt: skip
        tuner.search(verbose=0)
    run.pick = min((event[0] for event in run.events), default=math.inf)
    return run


# accumtune, without its processes


class RecordedExecutor:
    """Answers tasks from a record, at once, and counts what they would have taken."""

    backend = "tensorflow"

    def __init__(self, record: Record, run: Run) -> None:
        self.record, self.run = record, run
        self.pruning: Any = None
        # How many epochs a paused trial has trained.
        self.paused: dict[str, int] = {}

    def submit(
        self, directory: Any, environment: Any = None, timeout_seconds: Any = None, is_memory_limited: bool = False
    ) -> Future[Outcome]:
        name, arguments = directory.read_task()
        future: Future[Outcome] = Future()
        future.set_result(getattr(self, name)(directory, **arguments))
        return future

    def close(self) -> None:
        pass

    def discover(self, directory: Any, payload: str) -> Outcome:
        self.run.spend(self.record.inspect_seconds)
        hp = keras_tuner.HyperParameters()
        self.record.space.declare(hp)
        found = {
            "hyperparameters": hp.get_config(), "batch_coupled_layers": [], "whole_batch_loss": False,
            "own_train_step": None, "coupled_with_ghost_batches": [], "against_ghost_batches": [], "wants_data": False,
            "has_own_test_step": False,
        }  # fmt: skip
        return Outcome("completed", found)

    def inspect(self, directory: Any, payload: str, hyperparameters: Any) -> Outcome:
        self.run.spend(self.record.inspect_seconds)
        facts = {
            "signature": f"width_{hyperparameters['values']['width']}", "device": "CPU", "static_bytes": 0,
            "sample_bytes": 0, "batch_coupled_layers": [], "precision_policy": "float32", "sample_shapes": None,
        }  # fmt: skip
        return Outcome("completed", facts)

    def probe(
        self, directory: Any, payload: str, hyperparameters: Any, memory_budget_bytes: int,
        micro_batch_size: int, accumulation_steps: list[int],
    ) -> Outcome:  # fmt: skip
        width = hyperparameters["values"]["width"]
        cost = self.record.costs[OURS, width, micro_batch_size]
        if self.record.fits(OURS, width, micro_batch_size, accumulation_steps[0]):
            self.run.spend(self.record.start_seconds[OURS])
        measurements = []
        for steps in accumulation_steps:
            fits = self.record.fits(OURS, width, micro_batch_size, steps)
            updates = 1 + max(PROBED_UPDATES, math.ceil(STEADY_MICRO_STEPS / steps))
            if fits:
                self.run.spend(cost.seconds(steps, updates), updates * steps * micro_batch_size)
            else:
                self.run.run_out_of_memory(self.record.probe_out_of_memory_seconds, self.record.start_seconds[OURS])
            measurements.append({
                "micro_batch_size": micro_batch_size, "accumulation_steps": steps,
                "peak_memory_bytes": cost.peak_bytes(steps) if fits else None,
                "seconds_per_update": cost.seconds(steps, 1) if fits else None,
                "memory_source": "record", "memory_limit_bytes": memory_budget_bytes,
            })  # fmt: skip
            if not fits:
                break
        return Outcome("completed", {"measurements": measurements, "device": "CPU"})

    def train(
        self, directory: Any, hyperparameters: Any, attempt: int, pause_after: int | None = None, **others: Any
    ) -> Outcome:
        values = hyperparameters["values"]
        effective, micro, width = (values[name] for name in ("effective_batch_size", "micro_batch_size", "width"))
        steps = effective // micro
        journal = Journal(directory.journal_file)
        journal.append("started", attempt=attempt, device="CPU", memory_source="record")
        if not self.record.fits(OURS, width, micro, steps):
            self.run.failures.append(True)
            self.run.run_out_of_memory(self.record.out_of_memory_seconds, self.record.start_seconds[OURS])
            return Outcome("out_of_memory", reason="out of memory")
        self.run.spend(self.record.start_seconds[OURS])
        curve = self.record.curve(effective, values["learning_rate"], width)
        cost = self.record.costs[OURS, width, micro]
        begun = self.paused.pop(directory.path.name, 0)
        epochs = pause_after or self.epochs_of(directory, curve)
        if pause_after is not None:
            self.paused[directory.path.name] = epochs
        for epoch in range(epochs):
            journal.append("epoch", attempt=attempt, epoch=epoch, logs={"val_loss": curve[epoch]})
        presented = self.record.samples * (epochs - begun)
        updates = presented / effective
        self.run.spend(cost.seconds(steps, updates), presented)
        objective = min(curve[:epochs])
        self.run.trained(objective)
        return Outcome("completed", {
            "metrics": {"val_loss": objective}, "best_epoch": curve.index(objective), "best_value": objective,
            "pruned_after_epochs": epochs if epochs < len(curve) and pause_after is None else None,
            "paused_after_epochs": pause_after,
            "peak_memory_bytes": cost.peak_bytes(steps), "memory_source": "record", "device": "CPU",
            "seconds_per_update": cost.seconds(steps, 1), "updates": int(updates), "training_seconds": 0.0,
            "throughput_samples_per_second": effective / cost.seconds(steps, 1), "precision_policy": "float32",
        })  # fmt: skip

    def epochs_of(self, directory: Any, curve: tuple[float, ...]) -> int:
        """How many epochs a trial trains: all, or until the pruner calls it hopeless."""
        trial_id = directory.path.name.removeprefix("trial_")
        for epoch, loss in enumerate(curve[:-1]):
            if self.pruning is not None and self.pruning.is_hopeless(trial_id, epoch, {"val_loss": loss}):
                return epoch + 1
        return len(curve)


def ours(record: Record, tuner_class: type[Tuner], seed: int, **arguments: Any) -> Run:
    run = Run()
    executor = RecordedExecutor(record, run)

    class Replayed(tuner_class):  # type: ignore[valid-type, misc]
        def _pruning(self) -> Any:
            executor.pruning = super()._pruning()
            return executor.pruning

    space = record.space
    recorded = patch.object(processes, "open_executor", lambda pool, backend: executor)
    unreported = patch.object(SearchResults, "write_report")  # its pictures take longer than the search
    with recorded, unreported, tempfile.TemporaryDirectory() as folder, unchecked():
        tuner = Replayed(
            space.declare, objective="val_loss", max_trials=record.max_trials, seed=seed, directory=folder,
            memory_budget=record.memory_budget_bytes, micro_batch_sizes=space.micro_batch_sizes,
            accumulation_steps=space.accumulation_steps, tracking_uri=False, **arguments,
        )  # fmt: skip
        tuner.search([0.0], [0.0], validation_data=([0.0], [0.0]), epochs=record.epochs, verbose=0)
        run.pick = select(tuner.candidates(), "quality").candidate.objective
    return run


def search(record: Record, side: str, tuner: str, seed: int) -> Run:
    """One search of `"keras"` or `"accumtune"` with the tuner of that name."""
    if side == STOCK:
        return stock(record, getattr(keras_tuner, tuner), seed)
    return ours(record, getattr(accumtune, tuner), seed)
