"""Keras callbacks of a trial: they report epochs to the journal, time updates, and keep the best epoch."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import keras
from keras_tuner.src.engine import tuner_utils  # it has no public name

from accumtune.accumulation.callbacks import GradientNoiseScale
from accumtune.errors import UnsendableDataError
from accumtune.tracking.journal import Journal
from accumtune.worker.trial_weights import save_weights

# The first update compiles, and the second still fills caches.
_WARM_UP_UPDATES = 2


class JournalWriter(keras.callbacks.Callback):
    """Appends the logs of each epoch to the trial's journal and measures the time of an update.

    Attributes:
        updates: optimizer updates so far.
    """

    def __init__(self, journal: Journal, attempt: int, execution: int) -> None:
        super().__init__()
        self._journal = journal
        self._labels = {"attempt": attempt, "execution": execution}
        self._seconds_of_updates: list[float] = []
        self._mark = 0.0
        self._last_batch = -1
        self.updates = 0

    @property
    def seconds_per_update(self) -> float | None:
        """The median over all updates after warm-up, or the second update's; None before that: the first compiles."""
        warm = self._seconds_of_updates[_WARM_UP_UPDATES:] or self._seconds_of_updates[1:]
        return median(warm) if warm else None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._last_batch = -1

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # With `steps_per_execution` there is one call for several updates.
        count = max(1, batch - self._last_batch)
        self._last_batch = batch
        self.updates += count
        self._seconds_of_updates.append((time.perf_counter() - self._mark) / count)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logged = {name: float(value) for name, value in (logs or {}).items() if _is_number(value)}
        self._journal.append("epoch", **self._labels, epoch=epoch, logs=logged)


def noise_scale_callbacks(callbacks: Sequence[Any], accumulation_steps: int) -> list[Any]:
    """Returns a callback that measures the gradient noise scale, if there are several micro-batches.

    Returns none if the user's callbacks have one.
    """
    has_one = any(isinstance(callback, GradientNoiseScale) for callback in callbacks)
    return [] if accumulation_steps < 2 or has_one else [GradientNoiseScale()]


class StopWhenHopeless(keras.callbacks.Callback):
    """Ends the training after the epoch in which the search has written the prune file.

    Attributes:
        epochs: the number of epochs after which it was stopped; None if it ran to its end.
    """

    def __init__(self, prune_file: Path) -> None:
        super().__init__()
        self._prune_file = prune_file
        self.epochs: int | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        epochs = (self.params or {}).get("epochs", 0)  # the user's own training loop may not set it
        if epoch + 1 < epochs and self._prune_file.exists():
            self.epochs = epoch + 1
            self.model.stop_training = True


class LogsOfEpochs(keras.callbacks.History):
    """A history that also knows which epoch a value is of: with `validation_freq`, some epochs have no `val_` values.

    Attributes:
        rows: `[epoch, logs]` of each epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        self.rows.append([epoch, dict(logs or {})])


class SaveBestEpoch(tuner_utils.SaveBestEpoch):
    """Keras Tuner's callback, which here writes the file atomically: a killed trial keeps its earlier best epoch.

    Keras Tuner's also saves each epoch without the objective, as between two validations, over the best one.
    """

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self.objective.has_value(logs) or not math.isfinite(self.best_value):
            super().on_epoch_end(epoch, logs)

    def _save_model(self) -> None:
        path = Path(self.filepath)
        temporary = path.with_name(f"new.{path.name}")  # Keras requires the name's ending
        save_weights(self.model, temporary)
        os.replace(temporary, path)


def copy_callbacks(callbacks: Sequence[Any] | None, trial_name: str, execution: int) -> list[Any]:
    """Returns copies of the user's callbacks for one execution; TensorBoard's gets a folder of its own."""
    try:
        copies = copy.deepcopy(list(callbacks or []))
    except Exception as error:
        raise UnsendableDataError(
            f"Received callbacks that cannot be copied: {type(error).__name__}: {error}",
            "callbacks that copy.deepcopy can copy, because each trial uses its own.",
            "open files and connections in on_train_begin instead of the constructor.",
        ) from error
    for callback in copies:
        if type(callback).__name__ == "TensorBoard":
            callback.log_dir = str(Path(callback.log_dir) / trial_name / f"execution{execution}")
    return copies


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
