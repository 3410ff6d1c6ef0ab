"""Finds the arguments that a HyperModel's own `fit` passes to `model.fit`, by calling it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from accumtune.errors import DataError


class _Given(BaseException):
    """Leaves a user's `fit` at its call of `model.fit`. A BaseException, so that the user's code does not catch it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


def own_fit(hypermodel: Any) -> Any:
    """Returns the `fit` that a user's `keras_tuner.HyperModel` overrides, or None."""
    import keras_tuner

    fit = getattr(hypermodel, "fit", None)
    is_own = getattr(type(hypermodel), "fit", None) is not keras_tuner.HyperModel.fit
    return fit if callable(fit) and is_own else None


def arguments_of_fit(fit: Any, hp: Any, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that the user's `fit` passes to `model.fit`, by name, without training.

    Raises:
        DataError: it does not call `model.fit`.
    """
    signature = inspect.signature(type(model).fit)

    def give(*given_args: Any, **given_kwargs: Any) -> None:
        raise _Given(signature.bind(model, *given_args, **given_kwargs).arguments)

    model.fit = give
    try:
        fit(hp, model, *args, **{**kwargs, "callbacks": list(kwargs.get("callbacks") or []), "verbose": 0})
    except _Given as given:
        return dict(given.arguments)
    finally:
        del model.fit
    raise DataError(
        "Received search() without data, and a HyperModel.fit that does not call model.fit.",
        "data from which accumtune can take a micro-batch, to measure its cost.",
        "tuner.search(x, y, ...), with the data that this fit trains on.",
    )
