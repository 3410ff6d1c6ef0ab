"""What a loss divides by, found without a forward pass where it does not depend on what the model predicts.

On TensorFlow and JAX a compiler leaves out of a forward pass what the denominators do not need, which is most often all
of it. On torch a loss is given predictions of the right shape without values instead. What it computes from them is
marked as unknown; a denominator that is, or a loss that looks at a value, needs the model's own predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from keras import tree


class Unknown(torch.Tensor):
    """A tensor whose values mean nothing; what is computed from it is one too."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        is_written_to = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if name in _LOOKS or (is_written_to and not isinstance(args[0], cls)) or "out" in (kwargs or {}):
            raise LooksAtValues
        return super().__torch_function__(function, types, args, kwargs or {})


_LOOKS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__"}


class LooksAtValues(Exception):
    """A loss took a value out of a tensor, or put one into a tensor that is known."""


class BlankPredictions:
    """Predictions without values, for batches of shapes that the model has been run on."""

    def __init__(self) -> None:
        self._structures: dict[Any, Any] = {}

    def learn(self, x: Any, y_pred: Any) -> None:
        """Takes the shapes of what a model predicted for a batch."""
        samples = _samples(x)
        leaves = [(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in tree.flatten(y_pred)]
        if all(shape[:1] == (samples,) for shape, _, _ in leaves):
            blanks = [(shape[1:], dtype, device) for shape, dtype, device in leaves]
            self._structures[_shapes(x)] = (tree.map_structure(lambda _: None, y_pred), blanks)

    def counts(self, x: Any, count: Callable[[Any], list[Any]]) -> list[float] | None:
        """What `count(predictions)` gives; None where it takes the model's own predictions."""
        if _shapes(x) not in self._structures:
            return None
        structure, blanks = self._structures[_shapes(x)]
        samples = _samples(x)
        leaves = [
            torch.zeros((samples, *shape), dtype=dtype, device=device).as_subclass(Unknown)
            for shape, dtype, device in blanks
        ]
        try:
            found = count(tree.pack_sequence_as(structure, leaves))
        except Exception:  # a loss of a user, on values that mean nothing: its own predictions tell what is wrong
            return None
        return None if any(isinstance(number, Unknown) for number in found) else [float(number) for number in found]


def _samples(x: Any) -> int:
    return int(next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0])


def _shapes(x: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape[1:]) for leaf in tree.flatten(x) if leaf is not None)
