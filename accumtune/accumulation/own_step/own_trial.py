"""The parts of a test of a model's own step that all backends share: running it without changing the model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from accumtune.accumulation import moving_statistics
from accumtune.accumulation.own_step import certificate as certificates
from accumtune.accumulation.own_step import interception, trial_samples
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step.dataflow import Recording
from accumtune.accumulation.patched_attributes import put_back, replaced

SAME = "hand the same variables in every step, and gradients for the same ones."
_NEW = object()
_PLAIN = (bool, int, float, str, type(None))


def first_samples(model: Any, takes: list[Callable[[], Any]]) -> Any:
    """Returns seven samples of a window on the host; each of `takes` returns one of its micro-batches."""
    batches: list[Any] = []
    samples = 0
    for take in takes:
        batch = tree.map_structure(lambda leaf: _on_host(model, leaf), take())
        batches.append(batch)
        samples += len(next(leaf for leaf in tree.flatten(batch) if leaf is not None))
        if samples >= trial_samples.SAMPLES:
            break
    same = [one for one in batches if _row_shapes(one) == _row_shapes(batches[0])]
    joined = tree.map_structure(lambda *leaves: None if leaves[0] is None else np.concatenate(leaves), *same)
    if not samples:
        raise own.refusal(model, "and a first batch without samples.", "begin with a batch that has samples.")
    return trial_samples.seven(joined)


def _row_shapes(batch: Any) -> list[Any]:
    return [None if leaf is None else leaf.shape[1:] for leaf in tree.flatten(batch)]


def _on_host(model: Any, leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, np.ndarray):
        return leaf
    try:
        if hasattr(leaf, "to_sparse") and not hasattr(leaf, "cpu") or type(leaf).__name__ in ("SparseTensor", "BCOO"):
            raise TypeError(type(leaf).__name__)
        if hasattr(leaf, "numpy") and not hasattr(leaf, "cpu"):
            return np.asarray(leaf.numpy())
        return np.asarray(ops.convert_to_numpy(leaf))
    except Exception as error:
        seen = f"and data of type {type(leaf).__name__}, with which it cannot be tried."
        raise own.refusal(model, seen, "use dense tensors.") from error


@contextlib.contextmanager
def unchanged(model: Any, has_state: bool = True) -> Iterator[None]:
    """Restores variables and random generators after the block; raises if the step has changed anything else.

    Args:
        has_state: whether the model's state is in its variables (on JAX, not during `fit`).
    """
    every = [*model.variables, *model.optimizer.variables] if has_state else []
    variables = {id(one): one for one in every}.values()
    before = [np.array(ops.convert_to_numpy(variable.value)) for variable in variables]
    plain = _plain_attributes(model)
    changed: list[str] = []
    try:
        with _generators():
            yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            if not np.array_equal(ops.convert_to_numpy(variable.value), value, equal_nan=value.dtype.kind == "f"):
                variable.assign(value)
                changed.append(variable.path)
        kept = {name: value for name, value in _plain_attributes(model).items() if plain.get(name, _NEW) != value}
        put_back(model, [name for name in kept if isinstance(vars(model)[name], _PLAIN)], plain)
    changed += kept
    if changed:
        seen = f"it changes {', '.join(changed)} past Keras, so that each micro-step would."
        raise own.refusal(model, seen, "keep what changes as variables (self.add_weight), and assign() to these.")


def check_writes(model: Any, operations: list[str], are_of_weights: bool = False) -> None:
    """Raises CustomTrainStepError if a step has written to something past Keras, such as weights (`are_of_weights`)."""
    if operations:
        what = "changes weights" if are_of_weights else "writes"
        seen = f"it {what} past Keras ({', '.join(dict.fromkeys(operations))}), so that each micro-step would."
        fix = "keep what changes as variables (self.add_weight), and assign() to these."
        if are_of_weights:
            fix = "use self.optimizer (that of compile), not torch.optim: self.optimizer.apply(gradients, weights)."
        raise own.refusal(model, seen, fix)


def switches(model: Any) -> dict[str, Any]:
    """Returns the attributes by which a step may choose what it does, if it runs anew each time and is not compiled."""
    if keras.backend.backend() != "torch" and not model.run_eagerly:
        return {}
    return {name: value for name, value in _plain_attributes(model).items() if name != "stop_training"}


def _plain_attributes(model: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, _PLAIN) else len(value)
        for name, value in vars(model).items()
        if (isinstance(value, _PLAIN) or isinstance(value, (list, dict))) and not name.startswith("_")
    }


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from tensorflow.python.eager import context

        context = context.context()
        seeds = context._rng.getstate() if hasattr(context, "_rng") else None
    elif backend == "torch":
        import torch

        torch_states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if backend == "tensorflow" and seeds is not None:
            context._rng.setstate(seeds)
        if backend == "torch":
            torch.set_rng_state(torch_states[0])
            if torch_states[1]:
                torch.cuda.set_rng_state_all(torch_states[1])


@contextlib.contextmanager
def other_optimizers(model: Any) -> Iterator[list[str]]:
    """Makes all optimizers but the model's do nothing, in the block; the list gets their names when they are used."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    used: list[str] = []

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
        used.append(type(self).__name__)

    def stateless_apply(self: Any, optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
        used.append(type(self).__name__)
        return trainable_variables, optimizer_variables

    own_methods = BaseOptimizer.apply, BaseOptimizer.stateless_apply
    BaseOptimizer.apply, BaseOptimizer.stateless_apply = apply, stateless_apply
    try:
        yield used
    finally:
        BaseOptimizer.apply, BaseOptimizer.stateless_apply = own_methods


@contextlib.contextmanager
def fixed_statistics(model: Any) -> Iterator[None]:
    """Makes BatchNormalization use a constant mean and variance in the block, and not update its moving statistics.

    It would normalize each micro-batch by itself, which is known and not a property of the step.
    """

    def fixed(layer: Any) -> Callable[..., Any]:
        shape = layer.moving_mean.shape
        mean = np.linspace(-0.1, 0.2, shape[0]) if shape[0] else np.zeros(0)

        def moments(inputs: Any, mask: Any) -> tuple[Any, Any]:
            dtype = layer.moving_mean.dtype
            return ops.convert_to_tensor(mean, dtype), ops.convert_to_tensor(1.0 + mean, dtype)

        return moments

    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization) and layer.built:
                stack.enter_context(moving_statistics.left_as_they_are(layer, fixed(layer)))
        yield


@contextlib.contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Makes layers compute in their variables' precision, in the block: rounding in less would hide differences."""
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            policy = layer.dtype_policy
            if type(policy) is keras.DTypePolicy and policy.compute_dtype != policy.variable_dtype:
                full = keras.DTypePolicy(policy.variable_dtype)
                stack.enter_context(replaced(layer, {"_dtype_policy": full}))
        yield


def run(
    model: Any,
    data: Any,
    recording: Recording,
    stop: Callable[[], None],
    key: Callable[[Any], Any],
    dense: Callable[[Any], Any],
    share: float,
    *,
    kinds: tuple[str, ...] | None = None,
    update: list[Any] | None = None,
    is_last: bool = True,
    metric_state: Any = None,
) -> certificates.Run:
    """Runs a step once whose state is in variables, in a scope that keeps nothing."""
    found = certificates.Run(recording)

    def handed(gradients: list[Any], variables: list[Any], apply: Any) -> None:
        found.applies += 1
        if found.applies > 1:
            return
        if has_moved():
            raise moved
        gradients = [dense(gradient) for gradient in gradients]
        stop()
        found.keys = [key(gradient) for gradient in gradients if gradient is not None]
        found.gradients = [None if gradient is None else array(gradient) for gradient in gradients]
        found.dtypes = [keras.backend.standardize_dtype(variable.dtype) for variable in variables]
        if is_last:
            for variable, gradient in zip(variables, update or found.gradients, strict=True):
                if gradient is not None:
                    step = 0.01 * gradient / (np.max(np.abs(gradient), initial=0.0) + 1e-30)
                    variable.assign(variable.value - ops.convert_to_tensor(step, variable.dtype))

    def has_moved() -> bool:
        return any(id(variable) in overlay.assigned for variable in model.trainable_variables)

    seen = "it computes a gradient after it has changed weights in the same step."
    moved = own.refusal(model, seen, certificates.ONE_OPTIMIZER)
    scalars: list[Any] = []
    with (
        other_optimizers(model) as found.other_optimizers,
        fixed_statistics(model),
        full_precision(model),
        interception.Overlay(metric_state) as overlay,
        interception.weighed_scalars(model, share, kinds, scalars),
        interception.intercepted(model.optimizer, handed),
    ):
        try:
            logs = model.train_step(data)
        except (AttributeError, RuntimeError) as error:  # a weight that was assigned in this scope has no gradient
            if not has_moved():
                raise
            raise moved from error
    stop()
    found.scalars = [float(array(value)) for value in scalars]
    found.logs = [array(leaf) for leaf in tree.flatten(logs)]
    metrics = {id(one): one for metric in interception.metrics_of(model) for one in metric.variables}
    found.metric_state = [
        (one, overlay.state_mapping[key]) for key, one in metrics.items() if key in overlay.state_mapping
    ]
    found.metrics = {variable.path: array(value) for variable, value in found.metric_state}
    found.assigned = {
        variable.path: array(value)
        for variable, value in overlay.assigned.values()
        if id(variable) not in metrics and not interception.is_seed(variable)
    }
    return found


def changed_weights(values: list[Any], change: float) -> list[Any]:
    """Returns the values of weights, randomly changed by the factor `change`."""
    generator = np.random.default_rng(1)

    def changed(value: Any) -> Any:
        value = array(value)
        factor, shift = generator.normal(size=(2, *value.shape))
        return value * (1 + change * factor) + 0.1 * change * shift

    return [changed(value) for value in values] if change else values


@contextlib.contextmanager
def other_weights(model: Any, change: float) -> Iterator[None]:
    """Changes the weights by the factor `change` in the block."""
    variables = model.trainable_variables if change else []
    before = [ops.copy(variable.value) for variable in variables]
    for variable, value in zip(variables, changed_weights(before, change), strict=True):
        variable.assign(value)
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def array(value: Any) -> Any:
    """Returns a tensor on the host, in float64."""
    value = ops.convert_to_tensor(value)
    if keras.backend.backend() != "jax" and "float" in keras.backend.standardize_dtype(value.dtype):
        value = ops.cast(value, "float64")
    return np.asarray(ops.convert_to_numpy(value), "float64")
