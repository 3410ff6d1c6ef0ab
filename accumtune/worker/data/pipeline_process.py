"""Runs a `tf.data` pipeline in a process of its own, so that its memory does not count towards the budget.

On a GPU, the tensors of `from_tensor_slices`, the buffer of `shuffle` and a `cache` are in the host's memory. On a CPU
TensorFlow has one allocator for everything: they would count as the training's memory, and a data set larger than the
budget could not be trained on. So the function that makes the pipeline is called in a fork of the task's process,
without the limited allocator. Batches come through shared memory, one of them made ahead.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from accumtune.errors import DataError
from accumtune.worker.child_process import end_process
from accumtune.worker.data.pipeline_server import View, serve
from accumtune.worker.data.shared_arrays import SharedArrays
from accumtune.worker.transport.payload import DataFunction

_NAMES = ("x", "validation_data")


class PipelineProcess:
    """The process with the pipelines. The constructor forks, so TensorFlow must not have run an operation yet.

    Args:
        functions: the functions that make the pipelines, by name.
        seed: for the global generators there; None for none.
        payload: the file that the functions came from. Beside it, the process notes functions that do not return a
            pipeline, so that no other process of the search calls them here again.
    """

    def __init__(self, functions: Mapping[str, DataFunction], seed: int | None, payload: Path) -> None:
        self._functions = functions
        self._payload = payload
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._dropped: list[int] = []
        self._datasets: list[tuple[Any, View]] = []
        self._connection, theirs = Pipe()
        self._arrays = SharedArrays()
        if os.fork() == 0:
            self._connection.close()
            end_process(lambda: serve(theirs, self._arrays, functions, seed))
        theirs.close()

    @classmethod
    def of(
        cls, functions: Mapping[str, DataFunction], payload: Path, seed: int | None
    ) -> PipelineProcess | None:
        """Starts a process for the functions among the data of `fit`; None if none may make a pipeline.

        Args:
            functions: of the payload's header.
            payload, seed: as above.
        """
        functions = {name: functions[name] for name in _NAMES if name in functions}
        is_needed = any(not _note_of(payload, name).exists() for name in functions)
        return cls(functions, seed, payload) if is_needed else None

    def moved(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content with functions whose pipelines `called` opens in the process."""
        here = {
            name: replace(function, open_elsewhere=functools.partial(self._make, name))
            for name, function in self._functions.items()
        }
        positional, named = list(content["fit_args"]), dict(content["fit_kwargs"])
        if positional:
            positional[0] = here.pop("x", positional[0])
        return {**content, "fit_args": tuple(positional), "fit_kwargs": {**named, **here}}

    def _make(self, name: str) -> PipelineElsewhere | None:
        """Calls a function there; None if it does not return a pipeline, or one of ragged or sparse tensors."""
        note = _note_of(self._payload, name)
        if note.exists():
            return None
        pipeline = self.open(View(name, next(self._numbers)))
        if pipeline is None:
            with contextlib.suppress(OSError):
                note.touch()
        return pipeline

    def open(self, view: View) -> PipelineElsewhere | None:
        """Opens a pipeline; calls its function first if this call was not made yet."""
        described = self._ask("open", view)
        return None if described is None else PipelineElsewhere(self, view, *described)

    def iterate(self, view: View) -> Iterator[list[np.ndarray]]:
        """Yields the elements of an epoch, each as its arrays in the order of `tf.nest`."""
        number = next(self._numbers)
        try:
            while (arrays := self._ask("take", number, view)) is not None:
                yield arrays
        finally:
            self._dropped.append(number)  # sent with the next request: this may run in the garbage collector

    def advance(self, dataset: Any, epochs: int) -> bool:
        """Advances the pipeline of a data set by epochs: `shuffle` draws an order for each iterator that is created.

        Returns:
            Whether the data set is one of this process, made by `PipelineElsewhere.as_tf_dataset`.
        """
        views = [view for made, view in self._datasets if made is dataset]
        for view in views:
            self._ask("advance", view, epochs)
        return bool(views)

    def register(self, dataset: Any, view: View) -> Any:
        """Registers a data set for `advance`, and returns it."""
        self._datasets.append((dataset, view))
        return dataset

    def random_state(self) -> dict[str, Any]:
        """Returns the state of the process's generators, from which a pipeline may draw."""
        state: dict[str, Any] = self._ask("random_state")
        return state

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        """Sets the generators to the state that `random_state` returned."""
        self._ask("restore_random_state", state)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            dropped, self._dropped = self._dropped, []
            try:
                self._connection.send((dropped, *request))
                answer, error = self._connection.recv()
            except (EOFError, ConnectionError):
                raise DataError(
                    "The process of the data pipeline has ended: it crashed, or was killed because the machine had no "
                    "memory left.",
                    "a function whose tf.data pipeline can be read to its end.",
                    "read it yourself: `for batch in make_data(): pass`. The trial's log.txt has what it printed.",
                ) from None
            if request[0] == "take" and answer is not None:  # before the next request, which writes over them
                answer = self._arrays.take(answer)
        if error is not None:
            raise error
        return answer


class PipelineElsewhere:
    """A `tf.data.Dataset` in a `PipelineProcess`.

    Args:
        process: the process that has it.
        view: which pipeline, and in which batches.
        element_spec, cardinality: as of a `tf.data.Dataset`.
    """

    def __init__(self, process: PipelineProcess, view: View, element_spec: Any, cardinality: int) -> None:
        self._process = process
        self._view = view
        self.element_spec = element_spec
        self._cardinality = cardinality

    def __iter__(self) -> Iterator[Any]:
        """Yields the elements, with arrays instead of tensors."""
        import tensorflow as tf

        for arrays in self._process.iterate(self._view):
            yield tf.nest.pack_sequence_as(self.element_spec, arrays)

    def take(self, first: int) -> PipelineElsewhere:
        """Returns the first elements; to be followed by `batch` or `rebatch`."""
        view = replace(self._view, first=first)
        return PipelineElsewhere(self._process, view, self.element_spec, self._cardinality)

    def batch(self, batch_size: int) -> PipelineElsewhere:
        """Returns batches of the pipeline's samples."""
        return self._in_batches(batch_size, is_batched=False)

    def rebatch(self, batch_size: int) -> PipelineElsewhere:
        """Returns batches of another size from the pipeline's batches."""
        return self._in_batches(batch_size, is_batched=True)

    def as_tf_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of these elements, of which only the newest is in this process's memory."""
        import tensorflow as tf

        from accumtune.accumulation.data.array_datasets import counted_tensors, one_at_a_time

        specs = tf.nest.flatten(self.element_spec)
        nothing = [np.zeros([size or 0 for size in spec.shape.as_list()], spec.dtype.as_numpy_dtype) for spec in specs]
        epoch: Iterator[list[np.ndarray]] = iter(())

        def take(index: np.ndarray) -> list[np.ndarray]:
            nonlocal epoch
            if index == 0:  # opened at the first element, because Keras creates iterators that it does not use
                epoch = self._process.iterate(self._view)
            arrays = next(epoch, None)
            return [np.asarray(arrays is not None), *(nothing if arrays is None else arrays)]

        def element(index: Any) -> Any:
            is_there, *tensors = counted_tensors(take, index, [tf.TensorSpec((), tf.bool), *specs])
            return is_there, tf.nest.pack_sequence_as(self.element_spec, tensors)

        dataset = tf.data.Dataset.range(sys.maxsize).map(element)
        dataset = dataset.take_while(lambda is_there, _: is_there).map(lambda _, element: element)
        dataset = one_at_a_time(dataset)
        if self._cardinality != tf.data.UNKNOWN_CARDINALITY:
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(self._cardinality))
        return self._process.register(dataset, self._view)

    def _in_batches(self, batch_size: int, is_batched: bool) -> PipelineElsewhere:
        batched = self._process.open(replace(self._view, batch_size=batch_size, is_batched=is_batched))
        assert batched is not None
        return batched


def called(function: Callable[[], Any]) -> Any:
    """Calls a function for data, in its `PipelineProcess` if it has one and returns a pipeline."""
    elsewhere = None
    if isinstance(function, DataFunction) and function.open_elsewhere is not None:
        elsewhere = function.open_elsewhere()
    return function() if elsewhere is None else elsewhere


def _note_of(payload: Path, name: str) -> Path:
    # With the time of writing, because a resumed search may have another function.
    return payload.with_name(f"{payload.stem}-{payload.stat().st_mtime_ns}-{name}-is-no-pipeline")
