"""BatchNormalization's moving statistics: those of the whole window, the momentum applied once per update.

Averaging the micro-batches' variances would leave out the variance between them. Two groups of samples combine as
in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Moments:
    """Samples of one normalization: their number (a scalar tensor), mean and sum of squared deviations."""

    layer: Any
    number: Any
    mean: Any
    squares: Any

    def tensors(self) -> tuple[Any, Any, Any]:
        return self.number, self.mean, self.squares


def combined(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The moments (number, mean, squares) of two groups of samples together."""
    from keras import ops

    number = one[0] + other[0]
    part = ops.divide_no_nan(other[0], number)
    difference = other[1] - one[1]
    return number, one[1] + difference * part, one[2] + other[2] + difference * difference * one[0] * part


class Notes:
    """Moments in the order in which they were noted, one list per thread: replicas are traced in threads."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Moments]] = {}

    def mine(self) -> list[Moments]:
        return self._lists.setdefault(threading.get_ident(), [])


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[Notes]:
    """While open, batch normalizations leave their moving statistics as they are and note their moments instead.

    There is one entry per normalization, in the order of the calls.
    """
    layers = [layer for layer in model._flatten_layers() if _keeps_statistics(layer)]
    notes = Notes()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        object.__setattr__(layer, "momentum", 1.0)  # moving * 1 + batch * 0: Keras's own update changes nothing
        object.__setattr__(layer, "_moments", _noting(layer, notes))
    try:
        yield notes
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            object.__setattr__(layer, "momentum", momentum)
            del layer.__dict__["_moments"]


def _keeps_statistics(layer: Any) -> bool:
    import keras

    return (
        isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not getattr(layer, "renorm", False)
        and hasattr(type(layer), "_moments")
    )


def _noting(layer: Any, notes: Notes) -> Any:
    from keras import ops

    def call(inputs: Any, mask: Any) -> Any:
        mean, variance = type(layer)._moments(layer, inputs, mask)
        if mask is None:
            shape = ops.shape(inputs)
            sizes = [shape[axis] for axis in layer._reduction_axes]
            number = ops.cast(ops.prod(ops.convert_to_tensor(sizes, dtype="int32")), mean.dtype)
        else:
            per_entry = ops.cast(ops.size(inputs) / ops.size(mask) / inputs.shape[layer.axis], mean.dtype)
            number = ops.sum(ops.cast(mask, mean.dtype)) * per_entry
        notes.mine().append(Moments(layer, number, ops.stop_gradient(mean), ops.stop_gradient(variance) * number))
        return mean, variance

    return call


def moved(layer: Any, moments: tuple[Any, Any, Any]) -> None:
    """Moves a layer's statistics towards the moments of the window, as Keras does for one batch."""
    from keras import ops

    number, mean, squares = moments
    variance = ops.divide_no_nan(squares, number)
    for variable, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving = ops.cast(variable.value, value.dtype)
        variable.assign(moving * layer.momentum + value * (1.0 - layer.momentum))
