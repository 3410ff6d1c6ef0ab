"""The samples and the random draws with which a model's own `train_step` is tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

PARTS = (slice(0, 2), slice(2, 4), slice(4, 7))
SAMPLES = 7


class NotPerSampleError(Exception):
    """A draw of random numbers cannot be split by samples."""


class Draws:
    """Records the random numbers of a run on all samples, and gives a run on some samples its part of them.

    Args:
        of: the draws of the run on all samples; None: record them.
        samples: the samples of this run.
        by_view: whether draws for several views of each sample are ordered view by view, or sample by sample.
    """

    def __init__(self, of: Draws | None = None, samples: slice = slice(0, SAMPLES), by_view: bool = True) -> None:
        self.values: list[np.ndarray] = []
        self.has_views = False
        self._of, self._samples, self._by_view = of, samples, by_view

    def next(self, value: Any) -> np.ndarray:
        """Returns the numbers that replace a draw."""
        value = np.asarray(value)
        self.values.append(value)
        if self._of is None:
            return value
        if len(self._of.values) < len(self.values):
            raise NotPerSampleError("it draws random numbers another number of times for other samples.")
        whole = self._of.values[len(self.values) - 1]
        if self._samples == slice(0, SAMPLES):
            return whole
        axes = [axis for axis, (a, b) in enumerate(zip(whole.shape, value.shape, strict=False)) if a != b]
        if whole.ndim != value.ndim or len(axes) != 1 or whole.shape[axes[0]] % SAMPLES:
            raise NotPerSampleError(
                f"it draws random numbers of shape {value.shape}, which are not drawn for each sample by itself."
            )
        views = whole.shape[axes[0]] // SAMPLES
        self.has_views = self.has_views or views > 1
        shape = (views, SAMPLES) if self._by_view else (SAMPLES, views)
        numbers = np.arange(views * SAMPLES).reshape(shape)
        part = numbers[:, self._samples] if self._by_view else numbers[self._samples]
        if part.size != value.shape[axes[0]]:
            raise NotPerSampleError(f"it draws random numbers of shape {value.shape}, which do not follow its samples.")
        return whole.take(part.reshape(-1), axis=axes[0])


def seven(batch: Any) -> Any:
    """Returns seven samples of a batch on the host; repeats samples of a smaller batch."""
    from keras import tree

    return tree.map_structure(
        lambda leaf: leaf if leaf is None else np.resize(leaf[:SAMPLES], (SAMPLES, *leaf.shape[1:])), batch
    )


def variants(batch: Any) -> Iterator[tuple[Any, float]]:
    """Yields the samples unchanged and in changed variants, each with a factor by which to change the weights."""
    from keras import tree

    generator = np.random.default_rng(0)
    zeros = (0.0, 0.7, 0.3, 0.9, 0.5, 0.0, 0.8)

    def moved(leaf: Any) -> Any:
        if leaf is None or leaf.dtype.kind not in "fiub":
            return leaf
        if leaf.dtype.kind != "f":
            return generator.permutation(leaf.reshape(-1)).reshape(leaf.shape)
        noise = generator.normal(size=leaf.shape) * (float(np.std(leaf)) or 1.0)
        return (leaf * generator.uniform(0.5, 1.5, leaf.shape) + 0.3 * noise).astype(leaf.dtype)

    def emptied(leaf: Any) -> Any:
        if leaf is None or leaf.dtype.kind not in "fiub":
            return leaf
        where = generator.uniform(size=leaf.shape) < np.reshape(zeros, (SAMPLES, *[1] * (leaf.ndim - 1)))
        return np.where(where, np.zeros((), leaf.dtype), leaf)

    yield batch, 0.0
    yield tree.map_structure(moved, batch), 0.0
    yield tree.map_structure(emptied, batch), 0.0
    yield tree.map_structure(moved, batch), 0.3
