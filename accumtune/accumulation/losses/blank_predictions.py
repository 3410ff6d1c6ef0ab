"""Finds the denominator of a loss without a forward pass, if it does not depend on the predictions' values; on torch.

On TensorFlow and JAX the compiler removes everything from the forward pass that the denominators do not need, most
often all of it. On torch the loss gets predictions of the right shape without values instead. Everything computed from
them is marked as unknown. If the denominator is unknown, or the loss reads a value, the model's predictions are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from keras import tree


class Unknown(torch.Tensor):
    """A tensor whose values are not known; tensors computed from it are Unknown too."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        is_written_to = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if name in _LOOKS or (is_written_to and not isinstance(args[0], cls)) or "out" in (kwargs or {}):
            raise LooksAtValues
        return super().__torch_function__(function, types, args, kwargs or {})


_LOOKS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__"}


class LooksAtValues(Exception):
    """A loss read a value of an Unknown tensor, or wrote unknown values into another tensor."""


class BlankPredictions:
    """Makes predictions without values, for batches of shapes with which the model has run."""

    def __init__(self) -> None:
        self._structures: dict[Any, Any] = {}

    def learn(self, x: Any, y_pred: Any) -> None:
        """Notes the shapes of the model's predictions for a batch."""
        samples = _samples(x)
        leaves = [(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in tree.flatten(y_pred)]
        if all(shape[:1] == (samples,) for shape, _, _ in leaves):
            blanks = [(shape[1:], dtype, device) for shape, dtype, device in leaves]
            self._structures[_shapes(x)] = (tree.map_structure(lambda _: None, y_pred), blanks)

    def counts(self, x: Any, count: Callable[[Any], list[Any]]) -> list[float] | None:
        """Returns the numbers of `count(predictions)`; None if it needs the model's own predictions."""
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
        except Exception:  # a user's loss, with meaningless values: with real predictions a true error comes again
            return None
        return None if any(isinstance(number, Unknown) for number in found) else [float(number) for number in found]


def _samples(x: Any) -> int:
    return int(next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0])


def _shapes(x: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape[1:]) for leaf in tree.flatten(x) if leaf is not None)
