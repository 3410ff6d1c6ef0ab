"""Predicts the seconds of a micro-step of any size, and of the update itself, from measured updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from accumtune.errors import BudgetTooSmallError
from accumtune.memory.prediction.measurement import Measurement
from accumtune.memory.prediction.monotone_curve import Curve, last_slope


def fit_seconds(measurements: Sequence[Measurement]) -> tuple[float, Curve]:
    """Fits one time per measured micro-batch size, and one for the update, by least squares in relative error.

    Returns:
        Seconds of an update, and a curve of the seconds of a micro-step.

    Raises:
        BudgetTooSmallError: no measurement has a time.
    """
    points = [
        (m.micro_batch_size, m.accumulation_steps, m.seconds_per_update)
        for m in measurements
        if m.seconds_per_update is not None
    ]
    if not points:
        raise BudgetTooSmallError(
            "Received a profile without timings: no probe ran to its end.",
            "at least one micro-batch size that ran.",
            "probe a smaller micro-batch, or under a larger budget.",
        )
    sizes = sorted({size for size, _, _ in points})
    rows = np.zeros((len(points), len(sizes) + 1))
    for row, (size, steps, seconds) in zip(rows, points, strict=True):
        row[sizes.index(size)] = steps / seconds
        row[-1] = 1.0 / seconds
    solution, _ = nnls(rows, np.ones(len(points)))
    times = dict(zip(sizes, solution[:-1], strict=True))
    return float(solution[-1]), Curve(times, last_slope(times) if len(times) > 1 else None)
