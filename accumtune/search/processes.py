"""Starts a search's processes other than trials: they discover its space, probe its models and run its winner."""

from __future__ import annotations

import contextlib
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accumtune.errors import BuildError
from accumtune.execution.executors import Executor
from accumtune.execution.profiling import Profiler
from accumtune.execution.timeouts import DEFAULT_SECONDS
from accumtune.memory.device import memory_limit_environment
from accumtune.memory.prediction.profile import Measurement
from accumtune.search.parallelism import open_executor
from accumtune.search.results.selection import Candidate
from accumtune.worker.transport.outcome import finished
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory


class SearchProcesses:
    """Starts processes. It opens the executor when that is first needed; trials use the same one.

    Args:
        files: the search's directory.
        pool: where processes run; None for this machine.
        backend: Keras's.
        memory_budget_bytes: of the probes.
        micro_batch_sizes: those that the search uses.
        timeout_seconds: the time limit of a process that builds or probes.
    """

    def __init__(
        self,
        files: SearchDirectory,
        pool: Any,
        backend: str,
        *,
        memory_budget_bytes: int | None,
        micro_batch_sizes: Sequence[int],
        timeout_seconds: float = DEFAULT_SECONDS,
    ) -> None:
        self._files = files
        self._pool = pool
        self.backend = backend
        self._memory_budget_bytes = memory_budget_bytes
        self._micro_batch_sizes = tuple(micro_batch_sizes)
        self._timeout_seconds = timeout_seconds
        self._executor: Executor | None = None
        self._is_sharing = False

    def executor(self) -> Executor:
        if self._executor is None:
            self._executor = open_executor(self._pool, self.backend)
            # A tuner that never searches is not closed otherwise.
            self._close_executor = weakref.finalize(self, self._executor.close)
            self._close_executor.atexit = False
        return self._executor

    def close(self) -> None:
        if self._executor is not None:
            self._close_executor()
            self._executor = None

    def discover(self, hypermodel: Any, space: Any) -> dict[str, Any]:
        """Builds the model once, to find its hyperparameters and what couples its samples.

        Within `sharing`, the model's own code is also tested on the data.

        Raises:
            BuildError: the build function raised or returned something other than a compiled model.
        """
        directory = TaskDirectory(self._files.scratch_folder / "discover")
        arguments: dict[str, Any] = {"payload": str(self._files.payload_file.resolve())}
        if self._is_sharing:
            arguments["space"] = space.get_config()
        else:
            payload_file = directory.path / "payload" / "payload.pkl"
            dump_payload({"hypermodel": hypermodel, "hyperparameters": space}, payload_file)
            arguments["payload"] = str(payload_file.resolve())
        directory.write_task("discover", arguments)
        environment = memory_limit_environment(self.backend, None)
        future = self.executor().submit(directory, environment, self._timeout_seconds)
        outcome = finished(future.result(), "The build function")
        shutil.rmtree(directory.path, ignore_errors=True)
        return dict(outcome.result)

    @contextlib.contextmanager
    def sharing(self, payload: Mapping[str, Any]) -> Iterator[None]:
        """Keeps the hypermodel and the data on disk, for the processes, until the context ends."""
        try:
            dump_payload(payload, self._files.payload_file)
            self._is_sharing = True
            yield
        finally:
            self._is_sharing = False
            shutil.rmtree(self._files.payload_file.parent, ignore_errors=True)

    def profiler(self, on_probe: Callable[[str], None] = lambda line: None) -> Profiler:
        return Profiler(
            self.executor(),
            self._files.payload_file,
            self._files.scratch_folder,
            self._files.profiles_folder,
            memory_budget_bytes=self._memory_budget_bytes,
            micro_batch_sizes=self._micro_batch_sizes,
            on_probe=on_probe,
            timeout_seconds=self._timeout_seconds,
            only_listed=True,
        )

    def runs(
        self, candidate: Candidate, space: Mapping[str, Any], signature: str, payload: Mapping[str, Any]
    ) -> bool:
        """Runs an untrained configuration for a few updates, and returns whether that stays within the budget.

        The measurement is added to the profile of its model.

        Args:
            candidate: the configuration.
            space: Keras Tuner's configuration of its trial's hyperparameters.
            signature: of its trial's model.
            payload: what trials are sent, for when the search has ended and has deleted its data from disk.
        """
        was_open = self._executor is not None
        with contextlib.ExitStack() as stack:
            if not self._files.payload_file.exists():
                stack.enter_context(self.sharing(payload))
            if not was_open:
                stack.callback(self.close)
            try:
                measurement = self.profiler().measure(
                    {**space, "values": dict(candidate.hyperparameters)},
                    signature,
                    candidate.micro_batch_size,
                    candidate.accumulation_steps,
                )
            except BuildError:  # it did not train; the next best may
                return False
        return self._is_within_budget(measurement)

    def _is_within_budget(self, measurement: Measurement) -> bool:
        peak, budget = measurement.peak_memory_bytes, self._memory_budget_bytes
        return peak is not None and (budget is None or peak <= budget)
