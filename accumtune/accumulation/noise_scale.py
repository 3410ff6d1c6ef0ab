"""Computes the gradient noise scale from norms that accumulation gets at little cost (no framework).

McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training" (2018), appendix A.1: the gradient of
a batch of B samples has the expected squared norm |G|² + tr(Σ) / B. Two batch sizes, b within B, give both unknowns
without bias, and the simple noise scale is their ratio:

    |G|²  =  (B |G_B|² - b |G_b|²) / (B - b)
    tr(Σ) =  (|G_b|² - |G_B|²) / (1/b - 1/B)
    noise scale = tr(Σ) / |G|², numerator and denominator averaged over windows before they are divided

Here b is the first micro-batch of a window and B the window. After the first micro-step the accumulators hold that
micro-batch's gradient, and after the last one the window's. So two norms suffice, and no micro-step is compiled or run
differently. The norms of the other micro-batches would improve a window's estimate, but each costs as much as a norm of
another window; without them the estimate is unbiased too, and 64 windows give it a standard error of 2 to 10 %. A loss
scale, and the denominator of a loss, are factors of both and cancel.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# A norm reads the parameters once, a micro-step at least six times (forward, backward, gradient, sum). So two norms in
# this many micro-steps are less than 1 % of the memory traffic. With two in a third as many, CPU time rose by 5 %.
MICRO_STEPS_PER_MEASUREMENT = 48
# An epoch with fewer measurements is averaged with the ones before.
FEWEST_MEASUREMENTS = 64


@dataclass(frozen=True)
class Norms:
    """Squared norms of one window's gradients: numbers, or scalars that a device may still be computing.

    Args:
        micro_batch_size: samples behind `micro`.
        effective_batch_size: samples behind `window`.
        micro: of the first micro-batch's part of the window's gradient.
        window: of the window's gradient.
    """

    micro_batch_size: int
    effective_batch_size: int
    micro: Any
    window: Any

    def estimates(self) -> tuple[float, float] | None:
        """Returns unbiased estimates of tr(Σ) and |G|²; None if the gradients are not finite. Waits for the device."""
        small, big = self.micro_batch_size, self.effective_batch_size
        # A micro-batch's part is its gradient times its share of the window.
        micro = float(self.micro) * (big / small) ** 2
        window = float(self.window)
        if not (math.isfinite(micro) and math.isfinite(window)):
            return None
        return (micro - window) / (1 / small - 1 / big), (big * window - small * micro) / (big - small)


def noise_scale(estimates: Sequence[tuple[float, float]]) -> float:
    """Returns tr(Σ) / |G|² in samples; NaN without estimates, or if |G|² is not positive because of noise."""
    variance, squared_gradient = (sum(column) for column in zip(*estimates, strict=True)) if estimates else (0.0, 0.0)
    return max(variance, 0.0) / squared_gradient if squared_gradient > 0 else math.nan


class NoiseMeter:
    """Collects the norms of windows from an engine, and computes the noise scale of each epoch."""

    def __init__(self) -> None:
        self._micro_steps = MICRO_STEPS_PER_MEASUREMENT  # the first window is measured
        self._pending: deque[Norms] = deque()
        self._recent: deque[tuple[float, float]] = deque(maxlen=FEWEST_MEASUREMENTS)
        self._epoch: list[tuple[float, float]] = []

    def wants(self, samples: Sequence[int]) -> bool:
        """Returns whether to measure a window with these micro-batches: only equal ones, and not too often."""
        self._micro_steps += len(samples)
        if self._micro_steps < MICRO_STEPS_PER_MEASUREMENT or not samples[0]:
            return False
        if len(samples) < 2 or len(set(samples)) > 1:
            return False
        self._micro_steps = 0
        return True

    def add(self, norms: Norms) -> None:
        """Adds one window. Norms are read much later, so that no device has to be waited for."""
        self._pending.append(norms)
        if len(self._pending) > FEWEST_MEASUREMENTS:
            self._read(self._pending.popleft())

    def end_epoch(self) -> float:
        """Returns the noise scale of the windows since the last call, in samples; NaN if it is unknown."""
        while self._pending:
            self._read(self._pending.popleft())
        estimates = self._epoch if len(self._epoch) > len(self._recent) else list(self._recent)
        self._epoch = []
        return noise_scale(estimates)

    def state(self) -> tuple[int, list[tuple[float, float]]]:
        """Returns, between two epochs, what the next epoch needs from those before."""
        return self._micro_steps, list(self._recent)

    def take_up(self, micro_steps: int, recent: Sequence[tuple[float, float]]) -> None:
        """Continues from the state of another meter."""
        self._micro_steps = micro_steps
        self._recent = deque(recent, maxlen=FEWEST_MEASUREMENTS)

    def _read(self, norms: Norms) -> None:
        estimates = norms.estimates()
        if estimates is not None:
            self._epoch.append(estimates)
            self._recent.append(estimates)


AfterMicroStep = Callable[[int, Callable[[], Any]], None]


def listening(model: Any, samples: Sequence[int]) -> AfterMicroStep:
    """Returns a function to call after each micro-step of a window, with its index and a function for the squared norm.

    Args:
        model: an accumulating one, which has the meter of a callback, if there is one.
        samples: of each micro-batch.
    """
    meter: NoiseMeter | None = getattr(model, "_accumtune_noise_meter", None)
    if meter is None or not meter.wants(samples) or not model.trainable_weights:
        return _not_listening
    steps, norms = len(samples), list[Any]()

    def after(index: int, squared_norm: Callable[[], Any]) -> None:
        if index in (0, steps - 1):
            norms.append(squared_norm())
        if index == steps - 1:
            meter.add(Norms(samples[0], samples[0] * steps, *norms))

    return after


def _not_listening(index: int, squared_norm: Callable[[], Any]) -> None:
    pass
