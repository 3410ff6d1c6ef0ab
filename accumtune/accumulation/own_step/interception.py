"""Intercepts gradients, assignments and reported numbers of a model's own `train_step` while it runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from accumtune.accumulation.own_step.own_train_step import LAST, MEAN, SUM, refusal
from accumtune.accumulation.patched_attributes import replaced
from accumtune.errors import CustomTrainStepError

_SEED = "seed_generator_state"


def packed(batch: tuple[Any, Any, Any], form: int) -> Any:
    """Returns (x, y, sample_weight) in the form of the data that Keras gives the step.

    Args:
        form: the length of the tuple; 0: x alone, without a tuple.
    """
    return batch[:form] if form else batch[0]


Handed = Callable[[list[Any], Any, Callable[[list[Any]], Any]], Any]


@contextlib.contextmanager
def intercepted(optimizer: Any, handed: Handed) -> Iterator[None]:
    """Calls `handed(gradients, variables, apply)` instead of the optimizer's apply and apply_gradients, in the block.

    `apply(gradients)` makes the step's own call, with these gradients.
    """
    own_apply, own_apply_gradients = optimizer.apply, optimizer.apply_gradients

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        if trainable_variables is None:
            trainable_variables = list(optimizer._trainable_variables)
        variables = list(trainable_variables)
        return handed(list(grads), variables, lambda gradients: own_apply(gradients, variables))

    def apply_gradients(grads_and_vars: Any) -> Any:
        gradients, variables = map(list, zip(*grads_and_vars, strict=True))

        def apply_with(gradients: list[Any]) -> Any:
            with replaced(optimizer, {"apply": own_apply}):
                return own_apply_gradients(zip(gradients, variables, strict=True))

        handed(gradients, variables, apply_with)
        return optimizer.iterations

    with replaced(optimizer, {"apply": apply, "apply_gradients": apply_gradients}):
        yield


@contextlib.contextmanager
def one_update(model: Any, handed: Handed) -> Iterator[None]:
    """Does what `intercepted` does, and checks that the step in the block updates once, as when it was tested."""
    calls = itertools.count(1)

    def counted(gradients: list[Any], variables: list[Any], apply: Callable[[list[Any]], Any]) -> Any:
        if next(calls) > 1:
            raise _not_once(model)
        return handed(gradients, variables, apply)

    with intercepted(model.optimizer, counted):
        yield
    if next(calls) == 1:
        raise _not_once(model)


def _not_once(model: Any) -> CustomTrainStepError:
    seen = "it does not update once in each call, as it did when it was tested."
    return refusal(model, seen, "update in every step.")


class Overlay(keras.StatelessScope):
    """A scope whose assignments to variables are seen only inside it; it notes them."""

    def __init__(self, state_mapping: Any = None) -> None:
        super().__init__(state_mapping, collect_losses=True)  # else what layers add as losses would be lost
        self.assigned: dict[int, tuple[Any, Any]] = {}

    def get_current_value(self, variable: Any) -> Any:
        """Returns a variable's value; also if it is not assigned here, which regularizers need."""
        value = super().get_current_value(variable)
        return variable._value if value is None else value

    def add_update(self, update: Any) -> None:
        super().add_update(update)
        self.assigned[id(update[0])] = update

    def keep(self, model: Any) -> None:
        """Assigns, after the scope, the variables that change in every micro-step: those of metrics and seeds."""
        metrics = {id(variable) for metric in metrics_of(model) for variable in metric.variables}
        for variable, value in self.assigned.values():
            if id(variable) in metrics or is_seed(variable):
                variable.assign(value)


def is_seed(variable: Any) -> bool:
    """Returns whether a variable is the state of a seed generator, which changes in every micro-step."""
    return str(variable.name) == _SEED


def metrics_of(model: Any) -> list[Any]:
    """Returns the metrics of a model, also those that its own `metrics` property omits."""
    every = [*model.metrics, *keras.Model.metrics.fget(model)]
    return list({id(metric): metric for metric in every}.values())


@contextlib.contextmanager
def weighed_scalars(
    model: Any, share: Any, kinds: Sequence[str] | None, noted: list[Any] | None = None
) -> Iterator[None]:
    """Weights a number that the step gives to a `keras.metrics.Mean` by the micro-batch's share of the window.

    Args:
        share: the micro-batch's share of the window.
        kinds: for each call, whether the numbers of micro-batches are averaged or added up; None: all are averaged.
        noted: a list that gets the numbers, in the order of the calls.
    """
    from keras import ops

    calls = itertools.count()

    def by_share(metric: Any) -> Callable[..., Any]:
        update = metric.update_state

        def update_state(values: Any, sample_weight: Any = None) -> Any:
            if sample_weight is not None or len(ops.convert_to_tensor(values).shape):
                return update(values, sample_weight=sample_weight)
            index = next(calls)
            if noted is not None:
                noted.append(values)
            part = ops.cast(share, metric.dtype)
            is_sum = kinds is not None and index < len(kinds) and kinds[index] == SUM
            values = ops.cast(values, metric.dtype)
            return update(values / part if is_sum else values, sample_weight=part)

        return update_state

    with contextlib.ExitStack() as stack:
        for metric in metrics_of(model):
            if type(metric).update_state is keras.metrics.Mean.update_state:
                stack.enter_context(replaced(metric, {"update_state": by_share(metric)}))
        yield


def joined_logs(so_far: Sequence[Any] | None, logs: Any, kinds: Sequence[str], share: Any) -> list[Any]:
    """Returns the leaves of a micro-step's logs, combined with those of the earlier micro-steps."""
    from keras import ops, tree

    def part(leaf: Any, kind: str) -> Any:
        if kind != MEAN:
            return leaf
        leaf = ops.convert_to_tensor(leaf)
        return leaf * ops.cast(share, leaf.dtype)

    parts = [part(leaf, kind) for leaf, kind in zip(tree.flatten(logs), kinds, strict=True)]
    if so_far is None:
        return parts
    return [new if kind == LAST else old + new for old, new, kind in zip(so_far, parts, kinds, strict=True)]
