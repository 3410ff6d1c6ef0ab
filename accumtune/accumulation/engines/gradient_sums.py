"""Sums gradients in TensorFlow variables, and orders the assignments of an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from accumtune.accumulation.patched_attributes import replaced

# Each replica has its own sum; the update adds these.
_PER_REPLICA = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}

# The place in memory of a sum with fewer elements does not matter.
SMALL = 2048

# The methods with which an optimizer of Keras changes its variables.
_ASSIGNMENTS = ("assign", "assign_add", "assign_sub")


def accumulator(variable: Any) -> Any:
    """Creates the sum for a variable's gradients: in float32, or in float64 if the variable is."""
    dtype = tf.float64 if variable.dtype == "float64" else tf.float32
    return tf.Variable(tf.zeros(variable.shape, dtype), trainable=False, name="accumulated_gradient", **_PER_REPLICA)


@contextlib.contextmanager
def one_variable_after_the_other(optimizers: list[Any], replicas: int) -> Iterator[None]:
    """Chains the assignments of an update. Otherwise TensorFlow starts all at once and holds all temporary values.

    How many it then holds is random: the peak of a step differed by a sixth from process to process, for a model with
    one dominant weight.
    """
    if replicas > 1:  # the operations of several devices cannot be distinguished here
        yield
        return
    before: list[Any] = []
    with contextlib.ExitStack() as changed:
        for optimizer in optimizers:
            changed.enter_context(_chained(optimizer, before))
        yield


def _chained(optimizer: Any, before: list[Any]) -> contextlib.AbstractContextManager[None]:
    """Makes each assignment of the optimizer wait for `before`, the last assignments, and replace them."""
    own_decay, own_step = optimizer._apply_weight_decay, optimizer.update_step

    def waiting() -> Any:
        graph = tf.compat.v1.get_default_graph()
        return tf.control_dependencies([op for op in before if op.graph is graph])  # tf.cond has graphs of its own

    def assigned(call: Any, *args: Any, **kwargs: Any) -> None:
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        call(*args, **kwargs)
        before[:] = [op for op in graph.get_operations()[first:] if "Assign" in op.type] or before

    def apply_weight_decay(variables: Any) -> None:
        for variable in variables:
            with waiting():
                assigned(own_decay, [variable])

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        with contextlib.ExitStack() as chain:

            def chained(assign: Any) -> Any:
                def assign_and_wait(*args: Any, **kwargs: Any) -> None:
                    assigned(assign, *args, **kwargs)
                    chain.enter_context(waiting())

                return assign_and_wait

            chain.enter_context(waiting())
            with replaced(optimizer, {name: chained(getattr(optimizer, name)) for name in _ASSIGNMENTS}):
                own_step(gradient, variable, learning_rate)

    return replaced(optimizer, {"_apply_weight_decay": apply_weight_decay, "update_step": update_step})


def put(total: Any, gradient: Any, *, in_place: bool) -> None:
    """Stores a gradient as the sum; `in_place`: in the sum's own memory.

    A plain assignment takes over the gradient's memory, which lies between activations and fragments the memory for the
    next forward pass. TensorFlow's allocator may waste half of each fragment: the peak of a CNN was 15 % higher, and
    differed from process to process.
    """
    gradient = tf.cast(tf.convert_to_tensor(gradient), total.dtype)
    if _is_small(total) or not in_place:
        total.assign(gradient)
    else:
        _copy(gradient, total)


def clear(totals: Iterable[Any], *, in_place: bool) -> None:
    """Makes sums zero, one after the other; `in_place`: in their own memory.

    TensorFlow turns `tf.zeros` into a constant, which a function keeps beside the sums from then on.
    """
    before: list[Any] = []
    for total in totals:
        with tf.control_dependencies(before):
            if _is_small(total) or not in_place:
                total.assign(tf.zeros_like(total))
            else:
                before = [_copy(tf.raw_ops.Empty(shape=total.shape, dtype=total.dtype, init=True), total)]


def _is_small(total: Any) -> bool:
    return not total.shape.rank or total.shape.num_elements() < SMALL


def _copy(value: Any, total: Any) -> Any:
    """Copies a tensor into a variable's memory; returns the operation."""
    rank = total.shape.rank
    everything = {"begin_mask": 2**rank - 1, "end_mask": 2**rank - 1}
    nothing = {"ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0}
    zeros, ones = [0] * rank, [1] * rank
    copied = tf.raw_ops.ResourceStridedSliceAssign(
        ref=total.handle, begin=zeros, end=zeros, strides=ones, value=value, **everything, **nothing
    )
    # That operation makes later reads copy the variable, unless it is told not to.
    tf.raw_ops.DisableCopyOnRead(resource=total.handle)
    return copied


def add(weight: Any, total: Any, gradient: Any) -> None:
    """Adds a gradient to its sum, in the sum's dtype."""
    if getattr(weight, "overwrite_with_gradient", False):  # not a gradient but a new value (float8 scales)
        total.assign(tf.cast(gradient, total.dtype))
    elif isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, total.dtype)
        _of_this_replica(total).scatter_add(tf.IndexedSlices(values, gradient.indices, gradient.dense_shape))
    else:
        total.assign_add(tf.cast(gradient, total.dtype))


def _of_this_replica(total: Any) -> Any:
    """Returns this replica's variable of a sum, because a distributed variable does not take slices."""
    context = tf.distribute.get_replica_context()
    copies = context.strategy.experimental_local_results(total)
    return copies[int(tf.get_static_value(context.replica_id_in_sync_group))] if len(copies) > 1 else total
