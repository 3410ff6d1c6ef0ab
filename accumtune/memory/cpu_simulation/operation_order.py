"""Gives the operations of a TensorFlow graph one order, the same in every process and at every micro-batch size.

TensorFlow runs ready operations in the order of its graph's edges, which it keeps by their addresses, so the order
differs from process to process. With it differs the moment at which an activation is freed, and so the peak of a step.
Where memory is measured (`accumtune.memory`), each operation of a step therefore waits for the one before. This
includes operations on scalars: in another order, a long-lived small tensor takes another place, which large activations
then cannot use.

The order is that of tracing, except that an operation that frees as many tensors as it makes runs as soon as it can:
for example, a gradient is added to its sum before the next one is computed.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation.patched_attributes import replaced

# Freeing a smaller tensor is no reason to run an operation early. The first dimension may be the number of samples,
# and the order must be the same for any number of them.
LARGE_ELEMENTS = 16384
LARGE_ELEMENTS_PER_SAMPLE = 256
# Operations whose outputs exist before and after the step.
_PERMANENT = frozenset({"Const", "Placeholder", "ReadVariableOp"})
# Operations whose output shares the memory of the input. A convolution's bias comes this way.
_VIEWS = frozenset({"ExpandDims", "Identity", "Reshape", "Squeeze", "StopGradient"})
# In a graph that creates variables, such as an optimizer's slots, from values that are computed before the graph runs.
_OF_NEW_VARIABLES = frozenset({"VarHandleOp", "VarIsInitializedOp"})


def compiled(function: Any, compile: Callable[[Any], Any]) -> Any:
    """Returns `compile(function)` with its operations in order."""
    return _Ordered(compile(_in_order(function)), compile(function))


def make_test_function(model: Any, force: bool = False) -> Any:
    """Replaces `keras.Model.make_test_function`, so that validation's operations are in order too."""
    make = functools.partial(type(model).make_test_function, model)
    if model.jit_compile or (model.test_function is not None and not force):
        return make(force=force)

    def compile(test_step: Any) -> Any:
        with replaced(model, {"test_step": test_step}):
            make(force=True)
        return model.test_function

    model.test_function = compiled(model.test_step, compile)


def _in_order(function: Any) -> Any:
    def in_order(*args: Any) -> Any:
        results = function(*args)
        if not tf.executing_eagerly():
            put_in_order(tf.compat.v1.get_default_graph(), results)
        return results

    return tf.autograph.experimental.do_not_convert(in_order)


class _Ordered:
    """A function with its operations in order, unless TensorFlow cannot run it in this order."""

    def __init__(self, ordered: Any, plain: Any) -> None:
        self._ordered = ordered
        self._plain = plain

    def __call__(self, *args: Any) -> Any:
        try:
            return self._ordered(*args)
        except tf.errors.InvalidArgumentError as error:
            # TensorFlow has fused two operations, and one between them now waits for itself. Nothing has run yet.
            if "nodes in a cycle" not in str(error):
                raise
            self._ordered = self._plain
            return self._ordered(*args)

    def get_concrete_function(self, *args: Any) -> Any:
        return self._ordered.get_concrete_function(*args)


def put_in_order(graph: Any, results: Any) -> None:
    """Makes each operation of a graph that is being traced wait for the one before.

    Args:
        graph: with all operations of the function.
        results: the function's return value.
    """
    operations = graph.get_operations()
    if any(op._control_flow_context is not None or op.type in _OF_NEW_VARIABLES for op in operations):
        return  # TensorFlow 1's loops, or variables that do not exist yet
    waits_for = _dependencies(operations)
    wanted = [tensor.op for tensor in tree.flatten(results) if isinstance(tensor, tf.Tensor) and tensor.graph is graph]
    needed = _needed(operations, waits_for, wanted)
    previous = None
    for op in _sequence([op for op in operations if op in needed], waits_for):
        if op.type in ("Placeholder", "NoOp") or op.type in _VIEWS or _may_be_merged(op):
            continue
        if previous is not None and all(previous is not tensor.op for tensor in op.inputs):
            op._add_control_input(previous)
        previous = op


def _sequence(operations: Sequence[Any], waits_for: dict[Any, set[Any]]) -> list[Any]:
    """Returns the operations in order: each after its dependencies, eager ones as soon as possible, others as traced.

    An eager operation frees as many tensors as it makes. Assignments come before all others, because the values that
    they consume would pile up meanwhile.
    """
    place = {op: index for index, op in enumerate(operations)}
    left = {op: len([other for other in waits_for[op] if other in place]) for op in operations}
    waiters: dict[Any, list[Any]] = defaultdict(list)
    readers: dict[Any, set[Any]] = defaultdict(set)
    for op in operations:
        for other in waits_for[op]:
            waiters[other].append(op)
        for tensor in op.inputs:
            readers[tensor.ref()].add(op)
    ready: list[tuple[bool, int]] = []
    eager: list[tuple[bool, int]] = []

    def offer(op: Any) -> None:
        inputs = {tensor.ref(): tensor for tensor in op.inputs}
        given_back = sum(_is_large(tensor) and len(readers[ref]) == 1 for ref, tensor in inputs.items())
        is_eager = sum(map(_is_large, op.outputs)) <= given_back
        heapq.heappush(eager if is_eager else ready, (is_eager and not _is_end(op), place[op]))

    for op in operations:
        if not left[op]:
            offer(op)
    order: list[Any] = []
    done: set[Any] = set()
    while eager or ready:
        op = operations[heapq.heappop(eager or ready)[1]]
        if op in done:
            continue
        done.add(op)
        order.append(op)
        for waiter in waiters[op]:
            left[waiter] -= 1
            if not left[waiter]:
                offer(waiter)
        for ref in {tensor.ref() for tensor in op.inputs}:
            readers[ref].discard(op)
            for last in readers[ref] if len(readers[ref]) == 1 else ():
                if not left[last]:
                    offer(last)  # again: it may be eager now
    return order


def _dependencies(operations: Sequence[Any]) -> dict[Any, set[Any]]:
    """Returns the dependencies of each operation: its inputs, and the last operation with the same resource or state.

    TensorFlow itself adds fewer of the latter, at the end of tracing.
    """
    last: dict[Any, Any] = {}
    waits_for = {}
    for op in operations:
        waits_for[op] = {tensor.op for tensor in op.inputs} | set(op.control_inputs)
        states: list[Any] = [tensor.ref() for tensor in op.inputs if tensor.dtype in (tf.resource, tf.variant)]
        if op._is_stateful and not states and op.type != "Placeholder":
            states = [None]
        waits_for[op] |= {last[state] for state in states if state in last} - {op}
        last |= dict.fromkeys(states, op)
    return waits_for


def _needed(operations: Sequence[Any], waits_for: dict[Any, set[Any]], wanted: Sequence[Any]) -> set[Any]:
    """Returns what TensorFlow will run: stateful operations, the results, and their dependencies."""
    open_ones = [*wanted, *(op for op in operations if op._is_stateful and op.type not in _PERMANENT)]
    found: set[Any] = set()
    while open_ones:
        op = open_ones.pop()
        if op not in found:
            found.add(op)
            open_ones += waits_for[op]
    return found


def _is_end(op: Any) -> bool:
    """Returns whether an operation has no output, or one that is only assigned, such as a gradient times a share."""
    if op.outputs and op.type not in _VIEWS and op.type not in ("Cast", "Mul"):
        return False
    return all(_is_end(reader) for tensor in op.outputs for reader in tensor.consumers())


def _may_be_merged(op: Any) -> bool:
    """Returns whether oneDNN may fuse an operation with a neighbour; one between them would then wait for itself."""
    if op.type == "BiasAddGrad":
        neighbours = op.inputs[0].consumers()
    elif op.type in ("BiasAdd", "Pad", "Transpose"):
        neighbours = [op.inputs[0].op, *op.outputs[0].consumers()]
    else:
        return False
    return any("Conv" in other.type or "MatMul" in other.type for other in neighbours)


def _is_large(tensor: Any) -> bool:
    if tensor.op.type in _PERMANENT or tensor.dtype in (tf.resource, tf.variant, tf.string):
        return False
    if tensor.shape.rank is None:
        return True
    first, *others = [1 if dimension is None else dimension for dimension in tensor.shape] or [1]
    per_sample = math.prod(others)
    return per_sample >= LARGE_ELEMENTS_PER_SAMPLE or first * per_sample >= LARGE_ELEMENTS
