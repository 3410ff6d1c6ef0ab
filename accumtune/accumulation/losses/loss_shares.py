"""The denominators of compiled losses, and the factors that make a micro-batch's loss a part of the window's loss.

`model.compute_loss` stays Keras's own (or the user's): while it is traced, the loss functions inside
`model._compile_loss` are replaced by ones that multiply by their factor (see window.py) or report their denominator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from keras import losses as keras_losses
from keras import ops

from accumtune.accumulation.patched_attributes import replaced
from accumtune.errors import ModelError

SUMS = ("sum", "none", None)


def flat_losses(model: Any) -> list[Any]:
    """Returns the built loss functions of a compiled model, in the order of the factors."""
    compiled = model._compile_loss
    return [] if compiled is None else [entry.loss for entry in compiled._flat_losses]


def is_sum(loss: Any) -> bool:
    """Returns whether the window's loss is the sum of its micro-batches' losses."""
    return getattr(loss, "reduction", "sum_over_batch_size") in SUMS


def may_need_factors(model: Any) -> bool:
    """Returns whether a compiled loss of a batch may be another mean than that of its micro-batches by their samples.

    Such a loss is a sum, or a mean over weights, valid entries or what is left by a mask of the predictions. The model
    need not be built.
    """
    from keras import tree

    compiled = model._compile_loss
    asked = [] if compiled is None else [loss for loss in tree.flatten(compiled._user_loss) if loss is not None]
    return any(map(_may_need_factor, asked)) or (bool(asked) and _may_have_masks(model))


def _may_need_factor(loss: Any) -> bool:
    loss = keras_losses.get(loss)
    if isinstance(loss, keras_losses.Loss):
        return is_sum(loss) or may_depend_on_data(loss, has_sample_weight=True)
    return not str(getattr(loss, "__module__", "")).startswith("keras.")


def _may_have_masks(model: Any) -> bool:
    """Returns whether some layer makes masks; those of Keras that only hand them on do not count."""
    from keras import layers

    for layer in model._flatten_layers():
        owner = next(cls for cls in type(layer).__mro__ if "compute_mask" in vars(cls))
        if owner.__module__.split(".")[0] != "keras":
            return True
        if isinstance(layer, layers.Masking) or getattr(layer, "mask_zero", False):
            return True
    return False


def may_depend_on_data(loss: Any, has_sample_weight: bool) -> bool:
    """Returns whether a loss's denominator may differ from a constant times the number of samples.

    Masks of the predictions are not considered here; tracing the model shows whether there are any.
    """
    if is_sum(loss):
        return False
    if has_sample_weight and getattr(loss, "reduction", None) == "mean_with_sample_weight":
        return True
    # Losses may mask their own values: SparseCategoricalCrossentropy(ignore_class=...) and Circle do; a user's may.
    arguments = getattr(loss, "_fn_kwargs", {})
    is_stock = type(loss).__module__.startswith("keras.") and type(loss) is not keras_losses.Circle
    is_wrapped = type(loss).__name__ == "LossFunctionWrapper" and not loss.fn.__module__.startswith("keras.")
    return arguments.get("ignore_class") is not None or not is_stock or is_wrapped


@contextlib.contextmanager
def scaled(
    model: Any, factors: Any, on_mask: Callable[[], None], metric_weight: Any = None, is_empty: Any = None
) -> Iterator[None]:
    """Multiplies each compiled loss by its factor, inside the `with` block.

    Args:
        factors: a tensor of shape `(losses,)`; None if the micro-batch is the whole window.
        on_mask: called (while tracing) if predictions have a mask.
        metric_weight: the micro-batch's weight in the logged loss of each output (a scalar tensor); None: Keras's
            weight, the number of samples if Keras knows it.
        is_empty: whether the micro-batch has no samples (a scalar tensor); None: it always has some.
    """

    def scale(index: int, loss: Any) -> Callable[..., Any]:
        def call(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            if mask_of(y_pred) is not None:
                on_mask()
            if factors is None:
                return loss(y_true, y_pred, sample_weight)
            with _values(loss) as values:
                value = loss(y_true, y_pred, sample_weight)
            if values and not len(values[0].shape):
                _refuse_weighted_number(loss, sample_weight, mask_of(y_pred))
                if mask_of(y_pred) is not None:  # it would take away the mean of a micro-batch without valid entries
                    value = ops.convert_to_tensor(values[0], dtype=loss.dtype)
            value = without_nothing(value, is_empty)
            return value * ops.cast(factors[index], value.dtype)

        return call

    weigh = None if metric_weight is None else functools.partial(_Weighted, weight=metric_weight)
    with _replaced(model, scale, weigh):
        yield


@contextlib.contextmanager
def _values(loss: Any) -> Iterator[list[Any]]:
    """Collects in the list what `loss.call` returns, inside the `with` block."""
    values: list[Any] = []
    own = vars(loss).get("call")
    call = loss.call

    def noting(y_true: Any, y_pred: Any) -> Any:
        result = call(y_true, y_pred)
        values.append(ops.convert_to_tensor(result))
        return result

    loss.call = noting
    try:
        yield values
    finally:
        del loss.call
        if own is not None:
            loss.call = own


def _refuse_weighted_number(loss: Any, sample_weight: Any, mask: Any) -> None:
    """Raises ModelError for weights: Keras multiplies one number per batch by the weights' mean, which is not a sum."""
    if sample_weight is None and (mask is None or not is_sum(loss)):
        return
    received = "a mask" if sample_weight is None else "sample weights or class weights"
    raise ModelError(
        f"Received {received} and the loss {loss.name!r}, which returns one number for its whole batch.",
        "a loss that returns one value per sample: one number cannot be weighted sample by sample, and its product "
        "with the weights of an effective batch is not a sum over micro-batches.",
        "return ops.mean(..., axis=-1) in place of ops.mean(...), or train without weights.",
    )


@contextlib.contextmanager
def counting(model: Any) -> Iterator[list[Any]]:
    """Makes compiled losses compute only their denominators, and collects these in the list; in the `with` block."""
    counted: list[Any] = []

    def count(index: int, loss: Any) -> Callable[..., Any]:
        def call(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            counted.append(denominator(loss, y_true, y_pred, sample_weight))
            return ops.zeros(())

        return call

    with _replaced(model, count, lambda metric: None):
        yield counted


@contextlib.contextmanager
def _replaced(
    model: Any, loss_for: Callable[[int, Any], Any], metric_for: Callable[[Any], Any] | None
) -> Iterator[None]:
    """Replaces compiled losses, and the metrics that log them, inside the `with` block."""
    compiled = model._compile_loss

    def replacements() -> Iterator[contextlib.AbstractContextManager[None]]:
        losses = [entry._replace(loss=loss_for(index, entry.loss)) for index, entry in enumerate(compiled._flat_losses)]
        yield replaced(compiled, {"_flat_losses": losses})
        if metric_for is not None:
            yield replaced(compiled, {"_metrics": [metric_for(metric) for metric in compiled.metrics]})

    with contextlib.nullcontext() if compiled is None else once_built(compiled, replacements):
        yield


@contextlib.contextmanager
def once_built(
    compiled: Any, replacements: Callable[[], Iterable[contextlib.AbstractContextManager[None]]]
) -> Iterator[None]:
    """Enters the replacements until the `with` block ends: at once, or when a step in it builds the compiled losses."""
    with contextlib.ExitStack() as stack:

        def replace() -> None:
            for replacement in replacements():
                stack.enter_context(replacement)

        def build(*arguments: Any) -> None:
            own_build(*arguments)
            replace()

        own_build = compiled.build
        if compiled.built:
            replace()
        else:
            stack.enter_context(replaced(compiled, {"build": build}))
        yield


class _Weighted:
    """A metric whose updates all have the given weight."""

    def __init__(self, metric: Any, weight: Any) -> None:
        self.metric, self.weight = metric, weight

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        self.metric.update_state(value, sample_weight=self.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.metric, name)


def without_nothing(loss: Any, is_empty: Any) -> Any:
    """Returns the loss, or 0 if there are no samples: a mean over none is NaN, and in Keras may have shape (0,)."""
    if is_empty is None:
        return loss
    loss = ops.sum(loss) if tuple(loss.shape) == (0,) else loss
    return ops.where(is_empty, ops.zeros_like(loss), loss)


def check_scalar(loss: Any) -> None:
    """Raises ModelError for a loss that is not one number."""
    if len(loss.shape):
        raise ModelError(
            f"Received a loss of shape {tuple(loss.shape)}.",
            "one number per batch.",
            'use a reduction other than None or "none".',
        )


def mask_of(tensor: Any) -> Any:
    """Returns the mask that Keras attached to a tensor, or None."""
    from keras.src import backend

    return backend.get_keras_mask(tensor)


def denominator(loss: Any, y_true: Any, y_pred: Any, sample_weight: Any) -> Any:
    """Returns the denominator of a loss, a scalar tensor; 1 for a sum.

    Follows `keras.losses.Loss.__call__` and `reduce_weighted_values` line by line (Keras 3.14 and 3.15). A loss whose
    values are not visible (an own `__call__`, or a `call` that returns one number per batch) is treated as a mean over
    samples; `batch_coupled_layers` reports it.
    """
    from keras import tree
    from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank

    samples = ops.cast(ops.shape(tree.flatten(y_pred)[0])[0], "float32")
    if is_sum(loss):
        return ops.ones_like(samples)
    if type(loss).__call__ is not keras_losses.Loss.__call__:
        return samples
    prediction_mask = mask_of(y_pred)
    y_pred = tree.map_structure(lambda x: ops.convert_to_tensor(x, dtype=loss.dtype), y_pred)
    y_true = tree.map_structure(lambda x: ops.convert_to_tensor(x, dtype=loss.dtype), y_true)
    values = loss.call(y_true, y_pred)
    if len(values.shape) == 0:
        return samples
    masks = [mask for mask in (prediction_mask, mask_of(values)) if mask is not None]
    mask = masks[0] & masks[1] if len(masks) == 2 else (masks[0] if masks else None)
    if loss.reduction != "mean_with_sample_weight":
        return _size(values) if mask is None else _valid(mask, values)
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, dtype=loss.dtype)
    if mask is not None:
        mask = ops.convert_to_tensor(mask, dtype=loss.dtype)
    weights = apply_mask(sample_weight, mask, dtype=values.dtype, reduction=loss.reduction)
    if weights is None:
        return _size(values)
    return ops.sum(squeeze_or_expand_to_same_rank(values, ops.cast(weights, values.dtype))[1])


def _size(values: Any) -> Any:
    return ops.cast(ops.prod(ops.convert_to_tensor(ops.shape(values), dtype="int32")), values.dtype)


def _valid(mask: Any, values: Any) -> Any:
    """Returns the denominator with a mask: Keras first multiplies by (entries of the mask / valid entries)."""
    return ops.sum(ops.cast(mask, values.dtype)) * _size(values) / _size(ops.cast(mask, values.dtype))
