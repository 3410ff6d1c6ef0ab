"""Updates BatchNormalization's moving statistics with those of the whole window, once per update.

Averaging the variances of micro-batches or replicas would omit the variance between them. Two groups of samples are
combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
(1979).
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accumtune.accumulation.patched_attributes import replaced
from accumtune.errors import ModelError


@dataclass
class Moments:
    """The moments of one normalization: the number of entries, and each channel's mean and variance.

    The number is a tensor if shapes are dynamic, with one entry per channel for a mask or ghost batches.
    """

    layer: Any
    number: Any
    mean: Any
    variance: Any


# Numbers of entries, means and sums of squared deviations of all channels of all normalizations, concatenated: a few
# operations on long vectors instead of a few for each of dozens of layers.
Packed = tuple[Any, Any, Any] | tuple[()]


def packed(noted: list[Moments]) -> Packed:
    """Returns the moments of a model's normalizations as three vectors."""
    from keras import ops

    if not noted:
        return ()
    mean = ops.concatenate([entry.mean for entry in noted])
    numbers, channels = [entry.number for entry in noted], [entry.mean.shape[0] for entry in noted]
    if all(isinstance(number, float) for number in numbers):
        number = ops.convert_to_tensor(np.repeat(numbers, channels), mean.dtype)
    elif any(getattr(number, "shape", ()) for number in numbers):
        casts = [ops.cast(number, mean.dtype) for number in numbers]
        widths = zip(casts, channels, strict=True)
        number = ops.concatenate([ops.broadcast_to(cast, (width,)) for cast, width in widths])
    else:
        tensors = [ops.cast(number, mean.dtype) for number in numbers]
        number = ops.take(ops.stack(tensors), np.repeat(np.arange(len(noted)), channels))
    return number, mean, ops.concatenate([entry.variance for entry in noted]) * number


def combined(one: Packed, other: Packed) -> Packed:
    """Returns the moments of two groups of samples together."""
    from keras import ops

    if not one or not other:
        return ()
    number = one[0] + other[0]
    part = ops.divide_no_nan(other[0], number)
    difference = other[1] - one[1]
    return number, one[1] + difference * part, one[2] + other[2] + difference * difference * one[0] * part


def over_replicas(moments: Packed, summed: Any) -> Packed:
    """Returns, on each replica, the moments over all replicas.

    Args:
        summed: sums a list of this replica's tensors over all replicas.
    """
    from keras import ops

    if not moments:
        return ()
    number, mean, squares = moments
    total, weighted = summed([number, number * mean])
    together = ops.divide_no_nan(weighted, total)
    (squares,) = summed([squares + number * ops.square(mean - together)])
    return total, together, squares


def moved(layers: list[Any], moments: Packed) -> None:
    """Moves the layers' statistics towards the moments of the window, as Keras does for a batch."""
    start = 0
    for layer in layers if moments else []:
        channels = slice(start, start + layer.moving_mean.shape[0])
        start = channels.stop
        values = moved_values(layer, tuple(one[channels] for one in moments))
        for variable, value in zip((layer.moving_mean, layer.moving_variance), values, strict=True):
            # The class's assign, because the variable's own is replaced while moments are recorded.
            type(variable).assign(variable, value)


def moved_values(layer: Any, moments: Packed) -> tuple[Any, Any]:
    """Returns a layer's moving mean and variance after a window with these moments."""
    from keras import ops

    number, mean, squares = moments  # type: ignore[misc]

    def after(variable: Any, value: Any) -> Any:
        return ops.cast(variable.value, value.dtype) * layer.momentum + value * (1.0 - layer.momentum)

    return after(layer.moving_mean, mean), after(layer.moving_variance, ops.divide_no_nan(squares, number))


class Notes:
    """Keeps moments in the order of the calls, in one list per thread, because replicas are traced in threads."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Moments]] = {}
        self._graph = _graph()

    def mine(self) -> list[Moments]:
        return self._lists.setdefault(threading.get_ident(), [])

    def add(self, moments: Moments) -> None:
        """Adds the moments of this thread's next normalization.

        Raises:
            ModelError: it runs within a TensorFlow loop or condition, whose values end with it.
        """
        if _graph() is not self._graph:
            raise ModelError(
                f"Received {moments.layer.name!r}, a BatchNormalization in a loop or condition, such as an RNN's cell.",
                "normalizations that run once, or several times in sequence, in a forward pass.",
                "unroll the loop (RNN(..., unroll=True)), use LayerNormalization, or freeze it (trainable = False).",
            )
        self.mine().append(moments)


def _graph() -> Any:
    """Returns the TensorFlow graph that is being traced; None without one."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def recorded(model: Any, may_be_empty: bool = False) -> Iterator[Notes]:
    """Makes batch normalizations note their moments instead of moving their statistics, until the context ends.

    There is one entry per normalization, in the order of the calls.

    Args:
        may_be_empty: whether a micro-batch may have no samples, on a replica that has fewer than the others.
    """
    layers = [layer for layer in model._flatten_layers() if keeps_statistics(layer)]
    notes = Notes()
    with contextlib.ExitStack() as changed:
        for layer in layers:
            changed.enter_context(left_as_they_are(layer, _noting(layer, notes, may_be_empty)))
            changed.enter_context(replaced(layer, {"_accumtune_notes": notes}))
        yield notes


@contextlib.contextmanager
def left_as_they_are(layer: Any, moments: Any, instead: dict[int, Any] | None = None) -> Iterator[None]:
    """Makes a normalization use `moments(inputs, mask)`, and skip the assignment of its moving statistics.

    Other code may still assign them, such as an average of weights. Since nothing uses the values that Keras would
    assign, a graph does not compute them.

    Args:
        instead: by the id of each of the two variables, a value to assign instead.
    """
    expected: set[tuple[int, int]] = set()  # by thread and variable: replicas are traced in threads
    variables = (layer.moving_mean, layer.moving_variance)

    def followed_by_assignments(inputs: Any, mask: Any) -> Any:
        found = moments(inputs, mask)
        expected.update((threading.get_ident(), id(variable)) for variable in variables)
        return found

    def assign_unless_expected(variable: Any, value: Any) -> Any:
        mine = threading.get_ident(), id(variable)
        if mine not in expected:
            return type(variable).assign(variable, value)
        expected.remove(mine)
        return value if instead is None else type(variable).assign(variable, instead[id(variable)])

    with contextlib.ExitStack() as changed:
        changed.enter_context(replaced(layer, {"_moments": followed_by_assignments}))
        for variable in variables:
            assign = functools.partial(assign_unless_expected, variable)
            changed.enter_context(replaced(variable, {"assign": assign}))
        yield


def see(layer: Any, number: Any, mean: Any, variance: Any) -> None:
    """Notes the moments of a micro-batch, or moves the statistics if none are recorded, for accumtune's own code."""
    moments = Moments(layer, number, mean, variance)
    notes = vars(layer).get("_accumtune_notes")
    if notes is None:
        moved([layer], packed([moments]))
    else:
        notes.add(moments)


def keeps_statistics(layer: Any) -> bool:
    """Returns whether a layer has moving statistics that training changes."""
    import keras

    return (
        isinstance(layer, keras.layers.BatchNormalization)
        and layer.built
        and layer.trainable
        and not getattr(layer, "renorm", False)
    )


def _noting(layer: Any, notes: Notes, may_be_empty: bool) -> Any:
    from keras import ops

    own_moments = layer._moments

    def call(inputs: Any, mask: Any) -> Any:
        mean, variance = own_moments(inputs, mask)
        number: Any
        if all(isinstance(size, int) for size in inputs.shape):
            number = math.prod(inputs.shape) / inputs.shape[layer.axis]
        else:
            number = ops.cast(ops.size(inputs), mean.dtype) / inputs.shape[layer.axis]
        if mask is not None:
            axis, valid = layer.axis % len(inputs.shape), ops.cast(mask, mean.dtype)
            if axis == len(inputs.shape) - 1:
                number *= ops.mean(valid)
            else:  # the mask covers the axis of channels, so each channel has its own number of valid entries
                others = [other for other in range(len(inputs.shape)) if other != axis]
                number = ops.sum(ops.broadcast_to(ops.expand_dims(valid, -1), ops.shape(inputs)), others)
        if may_be_empty:  # the mean of no samples is NaN, which would spread to the gradients of all replicas
            mean, variance = (ops.where(number > 0, value, ops.zeros_like(value)) for value in (mean, variance))
        notes.add(Moments(layer, number, ops.stop_gradient(mean), ops.stop_gradient(variance)))
        return mean, variance

    return call
