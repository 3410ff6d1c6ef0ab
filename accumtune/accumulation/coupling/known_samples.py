"""Keeps a few samples of the user's data, on which a model's own code is tested."""

from __future__ import annotations

from typing import Any

import numpy as np

# A test needs five; more may include a missing target.
_LEAST, _MOST, _MOST_BYTES = 5, 16, 2**24


class Samples:
    """The first samples of x and y.

    Args:
        x, y: arrays or tensors, or structures of them; y may be None.
    """

    def __init__(self, x: Any, y: Any = None) -> None:
        self.x, self.y = _first((x, y))

    def targets_and_predictions(self, model: Any) -> list[tuple[Any, Any]]:
        """Returns targets and predictions for each output of `model`; [] if the model cannot run."""
        from keras import StatelessScope, ops, tree

        if self.y is None:
            return []
        try:
            x = tree.map_structure(lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), self.x)
            with StatelessScope():
                y_pred = model(x, training=False) if model._call_has_training_arg else model(x)
            predictions = [np.asarray(ops.convert_to_numpy(ops.cast(leaf, "float32"))) for leaf in tree.flatten(y_pred)]
        except Exception:  # a model may need other data than its first samples
            return []
        targets = tree.flatten(self.y)
        return list(zip(targets, predictions, strict=True)) if len(targets) == len(predictions) else []


def note(model: Any, batch: tuple[Any, Any, Any]) -> None:
    """Keeps the first samples of a model's training on the model."""
    if model._accumtune_samples is None:
        try:
            samples = Samples(*batch[:2])
        except Exception:  # ragged and sparse tensors, or strings, are not used
            samples = Samples(None)
        object.__setattr__(model, "_accumtune_samples", samples)


def _first(structure: Any) -> Any:
    from keras import ops, tree

    # On the host, so that the device's memory is not used.
    arrays = tree.map_structure(
        lambda leaf: leaf if leaf is None or isinstance(leaf, np.ndarray) else np.asarray(ops.convert_to_numpy(leaf)),
        structure,
    )
    row_bytes = sum(leaf.nbytes // max(len(leaf), 1) for leaf in tree.flatten(arrays) if leaf is not None)
    count = min(_MOST, max(_LEAST, _MOST_BYTES // max(row_bytes, 1)))
    return tree.map_structure(lambda leaf: None if leaf is None else np.array(leaf[:count]), arrays)
