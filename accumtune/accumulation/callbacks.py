"""A Keras callback that measures the gradient noise scale."""

from __future__ import annotations

import math
from typing import Any

import keras

from accumtune.accumulation.noise_scale import NoiseMeter

NOISE_SCALE = "gradient_noise_scale"


class GradientNoiseScale(keras.callbacks.Callback):
    """Adds `gradient_noise_scale`, in samples, to the logs of each epoch: how many samples an update can use.

    Far below this effective batch, doubling the batch halves the number of updates; above it, more samples per update
    gain little (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training"). It grows while a model trains.

    It is measured in windows of two or more equal micro-batches, so only on a model that accumulates, and on one
    replica. It takes two norms in 48 micro-steps; training stays the same to the last bit. The value is NaN for an
    epoch without such a window, or whose gradient is hidden by noise.

    Example:

    >>> model = accumtune.accumulate(model, micro_batch_size=8)
    >>> history = model.fit(x, y, batch_size=64, callbacks=[accumtune.GradientNoiseScale()])
    >>> history.history["gradient_noise_scale"]

    Attributes:
        value: of the last epoch, in samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = math.nan
        self._meter = NoiseMeter()
        # Plain values, with which an interrupted training restores the measurements of earlier epochs.
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
