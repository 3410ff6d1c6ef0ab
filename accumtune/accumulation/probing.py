"""Does a user's loss look at the batch as a whole? It is asked with random numbers in place of a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

UNKNOWN = "could not be tried out, and may depend on which samples share a micro-batch."
NO_MEAN = "gives one number per micro-batch that is not a mean over samples."
NO_SUM = "gives one number per micro-batch that is not a sum over samples."
NOT_ALONE = "gives each sample a value that depends on the others in its micro-batch."


def why_coupled(values: Callable[[Any, Any], Any], is_sum: bool = False) -> str:
    """Why the losses of micro-batches do not make the loss of their batch; "" where they do.

    Args:
        values: `(y_true, y_pred)` to losses: one per sample (or finer), or one number.
        is_sum: whether the numbers of micro-batches are added up, not averaged.
    """
    for y_true, y_pred in _four_samples():
        try:
            whole, *parts = [_computed(values, y_true[part], y_pred[part]) for part in _PARTS]
        except Exception:  # a user's function may want other shapes or labels; it is asked with the next ones
            continue
        if whole.ndim == 0:
            weights = [[1, 1], [1, 1]] if is_sum else [[0.5, 0.5], [0.25, 0.75]]
            halves, uneven = np.dot(weights[0], parts[:2]), np.dot(weights[1], parts[2:])
            return "" if _equal(whole, halves) and _equal(whole, uneven) else NO_SUM if is_sum else NO_MEAN
        together = np.concatenate(parts[:2])
        return "" if together.shape == whole.shape and _equal(whole, together) else NOT_ALONE
    return UNKNOWN


_PARTS = (slice(0, 4), slice(0, 2), slice(2, 4), slice(0, 1), slice(1, 4))


def _four_samples() -> Iterator[tuple[Any, Any]]:
    """Targets and predictions in the shapes that losses usually take."""
    import keras

    generator = np.random.default_rng(0)
    for shape in ((4, 3), (4, 3, 2), (4, 4, 4, 3), (4, 1)):
        y_true, y_pred = generator.uniform(0.1, 0.9, (2, *shape)).astype(keras.config.floatx())
        yield y_true, y_pred
        yield np.arange(4, dtype="int32") % 2, y_pred


def _computed(values: Callable[[Any, Any], Any], y_true: Any, y_pred: Any) -> Any:
    from keras import ops

    result = values(ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred))
    return np.asarray(ops.convert_to_numpy(result), "float64")


def _equal(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))
