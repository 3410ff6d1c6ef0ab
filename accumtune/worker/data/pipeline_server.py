"""Makes pipelines and sends their elements, in the process of `worker.data.pipeline_process`."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from accumtune.memory.device import memory_limit_environment
from accumtune.worker.child_process import die_with_parent
from accumtune.worker.data.shared_arrays import SharedArrays


@dataclass(frozen=True)
class View:
    """Identifies a pipeline, and the batches in which it is read (see `accumtune.worker.data.rebatch`).

    Args:
        name: of the function.
        call: which call of the function made the pipeline.
        batch_size, is_batched: as for `rebatched`; None: the pipeline's own batches.
        first: how many of its elements; None: all.
    """

    name: str
    call: int
    batch_size: int | None = None
    is_batched: bool = True
    first: int | None = None


def serve(
    connection: Connection, arrays: SharedArrays, functions: Mapping[str, Callable[[], Any]], seed: int | None
) -> int:
    """Answers requests in a forked process until the other end is closed.

    Args:
        connection: receives `(numbers of dropped iterators, name of a method of _Pipelines, its arguments)`; sends
            `(answer, None)` or `(None, error)`.
        arrays: shared memory for the elements.
        functions: the functions that make the pipelines, by name.
        seed: for the global generators; None for none.

    Returns:
        The exit code of the process.
    """
    die_with_parent()
    # Before TensorFlow's first operation: no limited allocator, and no GPU, which the training needs.
    for variable in memory_limit_environment("tensorflow", 2**30):
        os.environ.pop(variable, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    pipelines = _Pipelines(arrays, functions, seed)
    while True:
        try:
            dropped, request, *arguments = connection.recv()
        except (EOFError, ConnectionError):
            return 0
        pipelines.drop(dropped)
        connection.send(_answer(getattr(pipelines, request), *arguments))
        if request == "take":
            pipelines.look_ahead(arguments[0])


class _Pipelines:
    def __init__(self, arrays: SharedArrays, functions: Mapping[str, Callable[[], Any]], seed: int | None) -> None:
        self._arrays = arrays
        self._functions = functions
        self._seed = seed
        self._datasets: dict[View, Any] = {}
        self._iterators: dict[int, Iterator[Any]] = {}
        self._ahead: dict[int, tuple[list[np.ndarray] | None, Exception | None]] = {}

    def open(self, view: View) -> tuple[Any, int] | None:
        import tensorflow as tf

        dataset = self._dataset(view)
        if not isinstance(dataset, tf.data.Dataset):
            return None
        specs = tf.nest.flatten(dataset.element_spec)
        if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None for spec in specs):
            return None
        return dataset.element_spec, int(dataset.cardinality())

    def take(self, number: int, view: View) -> list[Any] | None:
        if number not in self._iterators:
            self._iterators[number] = iter(self._dataset(view))
            self.look_ahead(number)
        arrays, error = self._ahead.pop(number)
        if error is not None:
            raise error
        return None if arrays is None else self._arrays.put(arrays)

    def look_ahead(self, number: int) -> None:
        """Makes the next element of an iterator while the training uses the one before."""
        try:
            self._ahead[number] = self._next(number), None
        except Exception as error:  # of the user's pipeline: raised when the element is requested
            self._ahead[number] = None, error

    def drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._iterators.pop(number, None)
            self._ahead.pop(number, None)

    def advance(self, view: View, epochs: int) -> None:
        for _ in range(epochs):
            iter(self._dataset(view))

    def random_state(self) -> dict[str, Any]:
        from accumtune.worker.checkpoint.training_state import random_state

        return random_state()

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        from accumtune.worker.checkpoint.training_state import restore_random_state

        restore_random_state(state)

    def _dataset(self, view: View) -> Any:
        from accumtune.worker.data.rebatch import rebatched

        if view not in self._datasets:
            if view.batch_size is None:
                made = self._made(view.name)
            else:
                whole = self._dataset(View(view.name, view.call))
                made = rebatched(whole, view.batch_size, view.is_batched, view.first)
            self._datasets[view] = made
        return self._datasets[view]

    def _made(self, name: str) -> Any:
        import keras
        import tensorflow as tf

        if self._seed is not None and not self._datasets:
            keras.utils.set_random_seed(self._seed)
        made = self._functions[name]()
        return made if isinstance(made, tf.data.Dataset) else None  # arrays are not kept

    def _next(self, number: int) -> list[np.ndarray] | None:
        import tensorflow as tf

        element = next(self._iterators[number], None)
        return None if element is None else [tensor.numpy() for tensor in tf.nest.flatten(element)]


def _answer(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """Returns a function's result, or the error that it raises, in a form that can be sent."""
    try:
        return function(*arguments), None
    except Exception as error:
        text = "In the process of the data pipeline:\n" + "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a user's exception class raises when it is unpickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(text)
        return None, error
