"""A `tf.data` pipeline in a process of its own, where what it keeps is in nobody's memory budget.

On a GPU, the tensors of `from_tensor_slices`, the buffer of `shuffle` and a `cache` are in the host's memory. On a CPU
TensorFlow has one allocator for all: they would be counted as the training's, and a data set larger than the budget
could not be trained on. So the function that makes the pipeline is called in a fork of the task's process, which has
the plain allocator, and batches come through memory that both have, one of them made ahead.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from accumtune.errors import DataError
from accumtune.memory.device import memory_limit_environment
from accumtune.trials.forkserver import die_with_parent
from accumtune.trials.shared_arrays import SharedArrays

_OPEN = "accumtune_open"
_NAMES = ("x", "validation_data")


@dataclass(frozen=True)
class View:
    """A pipeline as it is, or its samples in batches of another size (see `accumtune.trials.rebatch`).

    Args:
        name: of the function.
        call: which call of it made the pipeline.
        batch_size, is_batched: as for `rebatched`; None for the batches of its own.
    """

    name: str
    call: int
    batch_size: int | None = None
    is_batched: bool = True


class PipelineProcess:
    """The process, forked when this is made: TensorFlow must not have run an operation yet.

    Args:
        functions: what make the pipelines, by name.
        seed: for what they draw; None for none.
        payload: the file that the functions came from. A function that turns out to make no pipeline is noted beside
            it, so that no other process of the search calls it twice.
    """

    def __init__(self, functions: Mapping[str, Callable[[], Any]], seed: int | None, payload: Path) -> None:
        self._functions = functions
        self._payload = payload
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._dropped: list[int] = []
        self._connection, theirs = Pipe()
        self._arrays = SharedArrays()
        if os.fork() == 0:
            self._connection.close()
            _run(theirs, self._arrays, functions, seed)
        theirs.close()

    @classmethod
    def of(cls, content: Mapping[str, Any], payload: Path, seed: int | None) -> PipelineProcess | None:
        """A process for the functions among the data of `fit`; None where there is none that may make a pipeline.

        Args:
            content: of the payload, `fit_args` and `fit_kwargs` among it.
            payload, seed: as above.
        """
        named = {**content["fit_kwargs"], **dict(zip(_NAMES, content["fit_args"][:1], strict=False))}
        functions = {name: named[name] for name in _NAMES if name in named and is_data_function(named[name])}
        is_needed = any(not _note_of(payload, name).exists() for name in functions)
        return cls(functions, seed, payload) if is_needed else None

    def moved(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content with functions that `called` asks the process for, in place of those it was made with."""
        here = {name: self._function(name) for name in self._functions}
        positional, named = list(content["fit_args"]), dict(content["fit_kwargs"])
        if positional:
            positional[0] = here.pop("x", positional[0])
        return {**content, "fit_args": tuple(positional), "fit_kwargs": {**named, **here}}

    def _function(self, name: str) -> Callable[[], Any]:
        function = self._functions[name]

        @functools.wraps(function)
        def call() -> Any:
            return function()

        setattr(call, _OPEN, functools.partial(self._make, name))
        return call

    def _make(self, name: str) -> PipelineElsewhere | None:
        """Calls a function there; None where it makes no pipeline, or one of ragged or sparse tensors."""
        note = _note_of(self._payload, name)
        if note.exists():
            return None
        pipeline = self.open(View(name, next(self._numbers)))
        if pipeline is None:
            with contextlib.suppress(OSError):
                note.touch()
        return pipeline

    def open(self, view: View) -> PipelineElsewhere | None:
        """A pipeline; it is made if that call of the function has not been."""
        described = self._ask("open", view)
        return None if described is None else PipelineElsewhere(self, view, *described)

    def iterate(self, view: View) -> Iterator[list[np.ndarray]]:
        """The elements of an epoch, each as its arrays in the order of `tf.nest`."""
        number = next(self._numbers)
        try:
            while (arrays := self._ask("take", number, view)) is not None:
                yield arrays
        finally:
            self._dropped.append(number)  # not asked for here: this may be the garbage collector

    def pass_over(self, view: View, epochs: int) -> None:
        """Winds a pipeline forward: `shuffle` draws an order for each iterator that is made."""
        self._ask("pass_over", view, epochs)

    def random_state(self) -> dict[str, Any]:
        """Of the generators of Python, NumPy and Keras there, from which a pipeline may draw."""
        state: dict[str, Any] = self._ask("random_state")
        return state

    def give_back_random_state(self, state: Mapping[str, Any]) -> None:
        """Sets them to what `random_state` gave."""
        self._ask("give_back_random_state", state)

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
                    "read it by hand: `for batch in make_data(): pass`; the trial's log.txt has what it printed.",
                ) from None
            if request[0] == "take" and answer is not None:  # before the next request, which writes over them
                answer = self._arrays.take(answer)
        if error is not None:
            raise error
        return answer


class PipelineElsewhere:
    """A `tf.data.Dataset` in a `PipelineProcess`, as far as it is needed here.

    Args:
        process: that has it.
        view: which one.
        element_spec, cardinality: as of a `tf.data.Dataset`.
    """

    def __init__(self, process: PipelineProcess, view: View, element_spec: Any, cardinality: int) -> None:
        self._process = process
        self._view = view
        self.element_spec = element_spec
        self._cardinality = cardinality

    def __iter__(self) -> Iterator[Any]:
        """The elements, with arrays for tensors."""
        import tensorflow as tf

        for arrays in self._process.iterate(self._view):
            yield tf.nest.pack_sequence_as(self.element_spec, arrays)

    def batch(self, batch_size: int) -> PipelineElsewhere:
        """Samples in batches."""
        return self._cut(batch_size, is_batched=False)

    def rebatch(self, batch_size: int) -> PipelineElsewhere:
        """Batches cut anew."""
        return self._cut(batch_size, is_batched=True)

    def as_tf_dataset(self) -> Any:
        """A `tf.data.Dataset` of these elements, of which only the newest is in the device's account."""
        import tensorflow as tf

        from accumtune.memory.feeding import counted_tensors, one_at_a_time

        specs = tf.nest.flatten(self.element_spec)
        nothing = [np.zeros([size or 0 for size in spec.shape.as_list()], spec.dtype.as_numpy_dtype) for spec in specs]
        epoch: Iterator[list[np.ndarray]] = iter(())

        def take(index: np.ndarray) -> list[np.ndarray]:
            nonlocal epoch
            if index == 0:  # an iterator was made, and is used: Keras makes some that are not
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
        dataset.pass_over = functools.partial(self._process.pass_over, self._view)
        return dataset

    def _cut(self, batch_size: int, is_batched: bool) -> PipelineElsewhere:
        cut = self._process.open(replace(self._view, batch_size=batch_size, is_batched=is_batched))
        assert cut is not None
        return cut


def called(function: Callable[[], Any]) -> Any:
    """What a function for data gives; where it makes a pipeline and was given to a `PipelineProcess`, from there."""
    open_elsewhere = getattr(function, _OPEN, None)
    elsewhere = None if open_elsewhere is None else open_elsewhere()
    return function() if elsewhere is None else elsewhere


def is_data_function(value: Any) -> bool:
    """Whether data come as a function to be called in the process of the trial."""
    return inspect.isroutine(value) or isinstance(value, functools.partial)


def _note_of(payload: Path, name: str) -> Path:
    # By the time of writing too: a search that goes on may have been given another function.
    return payload.with_name(f"{payload.stem}-{payload.stat().st_mtime_ns}-{name}-is-no-pipeline")


def _run(
    connection: Connection, arrays: SharedArrays, functions: Mapping[str, Callable[[], Any]], seed: int | None
) -> None:
    """The process: it never returns."""
    exit_code = 1
    try:
        die_with_parent()
        # Before TensorFlow's first operation: the plain allocator, and no GPU, which is the training's.
        for variable in memory_limit_environment("tensorflow", 2**30):
            os.environ.pop(variable, None)
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        _Pipelines(functions, seed).serve(connection, arrays)
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


class _Pipelines:
    """What the process does: one request after the other, until the other end is closed."""

    def __init__(self, functions: Mapping[str, Callable[[], Any]], seed: int | None) -> None:
        self._functions = functions
        self._seed = seed
        self._datasets: dict[View, Any] = {}
        self._iterators: dict[int, Iterator[Any]] = {}
        self._ahead: dict[int, tuple[Any, Exception | None]] = {}

    def serve(self, connection: Connection, arrays: SharedArrays) -> None:
        while True:
            try:
                dropped, request, *arguments = connection.recv()
            except (EOFError, ConnectionError):
                return
            for number in dropped:
                self._iterators.pop(number, None)
                self._ahead.pop(number, None)
            answer, error = _answer(getattr(self, request), *arguments)
            if request == "take" and answer is not None:
                answer = arrays.put(answer)
            connection.send((answer, error))
            if request == "take":
                self._look_ahead(arguments[0])

    def open(self, view: View) -> tuple[Any, int] | None:
        import tensorflow as tf

        dataset = self._dataset(view)
        if not isinstance(dataset, tf.data.Dataset):
            return None
        specs = tf.nest.flatten(dataset.element_spec)
        if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None for spec in specs):
            return None
        return dataset.element_spec, int(dataset.cardinality())

    def take(self, number: int, view: View) -> list[np.ndarray] | None:
        if number in self._ahead:
            arrays, error = self._ahead.pop(number)
            if error is not None:
                raise error
            return arrays  # type: ignore[no-any-return]
        if number not in self._iterators:
            self._iterators[number] = iter(self._dataset(view))
        return self._next(number)

    def pass_over(self, view: View, epochs: int) -> None:
        for _ in range(epochs):
            iter(self._dataset(view))

    def random_state(self) -> dict[str, Any]:
        from accumtune.trials.training_state import random_state

        return random_state()

    def give_back_random_state(self, state: Mapping[str, Any]) -> None:
        from accumtune.trials.training_state import give_back_random_state

        give_back_random_state(state)

    def _dataset(self, view: View) -> Any:
        from accumtune.trials.rebatch import rebatched

        if view not in self._datasets:
            if view.batch_size is None:
                made = self._made(view.name)
            else:
                whole = self._dataset(View(view.name, view.call))
                made = rebatched(whole, view.batch_size, view.is_batched)
            self._datasets[view] = made
        return self._datasets[view]

    def _made(self, name: str) -> Any:
        import keras
        import tensorflow as tf

        if self._seed is not None and not self._datasets:
            keras.utils.set_random_seed(self._seed)
        made = self._functions[name]()
        return made if isinstance(made, tf.data.Dataset) else None  # arrays are not kept for nobody

    def _next(self, number: int) -> list[np.ndarray] | None:
        import tensorflow as tf

        element = next(self._iterators[number], None)
        return None if element is None else [tensor.numpy() for tensor in tf.nest.flatten(element)]

    def _look_ahead(self, number: int) -> None:
        self._ahead[number] = _answer(self._next, number)


def _answer(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """What a function returns, or the error that it raises, as far as that can be sent."""
    try:
        return function(*arguments), None
    except Exception as error:
        text = "In the process of the data pipeline:\n" + "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # whatever a user's exception raises when it is made from its arguments
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(text)
        return None, error
