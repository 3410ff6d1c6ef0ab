"""Makes BatchNormalization work in ghost batches: groups of a fixed number of samples, whatever the micro-batch.

Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017). A window is split into consecutive groups; its rest
is a smaller group. A micro-batch is a multiple of a group, so no group is split between micro-batches, and the
micro-batch size does not change the result. Moving statistics are those of the whole window, see moving_statistics.py.

A layer's `call` is replaced only while a step runs (or is traced): inference, saving and cloning are unaffected.
Groups without masks have a custom gradient: three reductions and one sum over the large tensor, about half of what
automatic differentiation of mean and variance needs.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation.patched_attributes import replaced
from accumtune.accumulation.window import Accumulation, check_groups
from accumtune.errors import ModelError

_OWN_CODE = ("call", "_moments")


class GhostBatches:
    """Makes the normalizations of a model work in groups while `active`; does nothing without a ghost batch size.

    Args:
        model: the model that trains.
        accumulation: its ghost batch size, and its micro-batch size if that is known.
    """

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.size = accumulation.ghost_batch_size
        self._is_one_group = accumulation.micro_batch_size == self.size
        self._samples: dict[int, int | None] = {}  # by thread: replicas are traced in threads

    @contextlib.contextmanager
    def active(self, batch: Any = None) -> Iterator[None]:
        """Makes training passes normalize in groups, until the context ends; `batch` as in `see`."""
        if self.size is None:
            yield
            return
        check(self.model)
        self.see(batch)
        with contextlib.ExitStack() as changed:
            for layer in normalizations(self.model):
                changed.enter_context(replaced(layer, {"call": self._call(layer, self.size)}))
            yield

    def see(self, batch: Any) -> None:
        """Notes the number of samples in the micro-batch that comes next, if its shape is static."""
        from keras import tree

        if self.size is not None and batch is not None:
            sizes = [leaf.shape[0] for leaf in tree.flatten(batch) if leaf is not None]
            self._samples[threading.get_ident()] = sizes[0] if sizes and isinstance(sizes[0], int) else None

    def check_window(self, samples: Sequence[int]) -> None:
        """Raises BatchSizeError if a micro-batch, other than the last of its window, is not a multiple of a group."""
        if self.size is not None:
            for number in samples[:-1]:
                check_groups(number, self.size)

    def _call(self, layer: Any, size: int) -> Any:
        own_call = layer.call

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            if not training or not layer.trainable:
                return own_call(inputs, training=training, mask=mask)
            self._check_rows(layer, inputs)
            rows = inputs.shape[0]
            is_one_group = rows <= size if isinstance(rows, int) else self._is_one_group
            if is_one_group and mask is None:
                return own_call(inputs, training=training, mask=mask)
            return _normalized(layer, inputs, mask, size)

        return call

    def _check_rows(self, layer: Any, inputs: Any) -> None:
        rank = len(inputs.shape)
        rows, samples = inputs.shape[0], self._samples.get(threading.get_ident())
        if layer.axis % rank == 0:
            received = f"which normalizes along axis {layer.axis}, the samples"
        elif isinstance(rows, int) and samples is not None and rows != samples:
            received = f"which gets {rows} rows where the micro-batch has {samples} samples"
        else:
            return
        raise ModelError(
            f"Received {layer.name!r} ({type(layer).__name__}), {received}.",
            "one row for each sample, so that groups of samples can be formed.",
            "keep the samples on the first axis of this layer's inputs, or leave out ghost_batch_size.",
        )


def check(model: Any) -> None:
    """Raises ModelError if a normalization of the model cannot work in groups."""
    for reason in reasons_against(model):
        raise refusal(reason)


def reasons_against(model: Any) -> list[str]:
    """Lists the normalizations of a model that cannot work in groups, each with its reason."""
    found = [(layer, _why_not(layer, model)) for layer in normalizations(model)]
    return [f"{layer.name!r} ({type(layer).__name__}), which {reason}" for layer, reason in found if reason]


def refusal(reason: str) -> ModelError:
    """Makes the error for one of `reasons_against`."""
    return ModelError(
        f"Received ghost_batch_size with {reason}.",
        "Keras's own BatchNormalization, without renorm and not synchronized over replicas.",
        "leave out ghost_batch_size, replace that layer, or freeze it (trainable = False).",
    )


def _why_not(layer: Any, model: Any) -> str | None:
    import keras

    for name in _OWN_CODE:
        if getattr(type(layer), name) is not getattr(keras.layers.BatchNormalization, name):
            return f"has its own {name}"
    if getattr(layer, "renorm", False):
        return "has renorm=True: its corrections would follow each micro-batch"
    strategy = getattr(model, "distribute_strategy", None)
    if getattr(layer, "synchronized", False) and strategy is not None and strategy.num_replicas_in_sync > 1:
        return "has synchronized=True: its groups would reach over the replicas"
    return None


def normalizations(model: Any) -> list[Any]:
    """Returns the trainable BatchNormalization layers of a model, and those derived from it."""
    import keras

    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]


@contextlib.contextmanager
def set_aside(model: Any) -> Iterator[None]:
    """Makes the model's normalizations count as frozen, so that only other coupling is found."""
    with contextlib.ExitStack() as changed:
        for layer in normalizations(model):
            if _why_not(layer, model) is None:
                changed.enter_context(replaced(layer, {"_trainable": False}))
        yield


@dataclass(frozen=True)
class _Groups:
    """Inputs as groups of samples, and their moments.

    Args:
        blocks: the inputs with an axis of groups in front.
        axes: the axes over which a group is normalized.
        mean, variance: of each group, with the rank of `blocks`.
        number: entries of a group per channel; with a mask, valid ones, with the rank of `blocks`.
    """

    blocks: Any
    axes: tuple[int, ...]
    mean: Any
    variance: Any
    number: Any

    def moments(self) -> tuple[Any, Any, Any]:
        """Returns numbers, means and variances, `(groups, channels)` each."""
        from keras import ops

        shape = ops.shape(self.mean)
        number = ops.broadcast_to(ops.cast(self.number, self.mean.dtype), shape)
        rows = (shape[0], math.prod(shape[1:]))
        number, mean, variance = (ops.reshape(value, rows) for value in (number, self.mean, self.variance))
        return number, ops.stop_gradient(mean), ops.stop_gradient(variance)


def _normalized(layer: Any, inputs: Any, mask: Any, size: int) -> Any:
    """Computes `BatchNormalization.call` in training, for groups of `size` samples and a smaller rest."""
    from keras import backend, ops

    inputs = ops.cast(inputs, backend.result_type(inputs.dtype, "float32"))
    gamma = ops.cast(layer.gamma, inputs.dtype) if layer.scale else None
    beta = ops.cast(layer.beta, inputs.dtype) if layer.center else None
    if mask is not None:
        mask = ops.cast(ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(inputs)), "bool")
    rows = ops.shape(inputs)[0]
    if mask is None and backend.backend() in ("jax", "torch"):
        module = importlib.import_module(f"accumtune.accumulation.ghost_batch_{backend.backend()}")
        normalized, seen = module.normalized(inputs, gamma, beta, layer.axis, layer.epsilon, size)
        _, mean, variance = _together(*seen)
        statistics.see(layer, math.prod(inputs.shape) / inputs.shape[layer.axis], mean, variance)
        return ops.cast(normalized, layer.compute_dtype)
    whole = rows // size * size
    outputs, moments = [], []
    for part, number, samples in (
        (slice(0, whole), rows // size, size),
        (slice(whole, None), 1, rows - whole),
    ):
        if isinstance(rows, int) and (number == 0 or samples == 0):
            continue
        is_all = isinstance(rows, int) and number * samples == rows
        values, valid = (value if value is None or is_all else value[part] for value in (inputs, mask))
        if mask is None:
            groups = _groups(values, number, samples, layer.axis)
            normalized = _with_own_gradient(groups, gamma, beta, layer.epsilon)
        else:
            groups = _masked_groups(values, valid, number, samples, layer.axis)
            normalized = _with_moments(groups, gamma, beta, layer.epsilon)
        outputs.append(ops.reshape(normalized, ops.shape(values)))
        moments.append(groups.moments())
    statistics.see(layer, *_together(*map(_joined, zip(*moments, strict=True))))
    return ops.cast(_joined(outputs), layer.compute_dtype)


def _joined(parts: Sequence[Any]) -> Any:
    from keras import ops

    return parts[0] if len(parts) == 1 else ops.concatenate(parts)


def _together(numbers: Any, means: Any, variances: Any) -> tuple[Any, Any, Any]:
    """Returns number, mean and variance of all groups together, for each channel; see moving_statistics.py."""
    from keras import ops

    total = ops.sum(numbers, 0)
    mean = ops.divide_no_nan(ops.sum(numbers * means, 0), total)
    squares = ops.sum(numbers * (variances + ops.square(means - mean)), 0)
    return total, mean, ops.divide_no_nan(squares, total)


def _groups(inputs: Any, groups: Any, samples: Any, axis: int) -> _Groups:
    from keras import ops

    shape, axes = _shape_in_groups(ops.shape(inputs), groups, samples, axis % len(inputs.shape))
    blocks = ops.reshape(inputs, shape)
    number = math.prod(shape[axis] for axis in axes)
    values = ops.stop_gradient(blocks)
    mean = ops.sum(values, axes, keepdims=True) / _at_least_one(number, inputs.dtype)
    variance = ops.sum(ops.square(values - mean), axes, keepdims=True) / _at_least_one(number, inputs.dtype)
    return _Groups(blocks, axes, mean, variance, number)


def _masked_groups(inputs: Any, mask: Any, groups: Any, samples: Any, axis: int) -> _Groups:
    """Makes groups with the moments of valid entries, whose number gets a small epsilon as in BatchNormalization."""
    import keras
    from keras import ops

    shape, axes = _shape_in_groups(ops.shape(inputs), groups, samples, axis % len(inputs.shape))
    blocks, mask = ops.reshape(inputs, shape), ops.reshape(mask, shape)
    number = ops.sum(ops.cast(mask, inputs.dtype), axes, keepdims=True)
    count = number + keras.config.epsilon()
    mean = ops.sum(ops.where(mask, blocks, 0), axes, keepdims=True) / count
    variance = ops.sum(ops.square(ops.where(mask, blocks - mean, 0)), axes, keepdims=True) / count
    return _Groups(blocks, axes, mean, variance, number)


def _at_least_one(number: Any, dtype: Any) -> Any:
    """Returns the number, but at least 1: a rest of dynamic size may have no samples."""
    from keras import ops

    return max(number, 1) if isinstance(number, int) else ops.cast(ops.maximum(number, 1), dtype)


def _shape_in_groups(
    shape: Sequence[Any], groups: Any, samples: Any, axis: int
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns the shape of inputs in groups, and the axes to normalize over."""
    import keras

    if keras.backend.backend() != "tensorflow":  # merging axes could copy inputs with another memory layout
        return (groups, samples, *shape[1:]), tuple(i for i in range(1, len(shape) + 1) if i != axis + 1)
    before, after = math.prod(shape[1:axis]), math.prod(shape[axis + 1 :])
    if axis == len(shape) - 1:
        return (groups, samples * before, shape[axis]), (1,)
    return (groups, samples * before, shape[axis], after), (1, 3)


def _with_moments(groups: _Groups, gamma: Any, beta: Any, epsilon: float) -> Any:
    """Normalizes groups; the backend differentiates this."""
    from keras import ops

    channels = groups.mean.shape[1:]
    factor = ops.rsqrt(groups.variance + epsilon)
    factor = factor if gamma is None else factor * ops.reshape(gamma, channels)
    outputs = (groups.blocks - groups.mean) * factor
    return outputs if beta is None else outputs + ops.reshape(beta, channels)


def _with_own_gradient(groups: _Groups, gamma: Any, beta: Any, epsilon: float) -> Any:
    """Normalizes groups, with a custom gradient that includes the path through their moments."""
    from keras import ops

    axes, channels, dtype = groups.axes, groups.mean.shape[1:], groups.mean.dtype
    number, has_beta = _at_least_one(groups.number, dtype), beta is not None
    gamma = ops.ones(channels, dtype) if gamma is None else ops.reshape(gamma, channels)
    beta = ops.zeros(channels, dtype) if beta is None else ops.reshape(beta, channels)

    def normalize(blocks: Any, gamma: Any, beta: Any, mean: Any, inverse: Any) -> Any:
        scale = inverse * gamma
        outputs = (blocks - mean) * scale
        outputs = outputs + beta if has_beta else outputs

        def gradient(*args: Any, upstream: Any = None) -> tuple[Any, ...]:
            upstream = args[0] if upstream is None else upstream
            centered = blocks - mean
            beta_sum = ops.sum(upstream, axes, keepdims=True)
            gamma_sum = ops.sum(upstream * centered, axes, keepdims=True) * inverse
            through_moments = centered * (scale * inverse * gamma_sum / number) + scale * beta_sum / number
            of_blocks = upstream * scale - through_moments
            nothing = ops.zeros_like(mean)
            return of_blocks, ops.sum(gamma_sum, 0), ops.sum(beta_sum, 0), nothing, nothing

        return outputs, gradient

    return ops.custom_gradient(normalize)(groups.blocks, gamma, beta, groups.mean, ops.rsqrt(groups.variance + epsilon))
