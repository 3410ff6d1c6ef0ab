"""Refuses losses over the whole batch that read tensors which a forward pass leaves on layers.

Such a tensor is of one micro-batch only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from accumtune.errors import ModelError

_NOTHING = object()


class Leftovers:
    """The tensors that a model's forward passes leave on its layers (`self.z = z`), hidden while its loss is computed.

    Args:
        model: a built model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names: dict[int, tuple[Any, set[str]]] = {}
        self._is_sure = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the attributes to which a forward pass (traced or run) assigns tensors, in the first window."""
        if self._is_sure:
            yield
            return
        before = [(layer, _tensors_of(layer)) for layer in self._model._flatten_layers(include_self=True)]
        yield
        for layer, known in before:
            for name, tensors in _tensors_of(layer).items():
                old = known.get(name, [])
                if len(old) != len(tensors) or any(a is not b for a, b in zip(old, tensors, strict=True)):
                    self._names.setdefault(id(layer), (layer, set()))[1].add(name)

    def end(self) -> None:
        """Ends the first window: nothing is noted from now on."""
        self._is_sure = True

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Removes these attributes from the layers inside the `with` block.

        Raises ModelError at its end if one of them was read before it was assigned again.
        """
        missed: list[tuple[Any, str]] = []
        with contextlib.ExitStack() as undone:
            for layer, names in self._names.values():
                for name in names & set(vars(layer)):
                    undone.callback(object.__setattr__, layer, name, vars(layer).pop(name))
            for kind, name in {(type(layer), name) for layer, names in self._names.values() for name in names}:
                undone.callback(_restore, kind, name, vars(kind).get(name, _NOTHING))
                setattr(kind, name, _Lacking(name, missed))
            try:
                yield
            except Exception as error:
                if missed:
                    raise _refusal(*missed[0]) from error
                raise
        if missed:
            raise _refusal(*missed[0])


def _restore(kind: type, name: str, own: Any) -> None:
    if own is _NOTHING:
        delattr(kind, name)
    else:
        setattr(kind, name, own)


def _refusal(layer: Any, name: str) -> ModelError:
    return ModelError(
        f"Received a loss over the whole effective batch that reads {name!r} of {layer.name!r} "
        f"({type(layer).__name__}), a tensor that the forward pass leaves there.",
        "a loss of targets and outputs: what a forward pass leaves behind is of one micro-batch alone.",
        "return the tensor from call() as one more output, and take it from y_pred. Or, where the loss is a mean over "
        "samples, set samples_are_independent = True on the model (or the loss).",
    )


class _Lacking:
    """A class's attribute that an instance has only after it is set.

    Args:
        missed: a list that gets the instances on which it was read before.
    """

    def __init__(self, name: str, missed: list[tuple[Any, str]]) -> None:
        self._name, self._missed = name, missed

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        if self._name not in vars(layer):
            self._missed.append((layer, self._name))
            raise AttributeError(self._name)
        return vars(layer)[self._name]

    def __set__(self, layer: Any, value: Any) -> None:
        # Keras reads the old value before it sets a new one.
        self._missed[:] = [(one, name) for one, name in self._missed if one is not layer or name != self._name]
        vars(layer)[self._name] = value


@functools.cache
def _of_keras() -> frozenset[str]:
    import keras

    return frozenset({*vars(keras.Model()), *vars(keras.layers.Layer())})


def _tensors_of(layer: Any) -> dict[str, list[Any]]:
    """Returns the tensors in a layer's attributes, also those in a list, tuple or dict, by attribute."""
    from keras import KerasTensor, ops

    found = {}
    for name, value in vars(layer).items():
        if name in _of_keras() or name.startswith("_accumtune"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        tensors = [one for one in values if isinstance(one, KerasTensor) or ops.is_tensor(one)]
        if tensors:
            found[name] = tensors
    return found
