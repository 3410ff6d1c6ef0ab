"""Translates Keras Tuner's hyperparameters into Optuna's, and back. Pure functions.

Ordered hyperparameters become numbers, so that Optuna's samplers see the order. An ordered choice becomes its rank; for
batch sizes that are not evenly spaced in their logarithm, it becomes the logarithm. A stepped `Int` or `Float` becomes
the index of its step. A range for which Optuna has no distribution becomes Keras Tuner's cumulative probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine import hyperparameters as kinds

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter for Optuna.

    Args:
        name: Optuna's; unlike in Keras Tuner, a name has a single distribution.
        distribution: an `optuna.distributions.BaseDistribution`.
        decode: turns Optuna's value into Keras Tuner's.
        encode: turns Keras Tuner's value into Optuna's.
    """

    name: str
    distribution: Any
    decode: Callable[[Any], Any] = lambda value: value
    encode: Callable[[Any], Any] = lambda value: value


def active(space: Sequence[Any], choose: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the values `choose(hyperparameter)` of all hyperparameters whose conditions hold."""
    hyperparameters = keras_tuner.HyperParameters()
    for hp in space:
        hyperparameters.merge([hp])
        if hyperparameters.is_active(hp):
            hyperparameters.values[hp.name] = choose(hp)
    return dict(hyperparameters.values)


def suggest(space: Sequence[Any], trial: Any) -> dict[str, Any]:
    """Returns Keras Tuner's values for what an `optuna.Trial` suggests; inactive hyperparameters are left out."""
    names = _names(space)

    def choose(hp: Any) -> Any:
        found = dimension(hp, names[id(hp)])
        return hp.value if found is None else found.decode(_suggest(trial, found))

    return active(space, choose)


def spread(space: Sequence[Any], seed: int, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields points of a sequence that fills the space evenly (Sobol's, scrambled), from number `first` on.

    Random values leave gaps and come in clusters, which is bad for a model of very few points.
    """
    from scipy.stats.qmc import Sobol

    sequence = Sobol(max(len(space), 1), scramble=True, seed=seed)
    if first:
        sequence.fast_forward(first)
    for _ in range(count):
        yield _at(space, [float(place) for place in sequence.random(1)[0]])


def near(
    space: Sequence[Any], values: Mapping[str, Any], seed: int | Sequence[int], count: int
) -> Iterator[dict[str, Any]]:
    """Yields points that differ from values in one hyperparameter or two, mostly by little."""
    generator = np.random.default_rng(seed)
    center = [_probability(hp, values.get(hp.name, hp.default)) for hp in space]
    for _ in range(count):
        point = list(center)
        for index in generator.integers(0, len(space), 2):
            step = generator.standard_normal() * generator.choice([0.03, 0.1, 0.3])
            point[index] = min(max(center[index] + float(step), 0.0), 1.0)
        yield _at(space, point)


def _at(space: Sequence[Any], point: Sequence[float]) -> dict[str, Any]:
    places = dict(zip(map(id, space), point, strict=False))
    return active(space, lambda hp: hp.prob_to_value(min(places[id(hp)], 1 - 1e-9)))


def encoded(space: Sequence[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns Optuna's parameters and distributions for Keras Tuner's values.

    Hyperparameters that were not known when the values were proposed get their defaults.
    """
    names = _names(space)
    params, distributions = {}, {}

    def choose(hp: Any) -> Any:
        value = values.get(hp.name, hp.default)
        found = dimension(hp, names[id(hp)])
        if found is not None:
            params[found.name], distributions[found.name] = found.encode(value), found.distribution
        return value

    active(space, choose)
    return params, distributions


def has_conditions(space: Sequence[Any]) -> bool:
    """Returns whether some hyperparameters exist only for certain values of others."""
    return any(hp.conditions for hp in space)


def dimension(hp: Any, name: str | None = None) -> Dimension | None:
    """Translates a hyperparameter into a dimension; None if it is fixed."""
    name = name or hp.name
    if isinstance(hp, kinds.Fixed):
        return None
    if isinstance(hp, kinds.Boolean):
        return _categorical(name, [False, True])
    if isinstance(hp, kinds.Choice):
        return _ordered(name, hp) if hp.ordered else _categorical(name, list(dict.fromkeys(hp.values)))
    if isinstance(hp, (kinds.Int, kinds.Float)):
        return _continuous(name, hp) if hp.step is None else _indexed(name, list(hp.values), type(hp.default))
    return _by_probability(name, hp)


def _categorical(name: str, values: list[Any]) -> Dimension:
    from optuna.distributions import CategoricalDistribution

    return Dimension(name, CategoricalDistribution(values))


def _ordered(name: str, hp: Any) -> Dimension:
    values = sorted(set(hp.values))
    is_batch = hp.name in BATCH_HYPERPARAMETERS and len(values) > 2
    return _logarithmic(name, values) if is_batch and not _is_geometric(values) else _indexed(name, values)


def _indexed(name: str, values: Sequence[Any], kind: Callable[[Any], Any] = lambda value: value) -> Dimension:
    """Encodes a value as its rank; one that is no longer listed counts as the nearest."""
    from optuna.distributions import IntDistribution

    listed = [kind(value) for value in values]
    return Dimension(
        name, IntDistribution(0, len(listed) - 1), listed.__getitem__, lambda value: _nearest(listed, value)
    )


def _logarithmic(name: str, values: list[int]) -> Dimension:
    from optuna.distributions import FloatDistribution

    logarithms = [math.log2(value) for value in values]
    return Dimension(
        name,
        FloatDistribution(logarithms[0], logarithms[-1]),
        lambda logarithm: values[_nearest(logarithms, logarithm)],
        lambda value: min(max(math.log2(value), logarithms[0]), logarithms[-1]),
    )


def _continuous(name: str, hp: Any) -> Dimension:
    from optuna.distributions import FloatDistribution, IntDistribution

    if hp.sampling == "reverse_log":
        return _by_probability(name, hp)
    is_log = hp.sampling == "log"
    if isinstance(hp, kinds.Int):
        return Dimension(name, IntDistribution(hp.min_value, hp.max_value, log=is_log), int, int)
    return Dimension(name, FloatDistribution(hp.min_value, hp.max_value, log=is_log), float, float)


def _by_probability(name: str, hp: Any) -> Dimension:
    from optuna.distributions import FloatDistribution

    # Just below 1, because Keras Tuner's probabilities are in [0, 1).
    return Dimension(
        name,
        FloatDistribution(0.0, 1.0),
        lambda probability: hp.prob_to_value(min(probability, 1 - 1e-9)),
        lambda value: min(max(float(hp.value_to_prob(value)), 0.0), 1.0),
    )


def _suggest(trial: Any, dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    given = dimension.distribution
    if isinstance(given, CategoricalDistribution):
        return trial.suggest_categorical(dimension.name, given.choices)
    suggest = trial.suggest_int if isinstance(given, IntDistribution) else trial.suggest_float
    return suggest(dimension.name, given.low, given.high, log=given.log)


def _probability(hp: Any, value: Any) -> float:
    try:
        return float(hp.value_to_prob(value))
    except ValueError:  # a choice that is no longer listed
        return 0.5


def named(space: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """Yields the hyperparameters with their unique names."""
    names = _names(space)
    return ((hp, names[id(hp)]) for hp in space)


def _names(space: Sequence[Any]) -> dict[int, str]:
    """Gives each hyperparameter a unique name, because in Keras Tuner a name may have several ranges."""
    return {id(hp): name for hp, name in zip(space, _unique(hp.name for hp in space), strict=True)}


def _unique(names: Iterator[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _is_geometric(values: Sequence[float]) -> bool:
    ratios = [larger / smaller for smaller, larger in zip(values, values[1:], strict=False)]
    return max(ratios) <= 1.001 * min(ratios)


def _nearest(values: Sequence[float], value: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - value))
