"""Checkpoints a trial's training at the end of epochs, and resumes it in a new process.

A training that is interrupted (by Ctrl-C, a kill, a lost machine) continues in a new process, where the build function
builds the model again and `fit` is called as before. `TrialCheckpoint` then restores the state of an epoch's end:

    the variables of the model (with those of its seed generators) and of the optimizer, the generators of Python,
    NumPy, torch and Keras, each callback's own values (patience, best value, best weights), and the history

and starts `fit` at the next epoch. Executions and calls of `fit` that had ended are not repeated. Arrays come in the
same order as without the interruption: under TensorFlow Keras's order is the same in every epoch of a seed, under JAX
and torch it comes from generators that are restored. A `tf.data.Dataset` that is reshuffled in each epoch is advanced.
Other state of the user's own pipeline is not restored.

Keras's `BackupAndRestore` restores only the model: early stopping and learning-rate plateaus would start over, random
numbers would repeat, and the history would lose its beginning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras

from accumtune.errors import SearchError
from accumtune.tracking.journal import Journal
from accumtune.tracking.small_files import atomic_file
from accumtune.worker.callbacks import LogsOfEpochs
from accumtune.worker.checkpoint.state_file import read_state, write_state
from accumtune.worker.checkpoint.training_state import (
    CallbackMemory,
    CannotContinue,
    random_state,
    restore_random_state,
    restore_values,
    values_of,
)
from accumtune.worker.transport.outcome import StopRequested, Superseded
from accumtune.worker.transport.task_directory import TaskDirectory

# A checkpoint is written at an epoch's end if this time has passed since the last one, and twenty times the time that
# writing took: so short epochs cost little, and large models at most a twentieth of their time.
_LEAST_SECONDS_BETWEEN = 2.0
_WRITING_SECONDS_TIMES = 20.0
_FORMAT = 4


class Pipelines(Protocol):
    """Data sets whose generators are in another process (see `accumtune.worker.data.pipeline_process`)."""

    def random_state(self) -> dict[str, Any]: ...

    def restore_random_state(self, state: Mapping[str, Any]) -> None: ...

    def advance(self, dataset: Any, epochs: int) -> bool: ...


class TrialCheckpoint:
    """The saved state of one trial's training, in its directory.

    Args:
        directory: of the trial.
        attempt: which start of the trial this is; its epochs are in the journal under this number.
        key: identifies the training; a state that was saved under another key is not used.
        execution: which of the trial's executions this process runs.
        earlier: the results of the executions before.
        least_seconds_between: between two saves.
        pipelines: those in another process.
        pause_after: the number of epochs after which the training saves its state and ends, to go on later.

    Attributes:
        attempt, execution, earlier: as given.
        paused_after: the number of epochs after which it has done so; None if it ran to its end.
        seconds_before: how long earlier processes have trained this execution.
    """

    def __init__(
        self,
        directory: TaskDirectory,
        attempt: int,
        key: Mapping[str, Any],
        execution: int = 0,
        earlier: Sequence[dict[str, Any]] = (),
        least_seconds_between: float = _LEAST_SECONDS_BETWEEN,
        pipelines: Pipelines | None = None,
        pause_after: int | None = None,
    ) -> None:
        self._pause_after = pause_after
        self.paused_after: int | None = None
        self._directory = directory
        self.attempt = attempt
        self._journal = Journal(directory.journal_file)
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=repr).encode()).hexdigest()
        self._least_seconds_between = least_seconds_between
        self._pipelines = pipelines
        self._saved = _load(directory, self._key)
        self._task = _identity(directory)
        self._began = self._last_saved = time.monotonic()
        self._writing_seconds = 0.0
        self._fits: list[dict[str, Any]] = []
        self._memories: dict[int, CallbackMemory] = {}
        self.execution = execution
        self.earlier = list(earlier)
        state = self._state_of_this_execution()
        self.seconds_before: float = state["seconds"] if state else 0.0

    @property
    def seconds(self) -> float:
        """The seconds of training so far, in all processes."""
        return self.seconds_before + time.monotonic() - self._began

    @property
    def has_fitted(self) -> bool:
        """Whether the model's `fit` has ended, in this process or an earlier one."""
        return bool(self._fits)

    def known_result(self) -> dict[str, Any] | None:
        """Returns the result of this execution, if it had ended before the interruption."""
        known: list[dict[str, Any]] = self._saved["results"] if self._saved else []
        return known[self.execution] if self.execution < len(known) else None

    def repeat_epochs(self) -> None:
        """Journals the epochs that are not trained again, as epochs of this attempt.

        These are the epochs of all executions, so only the first execution calls this.
        """
        if self._saved is None:
            return
        position = {name: self._saved[name] for name in ("execution", "epoch")}
        self._journal.append("continued", attempt=self.attempt, **position, from_attempt=self._saved["attempt"])
        for event in self._saved["epochs"]:
            self._journal.append(**{**event, "attempt": self.attempt})

    def attach(self, model: Any) -> None:
        """Makes the model's `fit` save its state, and resume from a saved one."""
        self._fits = []
        own_fit = model.fit

        @functools.wraps(own_fit)
        def fit(*args: Any, **kwargs: Any) -> Any:
            if self.paused_after is not None:
                raise SearchError(
                    'Received a HyperModel.fit that trains several times, and pruner="freeze-thaw".',
                    "a HyperModel.fit that calls model.fit once: the search pauses it, and goes on with it later.",
                    "train once, or take another pruner.",
                )
            callbacks = kwargs.pop("callbacks", None) or []
            if isinstance(callbacks, keras.callbacks.CallbackList):
                return own_fit(*args, **kwargs, callbacks=callbacks)  # the caller drives it
            saved = self._state_of_this_execution()
            if saved is not None and len(self._fits) < saved["fit"]:
                self._fits.append(saved["fits"][len(self._fits)])
                return _history(model, self._fits[-1])
            if saved is not None:
                self._advance(kwargs, saved["epoch"] + 1 - kwargs.get("initial_epoch", 0))
                kwargs["initial_epoch"] = kwargs.get("epochs", 1) if saved["is_ended"] else saved["epoch"] + 1
            callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
            # The last History is what fit returns. It is before the saver, so that it is restored too.
            callbacks.append(LogsOfEpochs())
            saver = _SaveEpochs(self, callbacks, saved)
            history = own_fit(*args, **kwargs, callbacks=[*callbacks, saver])
            self._fits.append(
                {"epoch": history.epoch, "history": history.history, "rows": getattr(history, "rows", [])}
            )
            return history

        model.fit = fit

    def _advance(self, arguments: Mapping[str, Any], epochs: int) -> None:
        """Advances a `tf.data.Dataset` by epochs: `shuffle` draws an order for each iterator that is created.

        Keras creates one when an epoch begins and, if it knows the number of batches, another one when it ends. In the
        pipelines' process, only iterators that are used are created.
        """
        data: Any = arguments.get("x")
        if arguments.get("steps_per_epoch"):
            return
        is_elsewhere = self._pipelines is not None and self._pipelines.advance(data, epochs)
        if hasattr(data, "element_spec") and not is_elsewhere:
            for _ in range(epochs * (2 if int(data.cardinality()) > 0 else 1)):
                iter(data)

    def _state_of_this_execution(self) -> dict[str, Any] | None:
        if self._saved is not None and self._saved["execution"] == self.execution:
            return self._saved
        return None

    def memory_of(self, callback: Any) -> CallbackMemory:
        """Returns the memory of a callback since its first fit: its best value may be of an earlier fit."""
        return self._memories.setdefault(id(callback), CallbackMemory(callback))

    def restored(self) -> None:
        """Restores the pipelines' generators, and forgets the saved state: from now on the epochs are new."""
        state = None if self._saved is None else self._saved.get("random_of_pipelines")
        if self._pipelines is not None and state is not None:
            self._pipelines.restore_random_state(state)
        self._saved = None

    def epoch_ended(self, epoch: int, epochs: int, model: Any, callbacks: Sequence[CallbackMemory]) -> None:
        """Saves the state if that is due, and ends the training if it pauses or the search has asked for it.

        Raises:
            StopRequested: the search has asked to stop.
            Superseded: the task was given to another process.
        """
        if _identity(self._directory) != self._task:
            raise Superseded
        is_asked = self._directory.stop_file.exists()
        is_due = self._pause_after is not None and epoch + 1 >= self._pause_after
        is_pause = is_due and epoch + 1 < epochs and not model.stop_training
        pause = max(self._least_seconds_between, _WRITING_SECONDS_TIMES * self._writing_seconds)
        began = time.monotonic()
        if is_asked or is_pause or began - self._last_saved >= pause:
            self._save(epoch, model, callbacks)
            self._last_saved = time.monotonic()
            self._writing_seconds = self._last_saved - began
        if is_asked:
            raise StopRequested
        if is_pause:
            self.paused_after, model.stop_training = epoch + 1, True

    def _save(self, epoch: int, model: Any, callbacks: Sequence[CallbackMemory]) -> None:
        state = {
            "format": _FORMAT,
            "key": self._key,
            "attempt": self.attempt,
            # A copy, because the journal may be on a lost machine.
            "epochs": self._epochs(),
            "seconds": self.seconds,
            "results": self.earlier,
            "execution": self.execution,
            "fits": self._fits,
            "fit": len(self._fits),
            "epoch": epoch,
            "is_ended": bool(model.stop_training),
            "variables": values_of(model),
            "random": random_state(),
            "random_of_pipelines": None if self._pipelines is None else self._pipelines.random_state(),
            "callbacks": [memory.state() for memory in callbacks],
        }
        with atomic_file(self._directory.checkpoint_file) as file:
            write_state(file, state)

    def _epochs(self) -> list[dict[str, Any]]:
        events = self._journal.events()
        return [event for event in events if event["event"] == "epoch" and event.get("attempt") == self.attempt]


class _SaveEpochs(keras.callbacks.Callback):
    """Saves and restores the state; it is the last callback, so that the others have run before."""

    def __init__(self, checkpoint: TrialCheckpoint, others: Sequence[Any], saved: dict[str, Any] | None) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._others = others
        self._saved = saved
        self._memories: list[CallbackMemory] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._memories = [self._checkpoint.memory_of(callback) for callback in self._others]
        if self._saved is None:
            return
        restore_values(self.model, self._saved["variables"])
        if len(self._saved["callbacks"]) != len(self._others):
            raise CannotContinue("the number of callbacks has changed")
        for callback, state in zip(self._others, self._saved["callbacks"], strict=True):
            vars(callback).update(state)
        restore_random_state(self._saved["random"])
        self._checkpoint.restored()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        epochs = (self.params or {}).get("epochs", 0)
        self._checkpoint.epoch_ended(epoch, epochs, self.model, self._memories)


def _load(directory: TaskDirectory, key: str) -> dict[str, Any] | None:
    try:
        state = read_state(directory.checkpoint_file)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file raises
        print(f"The saved state cannot be read ({type(error).__name__}: {error}): training starts from the beginning.")
        return None
    return state if isinstance(state, dict) and state.get("format") == _FORMAT and state.get("key") == key else None


def _identity(directory: TaskDirectory) -> tuple[int, int] | None:
    """Identifies the task's file: it is replaced when the task is given to another process."""
    try:
        status = os.stat(directory.task_file)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _history(model: Any, saved: Mapping[str, Any]) -> Any:
    history = LogsOfEpochs()
    history.set_model(model)
    history.rows = list(saved["rows"])
    history.epoch, history.history = list(saved["epoch"]), dict(saved["history"])
    model.history = history
    return history
