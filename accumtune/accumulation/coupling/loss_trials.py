"""Tests, on random numbers and on the user's data, whether a user's loss couples the samples of a batch.

Numbers between 0 and 1 would never be a missing target. So the targets also get values that mark a missing one (NaN,
-1, and the numbers in the function's own code), in unequal parts of the samples.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

UNKNOWN = "could not be tested, and may depend on which samples share a micro-batch: unknown."
NO_MEAN = "gives one number per micro-batch that is not a mean over samples."
NO_SUM = "gives one number per micro-batch that is not a sum over samples."
NOT_ALONE = "gives each sample a value that depends on the others in its micro-batch."

_PARTS = (slice(0, 4), slice(0, 2), slice(2, 4), slice(0, 1), slice(1, 4))
# The share of each of four samples that is marked: a ratio over the batch then has another denominator in each part.
_MARKED = (0.0, 1.0, 0.6, 0.3)
_USUAL_MARKS = (float("nan"), 0.0, 1.0, -1.0, 2.0, -100.0, 255.0)
_MOST_MARKS = 24
_MOST_NUMBERS = 2**18

Pair = tuple[Any, Any]


def why_coupled(
    values: Callable[[Any, Any], Any],
    is_sum: bool = False,
    *,
    code: Any = None,
    shapes: Sequence[tuple[int | None, ...]] = (),
    seen: Sequence[Pair] = (),
) -> str:
    """Returns why the losses of micro-batches do not combine to the loss of their batch; "" if they do.

    Args:
        values: from `(y_true, y_pred)` to losses: one per sample (or finer), or one number.
        is_sum: whether the numbers of micro-batches are summed instead of averaged.
        code: the function or object whose code may contain numbers that mark a missing target.
        shapes: of the model's outputs, if they are known.
        seen: four or more samples of the user's targets, with the model's predictions.
    """
    marks = list(itertools.islice(dict.fromkeys([*_numbers_in(code), *_USUAL_MARKS]), _MOST_MARKS))
    # A label out of range raises an exception on a CPU; on a GPU it would make the GPU unusable for this process.
    for device, has_variants in ((_host(), True), (contextlib.nullcontext(), False)):
        with device:
            for y_true, y_pred in [*_four_each(seen), *_four_samples(shapes)]:
                reason = _tried(values, y_true, y_pred, is_sum)
                if reason is None:  # a user's function may need other shapes or labels, which may come next
                    continue
                variants = _variants(y_true, y_pred, marks) if has_variants else ()
                reasons = (_tried(values, *variant, is_sum) for variant in variants)
                return reason or next((found for found in reasons if found), "")
    return UNKNOWN


def _tried(values: Callable[[Any, Any], Any], y_true: Any, y_pred: Any, is_sum: bool) -> str | None:
    """Returns the answer of `why_coupled` for these samples; None if they do not decide it."""
    try:
        whole = _computed(values, y_true, y_pred)
        if not whole.ndim and not np.isfinite(whole):
            return None
        parts = [_computed(values, *_rows((y_true, y_pred), part)) for part in _PARTS[1:]]
    except Exception:  # whatever a user's function raises for numbers that it cannot use
        return None
    if whole.ndim == 0:
        weights = [[1, 1], [1, 1]] if is_sum else [[0.5, 0.5], [0.25, 0.75]]
        halves, uneven = np.dot(weights[0], parts[:2]), np.dot(weights[1], parts[2:])
        return "" if _equal(whole, halves) and _equal(whole, uneven) else NO_SUM if is_sum else NO_MEAN
    together = [_joined(pair, whole) for pair in (parts[:2], parts[2:])]
    return "" if all(one.shape == whole.shape and _equal(whole, one) for one in together) else NOT_ALONE


def _joined(parts: list[Any], whole: Any) -> Any:
    fit = all(part.ndim and part.shape[1:] == whole.shape[1:] for part in parts)
    return np.concatenate(parts) if fit else whole[:0]


def _four_samples(shapes: Sequence[tuple[int | None, ...]]) -> Iterator[Pair]:
    """Yields targets and predictions, in the shapes of the model's outputs and in those that losses usually take."""
    import keras

    generator = np.random.default_rng(0)
    known = [tuple(4 if size is None else size for size in (4, *shape[1:])) for shape in shapes]
    known = [shape for shape in known if math.prod(shape) <= _MOST_NUMBERS]
    for shape in dict.fromkeys([*known, (4, 3), (4, 3, 2), (4, 4, 4, 3), (4, 1)]):
        y_true, y_pred = generator.uniform(0.1, 0.9, (2, *shape)).astype(keras.config.floatx())
        yield y_true, y_pred
        for labels in dict.fromkeys([shape[:-1], (4,), (*shape[:-1], 1)]):
            yield (np.arange(np.prod(labels, dtype=int)) % 2).reshape(labels).astype("int32"), y_pred


def _four_each(seen: Sequence[Pair]) -> Iterator[Pair]:
    """Yields the user's samples, four at a time, at most four times."""
    from keras import tree

    for y_true, y_pred in seen:
        samples = len(tree.flatten(y_true)[0])
        if any(leaf.size > _MOST_NUMBERS * samples // 4 for leaf in tree.flatten((y_true, y_pred))):
            continue
        for start in list(range(0, samples - 3, 4))[:4]:
            yield _rows((y_true, y_pred), slice(start, start + 4))


def _variants(y_true: Any, y_pred: Any, marks: Sequence[float]) -> Iterator[Pair]:
    """Yields the same samples with missing or rare targets, and with extreme predictions."""
    from keras import tree

    generator = np.random.default_rng(1)

    def marked(array: np.ndarray, value: float, part: Sequence[float]) -> np.ndarray:
        where = generator.uniform(size=array.shape) < np.reshape(part, (4, *[1] * (array.ndim - 1)))
        return np.where(where, np.asarray(value, array.dtype), array)

    def fits(array: np.ndarray, value: float) -> bool:
        return array.dtype.kind == "f" or (value == int(value) if np.isfinite(value) else False)

    for value in marks:
        if all(fits(leaf, value) for leaf in tree.flatten(y_true)):
            yield tree.map_structure(lambda leaf, value=value: marked(leaf, value, _MARKED), y_true), y_pred

    def binary(leaf: np.ndarray) -> np.ndarray:
        return marked(np.zeros_like(leaf), 1, (0.2, 0.9, 0.5, 0.0))

    yield tree.map_structure(binary, y_true), y_pred
    yield y_true, tree.map_structure(lambda leaf: generator.uniform(-3, 3, leaf.shape).astype(leaf.dtype), y_pred)
    for value in (0.0, 1.0):
        yield y_true, tree.map_structure(lambda leaf, value=value: marked(leaf, value, _MARKED), y_pred)


def _numbers_in(code: Any, depth: int = 3) -> list[float]:
    """Returns the numbers in a function or an object: constants, closures, globals, attributes."""
    if isinstance(code, bool) or code is None or depth < 0:
        return []
    if isinstance(code, (int, float, np.number)):
        return [float(code)]
    if isinstance(code, types.CodeType):
        inner = [item for constant in code.co_consts for item in _numbers_in(constant, depth)]
        # With their negatives: `-1` may be compiled as 1 and a minus.
        return inner + [-value for value in inner]
    if isinstance(code, types.MethodType):
        return _numbers_in(code.__func__, depth) + _numbers_in(code.__self__, depth - 1)
    if isinstance(code, types.FunctionType):
        if _is_library(code):
            return []
        cells = [cell.cell_contents for cell in code.__closure__ or () if _is_filled(cell)]
        named = [code.__globals__.get(name) for name in code.__code__.co_names]
        used = [*cells, *(code.__defaults__ or ()), *(code.__kwdefaults__ or {}).values(), *named]
        return _numbers_in(code.__code__, depth) + [item for one in used for item in _numbers_in(one, depth - 1)]
    if isinstance(code, type):
        return [] if _is_library(code) else [float(one) for one in vars(code).values() if type(one) in (int, float)]
    if hasattr(code, "__dict__") and not isinstance(code, types.ModuleType):
        kept = [item for one in vars(code).values() for item in _numbers_in(one, depth - 1)]
        methods = [getattr(type(code), name, None) for name in ("call", "__call__", "update_state")]
        return kept + [item for one in methods for item in _numbers_in(one, depth - 1)]
    return []


def _is_library(code: Any) -> bool:
    return str(code.__module__).partition(".")[0] in ("builtins", "jax", "keras", "numpy", "tensorflow", "torch")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _rows(pair: Any, part: slice) -> Any:
    from keras import tree

    return tree.map_structure(lambda leaf: leaf[part], pair)


def _host() -> Any:
    import keras

    try:
        return keras.device("cpu:0")
    except Exception:  # JAX may run without its CPU backend
        return contextlib.nullcontext()


def _computed(values: Callable[[Any, Any], Any], y_true: Any, y_pred: Any) -> Any:
    from keras import ops, tree

    result = values(*tree.map_structure(ops.convert_to_tensor, (y_true, y_pred)))
    return np.asarray(ops.convert_to_numpy(result), "float64")


def _equal(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True))
