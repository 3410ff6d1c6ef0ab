"""Batches as `fit` reads them: micro-batches cut from a batch, or windows counted in an epoch."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accumtune.accumulation.window import split


@dataclass(frozen=True)
class Window:
    """The micro-batches of one update, where a batch is expected (torch's data loader yields them)."""

    micro_batches: list[Any]


def samples_of(batch: Any) -> int:
    """The samples in a batch (x, y, sample_weight)."""
    from keras import tree

    return int(next(leaf for leaf in tree.flatten(batch) if leaf is not None).shape[0])


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """A batch in any of Keras's forms as (x, y, sample_weight)."""
    from keras.src.trainers.data_adapters import data_adapter_utils

    return data_adapter_utils.unpack_x_y_sample_weight(batch)


def micro_batches(batch: Any, micro_batch_size: int, cut: Any) -> list[Any]:
    """Cuts an effective batch; `cut(leaf, slice)` cuts one array. A batch that fits in one is returned as it is."""
    from keras import tree

    parts = split(samples_of(batch), micro_batch_size)
    if len(parts) <= 1:
        return [batch]

    def part_of(part: slice) -> Any:
        return tree.map_structure(lambda leaf: None if leaf is None else cut(leaf, part), batch)

    return [part_of(part) for part in parts]


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of the arrays of a batch."""
    from keras import tree

    return tuple(tuple(leaf.shape) for leaf in tree.flatten(batch) if leaf is not None)


def same_shapes(window: list[Any]) -> bool:
    """Whether the micro-batches differ in their number of samples at most."""
    return len({tuple(shape[1:] for shape in shapes(batch)) for batch in window}) <= 1


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


def with_windows(model: Any, accumulation_steps: int, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fit`, with data that an epoch counts in windows of `accumulation_steps` batches."""
    import keras
    from keras.src.trainers.data_adapters import array_slicing, get_data_adapter

    from accumtune.accumulation import building

    given = dict(given)
    x, y, sample_weight = given.get("x"), given.pop("y", None), given.pop("sample_weight", None)
    if given.get("validation_split") and given.get("validation_data") is None:
        (x, y, sample_weight), given["validation_data"] = array_slicing.train_validation_split(
            (x, y, sample_weight), validation_split=given.pop("validation_split")
        )
    steps = given.get("steps_per_epoch")
    adapter = get_data_adapter(
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=given.get("batch_size"),
        steps_per_epoch=steps and steps * accumulation_steps,
        shuffle=given.pop("shuffle", True),
        class_weight=given.pop("class_weight", None),
    )
    if keras.backend.backend() == "torch" and not building.is_built(model):
        adapter.on_epoch_begin()
        building.build(model, next(iter(adapter.get_torch_dataloader())))  # Keras would read a window for a batch
    given["x"] = _windowed(adapter, accumulation_steps)
    return given


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
            batches = iter(adapter.get_torch_dataloader())
            while window := list(itertools.islice(batches, accumulation_steps)):
                yield Window(window)

        @property
        def num_batches(self) -> int | None:
            number = adapter.num_batches
            return None if number is None else math.ceil(number / accumulation_steps)

    return WindowedAdapter()
