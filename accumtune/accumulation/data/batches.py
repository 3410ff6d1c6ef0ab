"""Splits the batches that `fit` reads into micro-batches, and makes an epoch count windows."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accumtune.accumulation.data import array_kinds
from accumtune.accumulation.data.row_indices import Rows, row_numbers, rows_of
from accumtune.accumulation.window import Accumulation, split
from accumtune.errors import BatchSizeError, DataError

_DATA = ("x", "y", "sample_weight")
KERAS_BATCH_SIZE = 32  # fit's default


@dataclass(frozen=True)
class Window:
    """The micro-batches of one update, in place of a batch of torch's data loader."""

    micro_batches: list[Any]


@dataclass(frozen=True, eq=False)
class HostBatch:
    """A batch that stays on the host: Keras on JAX would put it on the device, and the next one too."""

    batch: Any


@dataclass(frozen=True)
class MicroBatch:
    """A part of a window, whose tensors are created when its micro-step begins.

    Args:
        samples: the number of samples.
        take: returns `(x, y, sample_weight)`.
        form: the length of the batch's tuple; 0 if the batch was x alone.
    """

    samples: int
    take: Callable[[], Any]
    form: int = 3


def samples_of(batch: Any) -> int:
    """Returns the number of samples in a batch (x, y, sample_weight)."""
    from keras import tree

    return int(next(leaf for leaf in tree.flatten(batch) if leaf is not None).shape[0])


def unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """Turns a batch in any of Keras's forms into (x, y, sample_weight)."""
    from keras.src.trainers.data_adapters import data_adapter_utils

    return data_adapter_utils.unpack_x_y_sample_weight(batch)


def micro_batches(batch: Any, micro_batch_size: int | None, source: Rows | None, cut: Any = None) -> list[MicroBatch]:
    """Splits a batch into micro-batches; one if no size is given.

    Args:
        batch: from the iterator of an epoch, in any of Keras's forms.
        source: the arrays, if batches may be numbers of their rows.
        cut: `cut(leaf, slice)` slices one array; None: indexing.
    """
    batch = batch.batch if isinstance(batch, HostBatch) else batch
    numbers = None if source is None else row_numbers(batch)
    if source is not None and numbers is not None:
        rows, following = numbers
        size = micro_batch_size or len(rows)
        taken = [rows[part] for part in split(len(rows), size)]
        pairs = itertools.pairwise([*taken, following[:size]])
        return [MicroBatch(len(mine), functools.partial(source.take, mine, then), source.form) for mine, then in pairs]
    form = len(batch) if isinstance(batch, (tuple, list)) else 0
    batch = unpacked(batch)
    samples = samples_of(batch)
    parts = split(samples, micro_batch_size or max(samples, 1))
    if len(parts) <= 1:
        return [MicroBatch(samples, lambda: batch, form)]
    check_samples(batch)
    takes = [functools.partial(part_of, batch, part, cut) for part in parts]
    return [MicroBatch(part.stop - part.start, take, form) for part, take in zip(parts, takes, strict=True)]


def check_samples(batch: Any) -> None:
    """Raises DataError if arrays of a batch differ in their first axis, so that they cannot be split into samples.

    Keras checks arrays, but not the batches of a generator, a `PyDataset` or a `tf.data.Dataset`.
    """
    found = shapes(batch)
    if len({shape[:1] for shape in found}) > 1 or not all(found):
        raise DataError(
            f"Received a batch with arrays of the shapes {', '.join(map(str, found))}.",
            "arrays whose first axis is that of the samples, with the same number in each, so that the batch can be "
            "split.",
            "give each sample one entry in each array: put several of them on another axis, and data that belong to no "
            "sample (a table, an adjacency matrix) into the model, as a constant or a weight.",
        )


def part_of(batch: Any, part: slice, cut: Any = None) -> Any:
    """Returns a part of each array of a batch."""
    from keras import tree

    cut = cut or (lambda leaf, part: leaf[part])
    return tree.map_structure(lambda leaf: None if leaf is None else cut(leaf, part), batch)


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the arrays of a batch."""
    from keras import tree

    return tuple(tuple(leaf.shape) for leaf in tree.flatten(batch) if leaf is not None)


def same_shapes(window: list[MicroBatch], accumulation: Accumulation, source: Rows | None) -> bool:
    """Returns whether the shapes of micro-batches differ at most in the number of samples, as parts of one batch do."""
    if accumulation.micro_batch_size is not None or source is not None:
        return True
    return len({tuple(shape[1:] for shape in shapes(part.take())) for part in window}) <= 1


def named_arguments(model: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Returns the given arguments of `fit` by name."""
    signature = inspect.signature(type(model).fit)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        signature = inspect.signature(keras_fit())  # a wrapper, which passes its arguments on
    arguments = signature.bind(model, *args, **kwargs).arguments
    given = dict(list(arguments.items())[1:])  # without self
    others = [name for name in given if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD]
    return given | (given.pop(others[0]) if others else {})


def has_stock_fit(model: Any) -> bool:
    """Returns whether `fit` is Keras's own: neither overridden, to prepare data, nor wrapped."""
    return type(model).fit is keras_fit()


def prepares_its_data(model: Any) -> bool:
    """Returns whether the model's class overrides `fit`, which must then get the user's data as they are."""
    owner = next(cls for cls in type(model).__mro__ if "fit" in vars(cls))
    return owner.__module__.split(".")[0] != "keras"


def keras_fit() -> Any:
    """Returns Keras's own `fit`, even if a class overrides it or an autologger has wrapped it."""
    import keras

    backend = "keras.src.backend."
    trainer = next(cls for cls in keras.Model.__mro__ if cls.__module__.startswith(backend) and "fit" in vars(cls))
    return vars(trainer)["fit"]


def with_rows(model: Any, accumulation: Accumulation, given: dict[str, Any]) -> tuple[dict[str, Any], Rows | None]:
    """Returns arguments of Keras's own `fit` that need the least memory, and the arrays behind them.

    Arrays are replaced by the numbers of their rows, unless they are not NumPy arrays or are spread over devices.
    Validation uses the same samples as in plain Keras, but no more at once than training.
    """
    import keras
    from keras.src.trainers.data_adapters import array_slicing
    from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays

    given = dict(given)
    if given.get("validation_split") and given.get("validation_data") is None:
        data, given["validation_data"] = array_slicing.train_validation_split(
            tuple(given.get(name) for name in _DATA), validation_split=given.pop("validation_split")
        )
        given |= dict(zip(_DATA, data, strict=True))
    arrays = x, y, sample_weight = given.get("x"), given.get("y"), given.get("sample_weight")
    size, steps = accumulation.micro_batch_size, given.get("steps_per_epoch")
    if size is not None and not given.get("validation_batch_size"):
        # Plain Keras would use the batch of training, which may not fit in memory.
        batch_size = given.get("batch_size") or KERAS_BATCH_SIZE
        if given.get("validation_steps") and has_validation_arrays(given):  # it counts batches of that size
            samples = given.pop("validation_steps") * batch_size
            given["validation_data"] = part_of(given["validation_data"], slice(0, samples), array_kinds.part)
        given["validation_batch_size"] = min(size, batch_size)
    if steps and not given.get("batch_size") and can_convert_arrays(arrays):
        given["batch_size"] = math.ceil(samples_of(arrays) / (steps * (accumulation.accumulation_steps or 1)))
    is_spread = keras.distribution.distribution() is not None or getattr(model, "_distribute_strategy", None)
    source = None if is_spread else rows_of(x, y, sample_weight, given.get("class_weight"))
    if source is not None:
        for name in (*_DATA, "class_weight"):
            given.pop(name, None)
        given["x"] = source.adapter(given.get("batch_size"), given.pop("shuffle", True))
    return given, source


def has_validation_arrays(given: dict[str, Any]) -> bool:
    """Returns whether validation data are arrays, which `fit` splits into batches itself."""
    from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays

    data = given.get("validation_data")
    return data is not None and can_convert_arrays(unpacked(data))


def count_in_windows(epoch: Any, accumulation: Accumulation, counts_batches: bool) -> None:
    """Makes Keras's iterator of an epoch yield and count windows, if these are several batches.

    Args:
        epoch: a `keras.src.trainers.epoch_iterator.EpochIterator` that has not begun.
        counts_batches: whether `steps_per_epoch`, if given, was set by the model's own fit, which counts batches, and
            not by the user, who counts updates.
    """
    import keras

    steps = accumulation.accumulation_steps
    stays_on_host = keras.backend.backend() == "jax" and keras.distribution.distribution() is None
    if steps is None and not stays_on_host:
        return
    epoch.data_adapter = _windowed(epoch.data_adapter, steps or 1, stays_on_host)
    if steps is None:
        return
    epoch._num_batches = epoch.data_adapter.num_batches
    if counts_batches and epoch.steps_per_epoch and epoch.steps_per_epoch != keras.config.max_steps_per_epoch():
        if epoch.steps_per_epoch % steps:
            raise BatchSizeError(
                f"Received {accumulation}, and a model whose fit sets steps_per_epoch={epoch.steps_per_epoch}.",
                "a number of batches that is a multiple of accumulation_steps, since the model's own fit counts them.",
                "use accumulate(model, micro_batch_size=...) with the effective batch as fit's batch_size.",
            )
        epoch.steps_per_epoch //= steps


def first_micro_batches(epoch: Any, accumulation: Accumulation, source: Rows | None) -> Iterator[Any]:
    """Yields the first micro-batch of each window of an epoch, for building variables."""
    for begin, end, data in epoch:
        batch = data[0] if isinstance(data, (list, tuple)) else next(data)
        if isinstance(batch, Window):
            batch = batch.micro_batches[0]
        yield begin, end, [micro_batches(batch, accumulation.micro_batch_size, source)[0].take()]


def _windows(batches: Iterator[Any], accumulation_steps: int) -> Iterator[Window]:
    # The caller has created the iterator, at the same moment as plain training: torch draws from its generator then.
    while window := list(itertools.islice(batches, accumulation_steps)):
        yield Window(window)


def _host_batches(batches: Iterator[Any]) -> Iterator[HostBatch]:
    _make_empty_to_jax()
    return map(HostBatch, batches)


@functools.cache
def _make_empty_to_jax() -> None:
    """Registers `HostBatch` with JAX as a structure without arrays, so that nothing is put on a device."""
    import jax

    jax.tree_util.register_pytree_node(HostBatch, lambda batch: ((), batch), lambda batch, _: batch)


def _windowed(adapter: Any, accumulation_steps: int, stays_on_host: bool) -> Any:
    """Returns an adapter with the same data, whose `num_batches` counts windows."""
    from keras.src.trainers.data_adapters.data_adapter import DataAdapter

    class WindowedAdapter(DataAdapter):
        get_numpy_iterator = adapter.get_numpy_iterator
        get_tf_dataset = adapter.get_tf_dataset
        on_epoch_begin = adapter.on_epoch_begin
        on_epoch_end = adapter.on_epoch_end
        batch_size = property(lambda self: adapter.batch_size)
        has_partial_batch = property(lambda self: adapter.has_partial_batch)
        partial_batch_size = property(lambda self: adapter.partial_batch_size)

        def get_jax_iterator(self) -> Iterator[Any]:
            batches = adapter.get_jax_iterator()
            return _host_batches(batches) if stays_on_host else iter(batches)

        def get_torch_dataloader(self) -> Iterator[Window]:
            return _windows(iter(adapter.get_torch_dataloader()), accumulation_steps)

        @property
        def num_batches(self) -> int | None:
            number = adapter.num_batches
            return None if number is None else math.ceil(number / accumulation_steps)

    return WindowedAdapter()
