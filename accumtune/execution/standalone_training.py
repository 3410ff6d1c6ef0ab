"""Trains like a trial, in a process of its own, but outside of a search: completely, or for a few updates."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accumtune.accumulation import accumulate
from accumtune.accumulation.batch_pair import ghost_batch_of
from accumtune.accumulation.own_step.own_train_step import can_be_evaluated
from accumtune.execution.device_query import current_backend
from accumtune.execution.executors import LocalExecutor
from accumtune.execution.repeated_training import run_executions
from accumtune.memory.device import memory_limit_environment
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.data.user_data import feed_by_batches, first_samples, has_batches, is_tf_dataset, resolve
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

# Peaks differ from update to update (operations run in another order), and an epoch begins while the one before is
# still in memory. So many updates and epochs are needed to see the highest peak, unless they are slow.
_STEADY_UPDATES, _STEADY_EPOCHS, _LEAST_UPDATES, _PATIENCE_SECONDS = 200, 2, 5, 5.0


_TWICE = re.compile(r"got multiple values for (?:keyword )?argument '(\w+)'")


@dataclass(frozen=True)
class FixedHyperModel:
    """Builds and fits like the hypermodel of a search, with one pair of batch sizes.

    Args:
        builder: builds plain models.
        micro_batch_size, effective_batch_size: of every training.
        ghost_batch_size: see `accumtune.accumulate`.
    """

    builder: ModelBuilder
    micro_batch_size: int
    effective_batch_size: int
    ghost_batch_size: int | None = None

    def build(self, hp: Any) -> Any:
        model = self.builder.build_plain(hp)
        ghost = ghost_batch_of(self.effective_batch_size, self.ghost_batch_size)
        return accumulate(model, self.micro_batch_size, ghost_batch_size=ghost)

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        feed_by_batches(model, self.effective_batch_size, self.micro_batch_size)
        fit = getattr(self.builder.hypermodel, "fit", None)
        if fit is None:
            return model.fit(*args, **kwargs)
        while True:
            try:
                return fit(hp, model, *args, **kwargs)
            except TypeError as error:  # it sets epochs, or another of these arguments, itself
                name = _TWICE.search(str(error))
                # Not after an earlier phase of training, which would be repeated.
                if _updates(model) or name is None or kwargs.pop(name[1], None) is None:
                    raise


def _updates(model: Any) -> int:
    from keras import ops

    return int(ops.convert_to_numpy(model.optimizer.iterations))


@dataclass(frozen=True)
class FirstUpdates(FixedHyperModel):
    """Trains only for two epochs and 200 updates, or five seconds; validates if the model can be evaluated."""

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        feed_by_batches(model, self.effective_batch_size, self.micro_batch_size)
        x, y, sample_weight = resolve(kwargs.pop("x"), kwargs.pop("y"), kwargs.pop("sample_weight", None))
        callbacks = [*kwargs.pop("callbacks", ()), _stop_when_steady()]
        arguments = {"sample_weight": sample_weight, "callbacks": callbacks}
        if can_be_evaluated(model):
            is_batched = not is_tf_dataset(x) or has_batches(model, x)
            first = first_samples(x, y, sample_weight, count=self.micro_batch_size, is_batched=is_batched)
            arguments["validation_data"] = first
        return model.fit(x, y, **arguments, epochs=10**6, verbose=0)


def train_isolated(
    hypermodel: FixedHyperModel,
    data: Mapping[str, Any],
    *,
    hyperparameters: Mapping[str, Any],
    objective: Any,
    seed: int,
    executions: int = 1,
    memory_budget_bytes: int | None = None,
    timeout_seconds: float | None = None,
) -> Outcome:
    """Runs the task of a trial.

    Args:
        hypermodel: builds and fits the model.
        data: arguments of `fit`, the data included.
        hyperparameters: values by name, the batch sizes included.
        objective: a `keras_tuner.Objective`; its best epoch is the result.
        seed, executions: as in a search.
        memory_budget_bytes: the limit of the process's allocator; None for none.
        timeout_seconds: the time limit; None for none.

    Returns:
        The outcome; its `result` is that of `worker.training.train`.

    Raises:
        UnsendableDataError: the data cannot be sent to another process.
        WorkerError: processes cannot be started here.
    """
    with tempfile.TemporaryDirectory(prefix="accumtune-training-") as folder:
        payload_file = Path(folder).resolve() / "data" / "payload.pkl"
        content = {"hypermodel": hypermodel, "objective": objective, "fit_args": (), "fit_kwargs": dict(data)}
        dump_payload(content, payload_file)
        directory = TaskDirectory(Path(folder) / "trial")
        arguments = {
            "payload": str(payload_file),
            "hyperparameters": {"space": [], "values": dict(hyperparameters)},
            "memory_budget_bytes": memory_budget_bytes,
            "seed": seed,
            "attempt": 1,
            "executions": executions,
        }
        with LocalExecutor(current_backend()) as executor:
            environment = memory_limit_environment(executor.backend, memory_budget_bytes)
            is_limited = memory_budget_bytes is not None

            def run(execution: int, earlier: list[dict[str, Any]]) -> Outcome:
                directory.write_task("train", {**arguments, "execution": execution, "earlier": earlier})
                return executor.submit(directory, environment, timeout_seconds, is_limited).result()

            return run_executions(run, executions)


def _stop_when_steady() -> Any:
    import keras

    class StopWhenSteady(keras.callbacks.Callback):
        updates = epochs = 0
        started = 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.updates += 1
            self.started = self.started or time.monotonic()  # after the first update, which compiles
            is_slow = time.monotonic() - self.started > _PATIENCE_SECONDS
            is_steady = self.updates >= _STEADY_UPDATES and self.epochs >= _STEADY_EPOCHS
            if is_steady or (is_slow and self.updates >= _LEAST_UPDATES):
                self.model.stop_training = True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.epochs += 1

    return StopWhenSteady()
