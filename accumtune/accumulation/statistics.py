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

import numpy as np


@dataclass
class Moments:
    """Samples of one normalization: their number (a scalar tensor), and mean and variance of each channel."""

    layer: Any
    number: Any
    mean: Any
    variance: Any


# Numbers of samples, means and sums of squared deviations of all channels of all normalizations, one after the other:
# a few operations on long vectors take the place of a few for each of dozens of layers.
Packed = tuple[Any, Any, Any] | tuple[()]


def packed(noted: list[Moments]) -> Packed:
    """What the normalizations of a model noted, as three vectors."""
    from keras import ops

    if not noted:
        return ()
    owner = np.repeat(np.arange(len(noted)), [entry.mean.shape[0] for entry in noted])
    number = ops.take(ops.stack([entry.number for entry in noted]), owner)
    mean = ops.concatenate([entry.mean for entry in noted])
    return number, mean, ops.concatenate([entry.variance for entry in noted]) * number


def combined(one: Packed, other: Packed) -> Packed:
    """The moments of two groups of samples together."""
    from keras import ops

    if not one or not other:
        return ()
    number = one[0] + other[0]
    part = ops.divide_no_nan(other[0], number)
    difference = other[1] - one[1]
    return number, one[1] + difference * part, one[2] + other[2] + difference * difference * one[0] * part


def moved(layers: list[Any], moments: Packed) -> None:
    """Moves the layers' statistics towards the moments of the window, as Keras does for one batch."""
    from keras import ops

    if not moments:
        return
    number, mean, squares = moments
    variance = ops.divide_no_nan(squares, number)
    start = 0
    for layer in layers:
        channels = slice(start, start + layer.moving_mean.shape[0])
        start = channels.stop
        for variable, value in ((layer.moving_mean, mean[channels]), (layer.moving_variance, variance[channels])):
            moving = ops.cast(variable.value, value.dtype)
            variable.assign(moving * layer.momentum + value * (1.0 - layer.momentum))


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
        number = ops.cast(ops.size(inputs), mean.dtype) / inputs.shape[layer.axis]
        if mask is not None:
            number *= ops.mean(ops.cast(mask, mean.dtype))
        notes.mine().append(Moments(layer, number, ops.stop_gradient(mean), ops.stop_gradient(variance)))
        return mean, variance

    return call
