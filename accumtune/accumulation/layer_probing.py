"""Does a user's layer look at the batch as a whole, or keep state? It is asked with random numbers in place of a proof.

What is called is a whole layer (or a model that is more than its layers) on four samples, together and in parts,
within a `StatelessScope`: no variable changes, and seeds start anew in every scope.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STATE = "changes variables of its own in every forward pass, hence several times per update."
NOT_ALONE = "gives each sample a result that depends on the others in its micro-batch."

# Made by arithmetic between tensors (`x + shortcut`): an entry of the result depends on these entries alone.
_ELEMENTWISE = frozenset(
    "Absolute Add Cast Clip Divide Exp Gelu Log Maximum Minimum Multiply Negative Relu Sigmoid Silu Sqrt Square "
    "Subtract Tanh TrueDivide".split()
)
_WHOLE = slice(0, 4)
_PARTS = (slice(0, 2), slice(2, 4))


def has_code_of_the_user(layer: Any) -> bool:
    """Whether this layer or model does more than Keras's own layers, which are known."""
    import keras

    if isinstance(layer, keras.layers.Lambda):
        return True
    if type(layer).__module__.startswith(("keras.", "keras_hub.")):
        operations = getattr(layer, "operations", None) or []
        return any(
            not isinstance(operation, keras.Layer) and type(operation).__name__ not in _ELEMENTWISE
            for operation in operations
        )
    return True


def why_coupled(layer: Any) -> str:
    """Why the results of micro-batches do not make the result of their batch; "" where they do or cannot be tried.

    A layer can be tried once it is built, where it has one input (in a Functional model: any).
    """
    from keras import tree

    called_with = _four_samples(layer)
    if called_with is None:
        return ""

    def results(part: slice, training: bool) -> tuple[list[Any], bool, bool]:
        args, kwargs = tree.map_structure(lambda leaf: leaf[part] if _is_array(leaf) else leaf, called_with)
        return _called(layer, args, kwargs, training)

    try:
        whole, changes_state, is_random = results(_WHOLE, training=True)
        if changes_state:
            return STATE
        training = not is_random
        if is_random:  # dropout: what it drops depends on the shape
            whole, _, is_random = results(_WHOLE, training)
        parts = [results(part, training)[0] for part in _PARTS]
    except Exception:  # a user's layer may want what cannot be made up here: other numbers, shapes or arguments
        return ""
    if is_random:
        return ""
    return "" if all(_equal(*values) for values in zip(whole, *parts, strict=True)) else NOT_ALONE


def _four_samples(layer: Any) -> tuple[tuple, dict[str, Any]] | None:
    """Random arguments for a call of `layer`, or None where it is not known what it takes."""
    from keras import KerasTensor, tree

    generator = np.random.default_rng(0)

    def array(shape: tuple[int | None, ...], dtype: str) -> Any:
        sizes = (4, *(8 if size is None else size for size in shape[1:]))
        if "float" in str(dtype):
            return generator.uniform(0.1, 0.9, sizes).astype("float32")
        return generator.integers(0, 2, sizes, "int32")

    def drawn(leaf: Any) -> Any:
        return array(leaf.shape, leaf.dtype) if isinstance(leaf, KerasTensor) else leaf

    if getattr(layer, "operations", None) and getattr(layer, "_inputs_struct", None) is not None:
        known: Any = ((layer._inputs_struct,), {})
    elif layer._inbound_nodes:
        known = (layer._inbound_nodes[0].arguments.args, layer._inbound_nodes[0].arguments.kwargs)
    elif layer.built and len(layer._build_shapes_dict or {}) == 1:
        (shapes,) = layer._build_shapes_dict.values()
        # Of whatever batch it was built with.
        tensors = tree.map_shape_structure(lambda shape: KerasTensor((None, *shape[1:]), layer.compute_dtype), shapes)
        known = ((tensors,), {})
    else:
        return None
    tensors = [leaf for leaf in tree.flatten(known) if isinstance(leaf, KerasTensor)]
    if not tensors or any(not tensor.shape or tensor.shape[0] is not None for tensor in tensors):
        return None  # a batch of fixed size has no parts
    return tree.map_structure(drawn, known)


def _called(layer: Any, args: tuple, kwargs: dict[str, Any], training: bool) -> tuple[list[Any], bool, bool]:
    """The results, whether the call changed a weight, and whether it would give other results the next time."""
    import keras
    from keras import ops, tree

    def tensor(leaf: Any) -> Any:
        return ops.convert_to_tensor(leaf) if _is_array(leaf) else leaf

    args, kwargs = tree.map_structure(tensor, (args, kwargs))
    if layer._call_has_training_arg:
        kwargs = kwargs | {"training": training}
    with keras.StatelessScope() as scope:
        once, again = (tree.flatten(layer(*args, **kwargs)) for _ in range(2))
        changes_state = any(scope.get_current_value(weight) is not None for weight in layer.weights)
    once, again = ([ops.convert_to_numpy(ops.cast(leaf, "float32")) for leaf in leaves] for leaves in (once, again))
    is_random = not all(np.array_equal(one, other) for one, other in zip(once, again, strict=True))
    return once, changes_state, is_random


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)


def _equal(whole: np.ndarray, *parts: np.ndarray) -> bool:
    if not whole.ndim:  # a number of the whole batch
        return False
    together = np.concatenate(parts)
    scale = float(np.max(np.abs(whole), initial=0.0))
    return together.shape == whole.shape and np.allclose(whole, together, rtol=0, atol=1e-4 * scale + 1e-6)
