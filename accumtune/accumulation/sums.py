"""Variables of TensorFlow: sums of gradients, and the order in which an optimizer takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Each replica adds up its own; they are put together at the update.
_PER_REPLICA = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


def accumulator(variable: Any) -> Any:
    """A sum for the gradients of a variable: in float32, whatever less the variable has."""
    dtype = tf.float64 if variable.dtype == "float64" else tf.float32
    return tf.Variable(tf.zeros(variable.shape, dtype), trainable=False, name="accumulated_gradient", **_PER_REPLICA)


@contextlib.contextmanager
def one_variable_after_the_other(optimizer: Any, replicas: int) -> Iterator[None]:
    """Chains the updates of the variables: else TensorFlow begins all at once, with the temporary values of all."""
    if replicas > 1:  # the updates of several devices cannot be told apart here
        yield
        return
    own = optimizer.update_step
    before: list[Any] = []

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        with tf.control_dependencies([op for op in before if op.graph is graph]):  # tf.cond has graphs of its own
            own(gradient, variable, learning_rate)
        before[:] = [op for op in graph.get_operations()[first:] if "Assign" in op.type]

    object.__setattr__(optimizer, "update_step", update_step)
    try:
        yield
    finally:
        object.__delattr__(optimizer, "update_step")


def add(weight: Any, total: Any, gradient: Any) -> None:
    """Adds a gradient to its sum, in the sum's dtype."""
    if getattr(weight, "overwrite_with_gradient", False):  # not a gradient but a new value (float8 scales)
        total.assign(tf.cast(gradient, total.dtype))
    elif isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, total.dtype)
        total.scatter_add(tf.IndexedSlices(values, gradient.indices, gradient.dense_shape))
    else:
        total.assign_add(tf.cast(gradient, total.dtype))
