"""Keras callbacks that look at accumulation from outside."""

from __future__ import annotations

import math
from typing import Any

import keras

from accumtune.accumulation.noise_scale import NoiseMeter

NOISE_SCALE = "gradient_noise_scale"


class GradientNoiseScale(keras.callbacks.Callback):
    """Puts `gradient_noise_scale` into the logs of each epoch: how many samples an update can use.

    Below this effective batch, twice the batch halves the updates; above it, more samples per update buy little
    (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training"). It grows while a model trains.

    It is measured in windows of two or more equal micro-batches, so only on a model that accumulates, and on one
    replica, by two norms in 48 micro-steps; training stays the same to the last bit. An epoch in which it cannot be
    told (no such window, or noise that hides the gradient altogether) logs NaN.

    Example:

    >>> model = accumtune.accumulate(model, micro_batch_size=8)
    >>> history = model.fit(x, y, batch_size=64, callbacks=[accumtune.GradientNoiseScale()])
    >>> history.history["gradient_noise_scale"]

    Attributes:
        value: the last epoch's, in samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = math.nan
        self._meter = NoiseMeter()
        # Plain values, in which a training that is interrupted finds what earlier epochs measured.
        self._state: tuple[Any, ...] | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._meter, self._state = NoiseMeter(), None
        object.__setattr__(self.model, "_accumtune_noise_meter", self._meter)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._state is not None:
            self._meter.take_up(*self._state)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.value = self._meter.end_epoch()
        self._state = self._meter.state()
        if logs is not None:
            logs[NOISE_SCALE] = self.value

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        object.__setattr__(self.model, "_accumtune_noise_meter", None)
