"""Checks the arguments of `Tuner` and `search` before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras_tuner

from accumtune.errors import BatchSizeError, DataError, SearchError
from accumtune.search.subclassing.overrides import refuse_overridden
from accumtune.worker.data.hypermodel_fit_data import own_fit
from accumtune.worker.data.trees import leaves
from accumtune.worker.data.user_data import input_arguments, is_pipeline


def check_tuner_arguments(
    kwargs: Mapping[str, Any], known: Callable[..., Any], tuner: type, oracle: Any, hypermodel: Any
) -> None:
    """Refuses arguments with which no tuner can be made.

    Args:
        kwargs: the arguments that `Tuner` does not name itself.
        known: `Tuner.__init__`, which names the others.
        tuner: the class that is made.
        oracle, hypermodel: as given.

    Raises:
        SearchError: an argument that the tuner does not take, or a subclass with methods that nothing would call.
    """
    _refuse_unknown_arguments(kwargs, known, tuner)
    _refuse_strategy(kwargs.get("distribution_strategy"))
    _refuse_no_oracle(oracle)
    _refuse_missing_hypermodel(hypermodel)
    refuse_overridden(tuner, type(oracle))


def check_search_arguments(
    fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any], hypermodel: Any, objective: Any, has_own_run_trial: bool
) -> None:
    """Refuses arguments of `search` with which nothing could be trained or compared.

    Args:
        fit_args, fit_kwargs: as given.
        hypermodel: the user's.
        objective: Keras Tuner's.
        has_own_run_trial: whether a subclass overrides `run_trial`, which may bring its own data.

    Raises:
        SearchError: a batch size, or data that are missing.
        DataError: arrays whose samples do not belong together.
    """
    refuse_batch_size(fit_kwargs)
    if not has_own_run_trial:
        _refuse_third_argument(hypermodel, fit_args)
        _refuse_missing_data(hypermodel, fit_args, fit_kwargs)
        _refuse_missing_validation(objective.name, hypermodel, fit_kwargs)
        if own_fit(hypermodel) is None:
            _refuse_unequal_lengths("x, y and sample_weight", input_arguments(fit_args, fit_kwargs))
            _refuse_unequal_lengths("validation_data", fit_kwargs.get("validation_data"))


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuses a value that is not one of the known values.

    Raises:
        BatchSizeError: the value is not known.
    """
    if value not in known:
        listed = ", ".join(repr(choice) for choice in known)
        raise BatchSizeError(f"Received {name}={value!r}.", f"one of {listed}.", f"leave {name} out for the default.")


def _refuse_unknown_arguments(names: Iterable[str], init: Callable[..., Any], tuner: type) -> None:
    """Refuses arguments that neither this tuner nor Keras Tuner's own has."""
    keras_tuners = set(inspect.signature(keras_tuner.Tuner.__init__).parameters) - {"self", "kwargs"}
    known = keras_tuners | (set(inspect.signature(init).parameters) - {"self", "kwargs"})
    for name in sorted(set(names) - keras_tuners):
        similar = difflib.get_close_matches(name, known, n=1)
        raise SearchError(
            f"Received {name}=..., which {tuner.__name__} does not take.",
            "its own arguments, or those of accumtune.Tuner and keras_tuner.Tuner; those of `fit` go to search().",
            f"did you mean {similar[0]}?" if similar else f"leave {name} out, or use a tuner that has it.",
        )


def _refuse_strategy(distribution_strategy: Any) -> None:
    """Refuses Keras Tuner's argument for several devices."""
    if distribution_strategy is not None:
        raise SearchError(
            f"Received distribution_strategy={distribution_strategy!r}.",
            "None: each trial runs in a process of its own, and this process's strategy cannot be sent there.",
            "leave it out; workers=2 runs two trials at once, each on a GPU of its own. To train the best "
            "configuration on several GPUs: config.for_replicas(...).",
        )


def _refuse_no_oracle(oracle: Any) -> None:
    """Refuses an oracle that is none of Keras Tuner's."""
    if not isinstance(oracle, keras_tuner.Oracle):
        raise SearchError(
            f"Received oracle={oracle!r} of type {type(oracle).__name__}.",
            "a keras_tuner.Oracle.",
            "give keras_tuner.oracles.RandomSearchOracle(objective='val_loss', max_trials=10), or use "
            "accumtune.RandomSearch, which makes its own.",
        )


def _refuse_missing_hypermodel(hypermodel: Any) -> None:
    """Refuses a tuner without a hypermodel, which Keras Tuner takes where `run_trial` does everything."""
    if hypermodel is None:
        raise SearchError(
            "Received hypermodel=None.",
            "a build function or a keras_tuner.HyperModel, which each trial calls in a process of its own, under the "
            "budget; a run_trial that does everything itself would run in this process, without a budget.",
            "move what run_trial builds into a build function, and how it trains into the `fit` of a "
            "keras_tuner.HyperModel; to search without a model, use keras_tuner's own tuners.",
        )


def refuse_batch_size(fit_kwargs: Mapping[str, Any]) -> None:
    """Refuses a batch size in `search`.

    Raises:
        SearchError: there is one.
    """
    if "batch_size" in fit_kwargs:
        raise SearchError(
            f"Received batch_size={fit_kwargs['batch_size']} among the arguments of fit.",
            "no batch_size: the effective batch is what the search finds.",
            "to fix it, give the tuner micro_batch_sizes=(32,) and accumulation_steps=(8,), for example.",
        )


def _refuse_third_argument(hypermodel: Any, fit_args: Sequence[Any]) -> None:
    """Refuses a third positional argument, which is `model.fit`'s batch size, unless the user's own `fit` gets it."""
    if len(fit_args) > 2 and own_fit(hypermodel) is None:
        raise SearchError(
            f"Received {len(fit_args)} positional arguments. The third, of type {type(fit_args[2]).__name__}, is "
            "the batch_size of model.fit.",
            "x and y by position, everything else by name, and no batch_size.",
            "tuner.search(x, y, sample_weight=..., validation_data=..., epochs=...).",
        )


def _refuse_missing_data(hypermodel: Any, fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> None:
    """Refuses a search without data, unless the user's own `fit` loads them."""
    if not fit_args and fit_kwargs.get("x") is None and own_fit(hypermodel) is None:
        raise SearchError(
            "Received search() without data.",
            "the data that model.fit takes, or a keras_tuner.HyperModel whose `fit` loads its own data.",
            "tuner.search(x, y, validation_data=(x_val, y_val), ...).",
        )


def _refuse_missing_validation(objective_name: str, hypermodel: Any, fit_kwargs: Mapping[str, Any]) -> None:
    """Refuses an objective on validation data without validation data."""
    has_validation = bool(fit_kwargs.get("validation_split")) or fit_kwargs.get("validation_data") is not None
    # A HyperModel with a fit of its own may validate in its own way.
    if objective_name.startswith("val_") and not has_validation and own_fit(hypermodel) is None:
        raise SearchError(
            f"Received the objective {objective_name!r}, and search() without validation data.",
            "validation data, on which this objective is measured.",
            "tuner.search(x, y, validation_data=(x_val, y_val), ...), or validation_split=0.2.",
        )


def _refuse_unequal_lengths(name: str, data: Any) -> None:
    """Refuses arrays that differ in their number of samples, or have none; other data are read in the trials."""
    found = leaves(data)
    shapes = [getattr(leaf, "shape", None) for leaf in found]
    if any(is_pipeline(leaf) or not shape or shape[0] is None for leaf, shape in zip(found, shapes, strict=True)):
        return
    rows = sorted({int(shape[0]) for shape in shapes if shape})
    if found and (len(rows) > 1 or 0 in rows):
        raise DataError(
            f"Received {name} with arrays of {' and '.join(map(str, rows))} samples.",
            "arrays with the same number of samples, at least 1.",
            f"look at the shapes of {name}: the first axis counts the samples.",
        )
