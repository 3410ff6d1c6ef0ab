"""Tests, on five samples, whether a user's layer couples the samples of a batch, or keeps state.

The layer (or a model that is more than its layers) is called within a `StatelessScope`, so that no variable changes and
seeds start again in every scope. Two samples must have the same results beside other samples; batches of one shape
draw the same noise. Without noise, parts of the batch must have the results of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

STATE = "changes variables of its own in every forward pass, hence several times per update."
NOT_ALONE = "gives each sample a result that depends on the others in its micro-batch."
ADDS_LOSS = "adds a loss of its own that is not a mean over samples."

# Operations between tensors (`x + shortcut`) in which an entry of the result depends only on the same entries.
_ELEMENTWISE = frozenset(
    "Absolute Add Cast Clip Divide Exp Gelu Log Maximum Minimum Multiply Negative Relu Sigmoid Silu Sqrt Square "
    "Subtract Tanh TrueDivide".split()
)
# Keras's layers that run code of the user's.
_FOREIGN = frozenset({"Lambda", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"})
# Keras's layers whose results depend on one another along their `axis`.
_ALONG_AN_AXIS = frozenset({"LayerNormalization", "RMSNormalization", "Softmax", "UnitNormalization"})
SAMPLES = 5  # rarely the size of another axis
_FREE_SIZES = (8, 2)  # for axes without a fixed size; a table of positions may be short
_FIRST, _REST = slice(0, 2), slice(2, SAMPLES)
_OTHERS = (0, 1, 0, 0, 1)  # the first two samples, beside others
_LARGE_ELEMENTS = 2**20
# The largest random number of each sample: they differ, and as tokens they are 0 and 1.
_LARGEST = (1.9, 0.5, 1.9, 1.2, 0.8)

# The arguments with which a layer was called: `(args, kwargs)`.
Call = tuple[tuple, dict[str, Any]]


def axes_in(axis: Any) -> tuple[int, ...]:
    """Returns the axes in an argument `axis`: an int, several, or None."""
    return () if axis is None else tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)


def may_have_samples(axis: Any) -> bool:
    """Returns whether `axis`, counted from the end, is the first one where there are few axes."""
    return any(one < -1 for one in axes_in(axis))


def has_code_of_the_user(layer: Any) -> bool:
    """Returns whether a layer or model must be tested: it runs other code than Keras's, or works along an axis.

    An axis counts where the number of axes decides whether it is that of the samples.
    """
    import keras

    if type(layer).__name__ in _FOREIGN or type(layer).__name__ in _ALONG_AN_AXIS and may_have_samples(layer.axis):
        return True
    if type(layer).__module__.startswith(("keras.", "keras_hub.")):
        operations = getattr(layer, "operations", None) or []
        return any(
            not isinstance(operation, keras.Layer) and type(operation).__name__ not in _ELEMENTWISE
            for operation in operations
        )
    return True


def recorded_calls(model: Any, x: Any = None) -> dict[int, Call]:
    """Runs `model` once and returns the arguments of each layer's call, by the layer's id; {} if it cannot run.

    Args:
        x: samples of the user's data, NumPy arrays. A model that is not built yet is built with them, as by a call.
            Without samples, or if the model does not take them (raw texts, which a task's `fit` prepares), random
            inputs are used if the shapes are known.
    """
    import keras

    calls: dict[int, Call] = {}
    given: list[Call] = [] if x is None else [((_five(x),), {})]
    for args, kwargs in [*given, *_made_up(model)]:
        try:
            if x is not None and not all(layer.built for layer in model._flatten_layers()):
                _invoked(model, args, kwargs, training=False)
            with _recording(model, calls), keras.StatelessScope(), _fixed_seeds(model):
                _invoked(model, args, kwargs, training=True)
        except Exception:  # a user's model may need other numbers, shapes or arguments
            calls.clear()
            continue
        break
    return calls


def why_coupled(layer: Any, call: Call | None = None) -> str | None:
    """Returns why a layer's results in micro-batches differ from the batch's; "" if they do not; None if unknown.

    Args:
        call: the arguments with five samples. None: random ones, if the shapes are known.
    """
    for args, kwargs in [call] if call else _made_up(layer):
        try:
            return _tried(layer, args, kwargs)
        except Exception:  # a user's layer may need other numbers, shapes or arguments
            continue
    return None


def _tried(layer: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    from keras import ops, tree

    def run(part: Callable[[Any], Any], training: bool, skip: int = 0) -> _Results:
        given, named = tree.map_structure(lambda leaf: part(leaf) if _has_samples(leaf) else leaf, (args, kwargs))
        return _run(layer, given, named, training, skip)

    def rows(part: slice) -> Callable[[Any], Any]:
        return lambda leaf: leaf[part]

    def same(leaf: Any) -> Any:
        return leaf

    whole = run(same, True)
    if whole.changes_state:
        return STATE
    if not whole.equals(run(same, True)):
        return None  # noise that no seed controls: nothing can be compared
    others = run(lambda leaf: ops.take(ops.convert_to_tensor(leaf), np.asarray(_OTHERS), axis=0), True)
    if not whole.agrees(others):
        return NOT_ALONE
    training = whole.equals(run(same, True, skip=1))
    if not training:  # dropout, whose mask depends on the shape
        losses, whole = len(whole.losses), run(same, False)
        if len(whole.losses) != losses:
            return None  # what is added in training alone depends on the mask
    parts = [run(rows(part), training) for part in (_FIRST, _REST)]
    if not whole.has_mean_losses(*parts):
        return ADDS_LOSS
    if not training and not whole.equals(run(same, False, skip=1)):
        return ""  # noise in inference too: only the losses can be compared
    return "" if whole.joins(*parts) else NOT_ALONE


class _Results:
    """The results of a call: outputs and losses as arrays, and whether it changed a weight."""

    def __init__(self, outputs: list[np.ndarray], losses: list[np.ndarray], changes_state: bool) -> None:
        self.outputs, self.losses, self.changes_state = outputs, losses, changes_state

    def equals(self, other: _Results) -> bool:
        pairs = zip([*self.outputs, *self.losses], [*other.outputs, *other.losses], strict=True)
        return all(_close(one, another) for one, another in pairs)

    def agrees(self, other: _Results) -> bool:
        """Returns whether the first two of five samples, and results that belong to no sample, are the same."""
        for one, another in zip(self.outputs, other.outputs, strict=True):
            axis = _axis_of_samples(one)
            if axis is not None:
                first = range(one.shape[axis] // SAMPLES * 2)
                one, another = np.take(one, first, axis), np.take(another, first, axis)
            if not _close(one, another):
                return False
        return True

    def joins(self, first: _Results, rest: _Results) -> bool:
        """Returns whether the results of two parts together are those of the whole."""
        for whole, *parts in zip(self.outputs, first.outputs, rest.outputs, strict=True):
            axis = _axis_of_samples(whole)
            if axis is None:
                if not all(_close(whole, part) for part in parts):
                    return False
            elif any(part.ndim != whole.ndim for part in parts) or not _close(whole, np.concatenate(parts, axis)):
                return False
        return True

    def has_mean_losses(self, first: _Results, rest: _Results) -> bool:
        if not len(self.losses) == len(first.losses) == len(rest.losses):
            return False
        return all(
            _close(whole, (2 * one + (SAMPLES - 2) * other) / SAMPLES, tolerance=1e-5)
            for whole, one, other in zip(self.losses, first.losses, rest.losses, strict=True)
        )


def _run(layer: Any, args: tuple, kwargs: dict[str, Any], training: bool, skip: int) -> _Results:
    """Calls the layer in a scope of its own, after `skip` other calls, so that it draws other noise."""
    import keras
    from keras import ops, tree

    def array(leaf: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(ops.cast(leaf, "float32")))

    with (
        keras.StatelessScope(state_mapping=_in_general_position(layer), collect_losses=True) as scope,
        _fixed_seeds(layer),
    ):
        before = [scope.get_current_value(weight) for weight in layer.weights]
        for _ in range(skip + 1):
            scope.losses.clear()
            outputs = _invoked(layer, args, kwargs, training)
        changed = [
            scope.get_current_value(weight) is not value for weight, value in zip(layer.weights, before, strict=True)
        ]
        losses = [array(loss) for loss in scope.losses]
    leaves = [leaf for leaf in tree.flatten(outputs) if leaf is not None]
    return _Results([array(leaf) for leaf in leaves], losses, any(changed))


def _invoked(layer: Any, args: tuple, kwargs: dict[str, Any], training: bool) -> Any:
    from keras import ops, tree

    def tensor(leaf: Any) -> Any:
        return ops.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf

    args, kwargs = tree.map_structure(tensor, (args, kwargs))
    if layer._call_has_training_arg:
        kwargs = kwargs | {"training": training}
    return layer(*args, **kwargs)


def _in_general_position(layer: Any) -> list[tuple[Any, Any]]:
    """Returns random values for weights that are all zeros or all ones, which could hide an effect."""
    from keras import ops

    generator = np.random.default_rng(0)
    mapping = []
    for weight in layer.trainable_weights:
        if len(weight.shape) and np.prod(weight.shape) <= _LARGE_ELEMENTS and "float" in str(weight.dtype):
            value = np.asarray(ops.convert_to_numpy(ops.cast(weight.value, "float32")))
            if value.size and np.ptp(value) == 0:
                drawn = value + generator.uniform(-0.5, 0.5, value.shape)
                mapping.append((weight, ops.cast(ops.convert_to_tensor(drawn, "float32"), weight.dtype)))
    return mapping


@contextlib.contextmanager
def _recording(model: Any, calls: dict[int, Call]) -> Iterator[None]:
    def noting(layer: Any) -> Callable[..., Any]:
        call = layer.call

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(id(layer), (args, kwargs))
            return call(*args, **kwargs)

        return noted

    layers = [layer for layer in model._flatten_layers(include_self=True) if "call" not in vars(layer)]
    for layer in layers:
        object.__setattr__(layer, "call", noting(layer))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


@contextlib.contextmanager
def _fixed_seeds(layer: Any) -> Iterator[None]:
    """Starts generators outside of Keras from the same seed; restores them and torch's buffers afterwards."""
    import keras
    from keras.src.random.seed_generator import global_seed_generator

    global_seed_generator()  # it cannot be created within a scope
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            stack.callback(lambda: [buffer.copy_(value) for buffer, value in buffers])
        if keras.backend.backend() == "tensorflow":
            stack.enter_context(_fixed_seeds_of_tensorflow())
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@contextlib.contextmanager
def _fixed_seeds_of_tensorflow() -> Iterator[None]:
    import tensorflow as tf
    from tensorflow.python.eager import context

    eager = context.context()
    seed, generator = eager._seed, eager._rng if eager._seed is not None else None
    state = generator.getstate() if generator else None
    tf.random.set_seed(0)
    try:
        yield
    finally:
        eager._set_global_seed(seed)
        if state:
            eager._rng.setstate(state)


def _made_up(layer: Any) -> Iterator[Call]:
    """Yields random arguments for a call of `layer`, if its input shapes are known."""
    from keras import KerasTensor, tree

    generator = np.random.default_rng(0)

    def array(shape: tuple[int | None, ...], dtype: str, free: int) -> Any:
        sizes = (SAMPLES, *(free if size is None else size for size in shape[1:]))
        if "float" in str(dtype):
            largest = np.reshape(_LARGEST, (SAMPLES, *[1] * (len(sizes) - 1)))
            return generator.uniform(0.1, largest, sizes).astype("float32")
        return generator.integers(0, 2, sizes, "int32")

    def drawn(free: int, leaf: Any) -> Any:
        return array(leaf.shape, leaf.dtype, free) if isinstance(leaf, KerasTensor) else leaf

    if getattr(layer, "operations", None) and getattr(layer, "_inputs_struct", None) is not None:
        known: list[Any] = [((layer._inputs_struct,), {})]
    elif layer._inbound_nodes:
        arguments = layer._inbound_nodes[0].arguments
        known = [(arguments.args, arguments.kwargs)]
    elif layer.built and len(layer._build_shapes_dict or {}) == 1:
        (shapes,) = layer._build_shapes_dict.values()

        def tensors(dtype: str) -> Any:  # with any batch size
            return tree.map_shape_structure(lambda shape: KerasTensor((None, *shape[1:]), dtype), shapes)

        known = [((tensors(dtype),), {}) for dtype in (layer.compute_dtype, "int32")]
    else:
        return
    for call in known:
        leaves = [leaf for leaf in tree.flatten(call) if isinstance(leaf, KerasTensor)]
        if leaves and all(leaf.shape and leaf.shape[0] is None for leaf in leaves):  # a fixed batch has no parts
            for free in _FREE_SIZES if any(None in leaf.shape[1:] for leaf in leaves) else _FREE_SIZES[:1]:
                yield tree.map_structure(functools.partial(drawn, free), call)


def _five(x: Any) -> Any:
    """Returns five samples of NumPy arrays, repeated if there are fewer."""
    from keras import tree

    return tree.map_structure(lambda leaf: np.resize(leaf[:SAMPLES], (SAMPLES, *leaf.shape[1:])), x)


def _has_samples(leaf: Any) -> bool:
    shape = getattr(leaf, "shape", None)
    return bool(shape is not None and len(shape) and shape[0] == SAMPLES)


def _axis_of_samples(array: np.ndarray) -> int | None:
    """Returns the axis of five samples, or of several entries for each; None if there is none."""
    if array.ndim and array.shape[0] and array.shape[0] % SAMPLES == 0:
        return 0
    return array.shape.index(SAMPLES) if SAMPLES in array.shape else None


def _close(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-4) -> bool:
    if one.shape != other.shape:
        return False
    scale = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
    return np.allclose(one, other, rtol=0, atol=tolerance * scale + 1e-6, equal_nan=True)
