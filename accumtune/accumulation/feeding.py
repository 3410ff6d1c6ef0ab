"""Batches as `fit` reads them: micro-batches cut from a batch, or windows counted in an epoch."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accumtune.accumulation import rows
from accumtune.accumulation.rows import Rows
from accumtune.accumulation.window import Accumulation, split


@dataclass(frozen=True)
class Window:
    """The micro-batches of one update, where a batch is expected (torch's data loader yields them)."""

    micro_batches: list[Any]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a window, whose tensors are made when its micro-step begins.

    Args:
        samples: how many there are.
        take: gives `(x, y, sample_weight)`.
    """

    samples: int
    take: Callable[[], Any]


def samples_of(batch: Any) -> int:
    """The samples in a batch (x, y, sample_weight)."""
    from keras import tree

    return int(next(leaf for leaf in tree.flatten(batch) if leaf is not None).shape[0])


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """A batch in any of Keras's forms as (x, y, sample_weight)."""
    from keras.src.trainers.data_adapters import data_adapter_utils

    return data_adapter_utils.unpack_x_y_sample_weight(batch)


def micro_batches(batch: Any, micro_batch_size: int | None, source: Rows | None, cut: Any = None) -> list[MicroBatch]:
    """The micro-batches of a batch; all of it where no size is given, or where it fits in one.

    Args:
        batch: what the iterator of an epoch gave, in any of Keras's forms.
        source: the arrays, where such batches may be numbers of their rows.
        cut: `cut(leaf, slice)` cuts one array; indexing if None.
    """
    numbers = None if source is None else rows.row_numbers(batch)
    if source is not None and numbers is not None:
        parts = split(len(numbers), micro_batch_size or len(numbers))
        return [MicroBatch(part.stop - part.start, functools.partial(source.take, numbers[part])) for part in parts]
    batch = unpacked(batch)
    samples = samples_of(batch)
    parts = split(samples, micro_batch_size or max(samples, 1))
    if len(parts) <= 1:
        return [MicroBatch(samples, lambda: batch)]
    return [MicroBatch(part.stop - part.start, functools.partial(part_of, batch, part, cut)) for part in parts]


def part_of(batch: Any, part: slice, cut: Any = None) -> Any:
    """A part of each array of a batch."""
    from keras import tree

    cut = cut or (lambda leaf, part: leaf[part])
    return tree.map_structure(lambda leaf: None if leaf is None else cut(leaf, part), batch)


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of the arrays of a batch."""
    from keras import tree

    return tuple(tuple(leaf.shape) for leaf in tree.flatten(batch) if leaf is not None)


def same_shapes(window: list[MicroBatch], accumulation: Accumulation, source: Rows | None) -> bool:
    """Whether the micro-batches differ in their number of samples at most: as parts of one batch or array do."""
    if accumulation.micro_batch_size is not None or source is not None:
        return True
    return len({tuple(shape[1:] for shape in shapes(part.take())) for part in window}) <= 1


def named_arguments(model: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of `fit` by name, as far as they were given."""
    bound = inspect.signature(type(model).fit).bind(model, *args, **kwargs)
    given = {name: value for name, value in bound.arguments.items() if name != "self"}
    return given | given.pop("kwargs", {})


def with_small_validation(micro_batch_size: int, given: dict[str, Any]) -> dict[str, Any]:
    """Validates in micro-batches, where plain Keras takes the batch of training: that one need not fit in memory."""
    size = given.get("batch_size")
    if size and size > micro_batch_size and not given.get("validation_batch_size"):
        return given | {"validation_batch_size": micro_batch_size}
    return given


def with_rows_and_windows(
    model: Any, accumulation: Accumulation, given: dict[str, Any]
) -> tuple[dict[str, Any], Rows | None]:
    """The arguments of `fit` with data that an epoch counts in windows, and the arrays behind them.

    The arrays are None where `fit` gets the data themselves: they are no NumPy arrays, or are spread over devices.
    """
    import keras
    from keras.src.trainers.data_adapters import array_slicing, get_data_adapter

    steps_per_window = accumulation.accumulation_steps or 1
    given = dict(given)
    x, y, sample_weight = (given.get(name) for name in ("x", "y", "sample_weight"))
    if given.get("validation_split") and given.get("validation_data") is None:
        (x, y, sample_weight), given["validation_data"] = array_slicing.train_validation_split(
            (x, y, sample_weight), validation_split=given.pop("validation_split")
        )
        given |= {"x": x, "y": y, "sample_weight": sample_weight}
    is_spread = keras.distribution.distribution() is not None or getattr(model, "_distribute_strategy", None)
    source = None if is_spread else rows.rows_of(x, y, sample_weight, given.get("class_weight"))
    if source is None and accumulation.accumulation_steps is None:
        return given, None
    for name in ("y", "sample_weight"):
        given.pop(name, None)
    class_weight, shuffle = given.pop("class_weight", None), given.pop("shuffle", True)
    steps = given.get("steps_per_epoch") and given["steps_per_epoch"] * steps_per_window
    if source is not None:
        adapter = source.adapter(given.get("batch_size"), steps, shuffle)
    else:
        adapter = get_data_adapter(
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=given.get("batch_size"),
            steps_per_epoch=steps,
            shuffle=shuffle,
            class_weight=class_weight,
        )
    given["x"] = adapter if accumulation.accumulation_steps is None else _windowed(adapter, steps_per_window)
    return given, source


def first_micro_batches(epoch: Any, accumulation: Accumulation, source: Rows | None) -> Iterator[Any]:
    """The iterator of an epoch, for building variables: with a micro-batch in place of a window or of row numbers."""
    for begin, end, data in epoch:
        batch = data[0] if isinstance(data, (list, tuple)) else next(data)
        if isinstance(batch, Window):
            batch = batch.micro_batches[0]
        yield begin, end, [micro_batches(batch, accumulation.micro_batch_size, source)[0].take()]


def _windows(batches: Iterator[Any], accumulation_steps: int) -> Iterator[Window]:
    # The iterator is there already: torch draws from its generator where one is made, as in plain training.
    while window := list(itertools.islice(batches, accumulation_steps)):
        yield Window(window)


def _windowed(adapter: Any, accumulation_steps: int) -> Any:
    """The same data; `num_batches` counts windows. Keras takes a DataAdapter wherever it takes data."""
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter

    class WindowedAdapter(DataAdapter):
        get_numpy_iterator = adapter.get_numpy_iterator
        get_tf_dataset = adapter.get_tf_dataset
        get_jax_iterator = adapter.get_jax_iterator
        on_epoch_begin = adapter.on_epoch_begin
        on_epoch_end = adapter.on_epoch_end
        batch_size = property(lambda self: adapter.batch_size)
        has_partial_batch = property(lambda self: adapter.has_partial_batch)
        partial_batch_size = property(lambda self: adapter.partial_batch_size)

        def get_torch_dataloader(self) -> Iterator[Window]:
            return _windows(iter(adapter.get_torch_dataloader()), accumulation_steps)

        @property
        def num_batches(self) -> int | None:
            number = adapter.num_batches
            return None if number is None else math.ceil(number / accumulation_steps)

    return WindowedAdapter()
