"""Checkpoints a trial's training at the end of epochs, and resumes it in a new process.

A training that is interrupted (Ctrl-C, a kill, a node that is gone) begins again in a new process, where the build
function makes the model anew and `fit` is called as before. `TrialCheckpoint` then gives back what an epoch's end had:

    the model's variables (the state of its seed generators is among them), the optimizer's, the generators of Python,
    NumPy, torch and Keras, each callback's own values (patience, best value, best weights), and the history

and starts `fit` at the epoch after. Executions and calls of `fit` that had ended are not run again. Arrays come in the
order in which they would have come: Keras's is the same in every epoch of a seed under TensorFlow, and comes from
generators that are given back under JAX and torch. A `tf.data.Dataset` that is shuffled anew in each epoch is wound
forward. What else a pipeline of the user's own draws from a state of its own begins anew.

Keras's `BackupAndRestore` restores the model alone: early stopping and learning-rate plateaus would begin anew, random
numbers repeat, and the history lose its beginning.
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

from accumtune.tracking.journal import Journal
from accumtune.tracking.small_files import atomic_file
from accumtune.worker.checkpoint.state_file import read_state, write_state
from accumtune.worker.checkpoint.training_state import (
    CallbackMemory,
    CannotContinue,
    give_back_random_state,
    give_back_values,
    random_state,
    values_of,
)
from accumtune.worker.transport.outcome import StopRequested, Superseded
from accumtune.worker.transport.task_directory import TaskDirectory

# An epoch's end is written when this time has passed since the last one, and twenty times what writing took: short
# epochs cost nothing, and large models at most a twentieth of their time.
_LEAST_SECONDS_BETWEEN = 2.0
_WRITING_SECONDS_TIMES = 20.0
_FORMAT = 3


class Pipelines(Protocol):
    """Data sets that draw from generators elsewhere, as `accumtune.worker.data.pipeline_process` has them."""

    def random_state(self) -> dict[str, Any]: ...

    def give_back_random_state(self, state: Mapping[str, Any]) -> None: ...

    def wind_forward(self, dataset: Any, epochs: int) -> bool: ...


class TrialCheckpoint:
    """The state of one trial's training, kept in its directory.

    Args:
        directory: of the trial.
        attempt: which start of the trial this is; its epochs are in the journal under this number.
        key: what makes it the same training; a state that was saved under another is not used.
        execution: which of the trial's trainings this process is for.
        earlier: the results of those before.
        least_seconds_between: between two saves.
        pipelines: those that are elsewhere.

    Attributes:
        attempt, execution, earlier: as given.
        seconds_before: of this training, in the processes before this one.
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
    ) -> None:
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
        """Of training so far, in all processes."""
        return self.seconds_before + time.monotonic() - self._began

    @property
    def has_fitted(self) -> bool:
        """Whether the model's `fit` has come to an end, in this process or in one before."""
        return bool(self._fits)

    def known_result(self) -> dict[str, Any] | None:
        """Of this execution, where it had ended before the interruption."""
        known: list[dict[str, Any]] = self._saved["results"] if self._saved else []
        return known[self.execution] if self.execution < len(known) else None

    def repeat_epochs(self) -> None:
        """Puts the epochs that need not be trained again into the journal, as epochs of this attempt.

        Those of all executions, so it is for the first one to do.
        """
        if self._saved is None:
            return
        position = {name: self._saved[name] for name in ("execution", "epoch")}
        self._journal.append("continued", attempt=self.attempt, **position, from_attempt=self._saved["attempt"])
        for event in self._saved["epochs"]:
            self._journal.append(**{**event, "attempt": self.attempt})

    def attach(self, model: Any) -> None:
        """Makes the model's `fit` save its state, and go on from the saved one where it is this fit's."""
        self._fits = []
        own_fit = model.fit

        @functools.wraps(own_fit)
        def fit(*args: Any, **kwargs: Any) -> Any:
            callbacks = kwargs.pop("callbacks", None) or []
            if isinstance(callbacks, keras.callbacks.CallbackList):
                return own_fit(*args, **kwargs, callbacks=callbacks)  # its owner drives it
            saved = self._state_of_this_execution()
            if saved is not None and len(self._fits) < saved["fit"]:
                self._fits.append(saved["fits"][len(self._fits)])
                return _history(model, self._fits[-1])
            if saved is not None:
                self._wind_forward(kwargs, saved["epoch"] + 1 - kwargs.get("initial_epoch", 0))
                kwargs["initial_epoch"] = kwargs.get("epochs", 1) if saved["is_ended"] else saved["epoch"] + 1
            callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
            if not any(isinstance(callback, keras.callbacks.History) for callback in callbacks):
                callbacks.append(keras.callbacks.History())  # before the saver, so that it is given back too
            saver = _SaveEpochs(self, callbacks, saved)
            history = own_fit(*args, **kwargs, callbacks=[*callbacks, saver])
            self._fits.append({"epoch": history.epoch, "history": history.history})
            return history

        model.fit = fit

    def _wind_forward(self, arguments: Mapping[str, Any], epochs: int) -> None:
        """Winds a `tf.data.Dataset` forward: `shuffle` draws an order for each iterator that is made.

        Keras makes one when an epoch begins and, where it knows the number of batches, another one when it has ended.
        Elsewhere, only iterators that are used are made.
        """
        data: Any = arguments.get("x")
        if arguments.get("steps_per_epoch"):
            return
        is_elsewhere = self._pipelines is not None and self._pipelines.wind_forward(data, epochs)
        if hasattr(data, "element_spec") and not is_elsewhere:
            for _ in range(epochs * (2 if int(data.cardinality()) > 0 else 1)):
                iter(data)

    def _state_of_this_execution(self) -> dict[str, Any] | None:
        if self._saved is not None and self._saved["execution"] == self.execution:
            return self._saved
        return None

    def memory_of(self, callback: Any) -> CallbackMemory:
        """Counted from the first fit that has it: a best value may be older than the fit that is interrupted."""
        return self._memories.setdefault(id(callback), CallbackMemory(callback))

    def taken_up(self) -> None:
        """The state was given back: what comes now is new."""
        state = None if self._saved is None else self._saved.get("random_of_pipelines")
        if self._pipelines is not None and state is not None:
            self._pipelines.give_back_random_state(state)
        self._saved = None

    def epoch_ended(self, epoch: int, model: Any, callbacks: Sequence[CallbackMemory]) -> None:
        """Saves what is due, and ends the training where that is asked for.

        Raises:
            StopRequested: the search wants an end.
            Superseded: another process has the task now.
        """
        if _identity(self._directory) != self._task:
            raise Superseded
        is_asked = self._directory.stop_file.exists()
        pause = max(self._least_seconds_between, _WRITING_SECONDS_TIMES * self._writing_seconds)
        began = time.monotonic()
        if is_asked or began - self._last_saved >= pause:
            self._save(epoch, model, callbacks)
            self._last_saved = time.monotonic()
            self._writing_seconds = self._last_saved - began
        if is_asked:
            raise StopRequested

    def _save(self, epoch: int, model: Any, callbacks: Sequence[CallbackMemory]) -> None:
        state = {
            "format": _FORMAT,
            "key": self._key,
            "attempt": self.attempt,
            # With it, because the journal may be on a machine that is gone.
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
    """The last callback of a fit: every other one has done its part when it saves, and has begun when it restores."""

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
        give_back_values(self.model, self._saved["variables"])
        if len(self._saved["callbacks"]) != len(self._others):
            raise CannotContinue("another number of callbacks")
        for callback, state in zip(self._others, self._saved["callbacks"], strict=True):
            vars(callback).update(state)
        give_back_random_state(self._saved["random"])
        self._checkpoint.taken_up()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._checkpoint.epoch_ended(epoch, self.model, self._memories)


def _load(directory: TaskDirectory, key: str) -> dict[str, Any] | None:
    try:
        state = read_state(directory.checkpoint_file)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file raises: the training begins anew, and the log says why
        print(f"The saved state cannot be read ({type(error).__name__}: {error}): the training begins anew.")
        return None
    return state if isinstance(state, dict) and state.get("format") == _FORMAT and state.get("key") == key else None


def _identity(directory: TaskDirectory) -> tuple[int, int] | None:
    """The task's file: written anew, it is another one."""
    try:
        status = os.stat(directory.task_file)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _history(model: Any, saved: Mapping[str, Any]) -> Any:
    history = keras.callbacks.History()
    history.set_model(model)
    history.epoch, history.history = list(saved["epoch"]), dict(saved["history"])
    model.history = history
    return history
