"""Variables of TensorFlow: sums of gradients, and the order in which an optimizer takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from accumtune.accumulation.patched_attributes import replaced

# Each replica adds up its own; they are put together at the update.
_PER_REPLICA = {
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}

# A sum of fewer numbers is lost among the small chunks of memory wherever it lies.
SMALL = 2048

# How an optimizer of Keras changes its variables.
_ASSIGNMENTS = ("assign", "assign_add", "assign_sub")


def accumulator(variable: Any) -> Any:
    """A sum for the gradients of a variable: in float32, whatever less the variable has."""
    dtype = tf.float64 if variable.dtype == "float64" else tf.float32
    return tf.Variable(tf.zeros(variable.shape, dtype), trainable=False, name="accumulated_gradient", **_PER_REPLICA)


@contextlib.contextmanager
def one_variable_after_the_other(optimizers: list[Any], replicas: int) -> Iterator[None]:
    """Chains the assignments of an update: else TensorFlow begins all at once, with the temporary values of all.

    How many it would hold then is chance: the peak of a step differed by a sixth from process to process, where one
    weight makes most of a model.
    """
    if replicas > 1:  # the updates of several devices cannot be told apart here
        yield
        return
    before: list[Any] = []
    with contextlib.ExitStack() as changed:
        for optimizer in optimizers:
            changed.enter_context(_chained(optimizer, before))
        yield


def _chained(optimizer: Any, before: list[Any]) -> contextlib.AbstractContextManager[None]:
    """While open, what the optimizer assigns waits for `before`, the last assignments, and takes their place."""
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
    """Makes a gradient the sum, `in_place` in the sum's own memory.

    An assignment takes the gradient's memory instead, which lies between activations: the sums come to lie in
    the middle of what the next forward pass needs in one piece. TensorFlow's allocator hands out the pieces that are
    left with up to half of each wasted: the peak of a CNN was 15 % higher, and another one in each process.
    """
    gradient = tf.cast(tf.convert_to_tensor(gradient), total.dtype)
    rank = gradient.shape.rank
    if not rank or total.shape.num_elements() < SMALL or not in_place:
        total.assign(gradient)
        return
    everything = {"begin_mask": 2**rank - 1, "end_mask": 2**rank - 1}
    nothing = {"ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 0}
    zeros, ones = [0] * rank, [1] * rank
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=total.handle, begin=zeros, end=zeros, strides=ones, value=gradient, **everything, **nothing
    )
    # It expects to be called again, and would have each reading copy the variable.
    tf.raw_ops.DisableCopyOnRead(resource=total.handle)


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
    """A sum of several replicas is one variable for each of them, and together these do not take slices."""
    context = tf.distribute.get_replica_context()
    copies = context.strategy.experimental_local_results(total)
    return copies[int(tf.get_static_value(context.replica_id_in_sync_group))] if len(copies) > 1 else total
