"""Saves and restores a training at the end of an epoch: its variables, generators and callbacks."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np


class CannotContinue(Exception):
    """The saved state does not fit the model that was built now."""


class CallbackMemory:
    """The attributes of a callback that have changed since training began: plain values and arrays.

    Unchanged ones (a path, a patience) are not saved: in the process that resumes, the constructor sets them.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._at_first = {name: pickle.dumps(value) for name, value in self._plain().items()}

    def state(self) -> dict[str, Any]:
        plain = self._plain().items()
        return {name: value for name, value in plain if self._at_first.get(name) != pickle.dumps(value)}

    def _plain(self) -> dict[str, Any]:
        items = vars(self._callback).items()
        return {name: value for name, value in items if name not in ("params", "_model") and _is_plain(value)}


def _variables(model: Any) -> list[Any]:
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    return [*model.variables, *optimizer.variables]


def values_of(model: Any) -> list[np.ndarray]:
    """Returns the present values of the variables of a model and of its optimizer."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in _variables(model)]


def restore_values(model: Any, values: Sequence[np.ndarray]) -> None:
    """Assigns the values that `values_of` returned.

    Raises:
        CannotContinue: they are another model's.
    """
    variables = _variables(model)
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise CannotContinue("variables of other shapes")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def random_state() -> dict[str, Any]:
    """Returns the state of all global generators: those of Python, NumPy, Keras and torch."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state()}
    generator = _keras_generator()
    if generator is not None:
        state["keras"] = np.array(keras.ops.convert_to_numpy(generator.state))
    if keras.backend.backend() == "torch":
        import torch

        state["torch"] = torch.get_rng_state().numpy()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators to the state that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    generator = _keras_generator()
    if generator is not None and "keras" in state:
        generator.state.assign(state["keras"])
    if "torch" in state:
        import torch

        torch.set_rng_state(torch.from_numpy(state["torch"]))


def _keras_generator() -> Any:
    """Returns Keras's global generator, for operations without a seed, if one has run; it has no public name."""
    from keras.src.backend.common import global_state
    from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR

    return global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (np.ndarray, np.generic)):
        return not value.dtype.hasobject
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return True
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    # Functions too: `EarlyStopping` sets its comparison function at the first epoch.
    return callable(value) and _is_importable(value)


def _is_importable(value: Any) -> bool:
    try:
        return isinstance(value, type(_is_importable)) and pickle.loads(pickle.dumps(value)) is value
    except Exception:  # a function inside a function, a lambda
        return False
