"""Finds out what a HyperModel's own `fit` gives to `model.fit`, by calling it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from accumtune.errors import DataError


class _Given(BaseException):
    """Leaves the user's `fit` where it would train; nothing of the user's may handle it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


def own_fit(hypermodel: Any) -> Any:
    """The `fit` of a `keras_tuner.HyperModel` of the user's, or None where it is Keras Tuner's."""
    import keras_tuner

    fit = getattr(hypermodel, "fit", None)
    is_own = getattr(type(hypermodel), "fit", None) is not keras_tuner.HyperModel.fit
    return fit if callable(fit) and is_own else None


def arguments_of_fit(fit: Any, hp: Any, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the user's `fit` gives to `model.fit`, by name; nothing is trained.

    Raises:
        DataError: it trains without `model.fit`.
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
        "Received search() without data, and a HyperModel.fit that trains without model.fit.",
        "data that a micro-batch can be taken of, to measure what it costs.",
        "tuner.search(x, y, ...), with the data that this fit trains on.",
    )
