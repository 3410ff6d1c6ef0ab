"""Makes BatchNormalization work in ghost batches: groups of a fixed number of samples, whatever the micro-batch.

Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017). A window is split into consecutive groups; its rest
is a smaller group. A micro-batch is a multiple of a group, so no group is split between micro-batches, and the
micro-batch size does not change the result. Moving statistics are those of the whole window, see moving_statistics.py.

A layer's `call` is replaced only while a step runs (or is traced): inference, saving and cloning are unaffected.
Without masks each backend has its own implementation. On TensorFlow and JAX that is a custom gradient, with half of the
operations that automatic differentiation of mean and variance needs.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation.own_step import own_train_step
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
        self._trained: set[tuple[int, int]] = set()  # by thread and layer: the normalizations of this pass so far

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
        """Notes that a pass over a micro-batch begins, and the number of its samples, if its shape is static."""
        from keras import tree

        if self.size is not None and batch is not None:
            self._trained = {one for one in self._trained if one[0] != threading.get_ident()}
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
            if not layer.trainable:
                return own_call(inputs, training=training, mask=mask)
            here = threading.get_ident(), id(layer)
            if not training:
                # In an own train_step the result may be no more than a log; its test finds what such calls couple.
                if here in self._trained and not own_train_step.has_own_step(self.model):
                    raise _in_both_modes(layer)
                return own_call(inputs, training=training, mask=mask)
            self._trained.add(here)
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


def _in_both_modes(layer: Any) -> ModelError:
    return ModelError(
        f"Received {layer.name!r} ({type(layer).__name__}), which runs with training=False after training=True in one "
        "step. In plain Keras the step has moved its statistics by then; accumulation moves them once, at the "
        "end of an effective batch.",
        "a normalization that runs in one mode, or with training=False first.",
        "leave out ghost_batch_size, call it with training=False before, or use a second normalization there.",
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


def _normalized(layer: Any, inputs: Any, mask: Any, size: int) -> Any:
    """Computes `BatchNormalization.call` in training, for groups of `size` samples and a smaller rest."""
    from keras import backend, ops

    inputs = ops.cast(inputs, backend.result_type(inputs.dtype, "float32"))
    gamma = ops.cast(layer.gamma, inputs.dtype) if layer.scale else None
    beta = ops.cast(layer.beta, inputs.dtype) if layer.center else None
    if mask is not None:
        normalized, seen = _masked(inputs, mask, gamma, beta, layer.axis, layer.epsilon, size)
        statistics.see(layer, *_together(*seen))
        return ops.cast(normalized, layer.compute_dtype)
    module = importlib.import_module(f"accumtune.accumulation.ghost_batch_{backend.backend()}")
    normalized, seen = module.normalized(inputs, gamma, beta, layer.axis, layer.epsilon, size)
    _, mean, variance = _together(*seen)
    entries = math.prod(ops.shape(inputs)) / inputs.shape[layer.axis]
    statistics.see(layer, entries, mean, variance)
    return ops.cast(normalized, layer.compute_dtype)


def _together(numbers: Any, means: Any, variances: Any) -> tuple[Any, Any, Any]:
    """Returns number, mean and variance of all groups together, for each channel; see moving_statistics.py."""
    from keras import ops

    total = ops.sum(numbers, 0)
    mean = ops.divide_no_nan(ops.sum(numbers * means, 0), total)
    squares = ops.sum(numbers * (variances + ops.square(means - mean)), 0)
    return total, mean, ops.divide_no_nan(squares, total)


def _masked(
    inputs: Any, mask: Any, gamma: Any, beta: Any, axis: int, epsilon: float, size: int
) -> tuple[Any, tuple[Any, ...]]:
    """Normalizes groups by their valid entries; the backend differentiates this. Returns what the modules do."""
    from keras import ops

    mask = ops.cast(ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(inputs)), "bool")
    rows = ops.shape(inputs)[0]
    whole = rows // size * size
    outputs, moments = [], []
    for part, number, samples in (
        (slice(0, whole), rows // size, size),
        (slice(whole, None), 1, rows - whole),
    ):
        if isinstance(rows, int) and (number == 0 or samples == 0):
            continue
        is_all = isinstance(rows, int) and number * samples == rows
        values, valid = (value if is_all else value[part] for value in (inputs, mask))
        output, seen = _masked_groups(values, valid, gamma, beta, axis, epsilon, (number, samples))
        outputs.append(output)
        moments.append(seen)
    return _joined(outputs), tuple(map(_joined, zip(*moments, strict=True)))


def _joined(parts: Sequence[Any]) -> Any:
    from keras import ops

    return parts[0] if len(parts) == 1 else ops.concatenate(parts)


def _masked_groups(
    inputs: Any, mask: Any, gamma: Any, beta: Any, axis: int, epsilon: float, groups: tuple[Any, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """Normalizes some groups of samples; their number of valid entries gets a small epsilon as in BatchNormalization.

    Args:
        groups: the number of groups and of samples in each.

    Returns:
        The outputs; numbers, means and variances, `(groups, channels)` each.
    """
    import keras
    from keras import ops

    shape = (*groups, *ops.shape(inputs)[1:])
    axis = axis % len(inputs.shape) + 1
    over = tuple(other for other in range(1, len(shape)) if other != axis)
    blocks, mask = ops.reshape(inputs, shape), ops.reshape(mask, shape)
    number = ops.sum(ops.cast(mask, inputs.dtype), over, keepdims=True)
    count = number + keras.config.epsilon()
    mean = ops.sum(ops.where(mask, blocks, 0), over, keepdims=True) / count
    variance = ops.sum(ops.square(ops.where(mask, blocks - mean, 0)), over, keepdims=True) / count
    channels = mean.shape[1:]
    factor = ops.rsqrt(variance + epsilon)
    factor = factor if gamma is None else factor * ops.reshape(gamma, channels)
    outputs = (blocks - mean) * factor
    outputs = outputs if beta is None else outputs + ops.reshape(beta, channels)
    rows = (groups[0], math.prod(channels))
    moments = tuple(ops.stop_gradient(ops.reshape(value, rows)) for value in (number, mean, variance))
    return ops.reshape(outputs, ops.shape(inputs)), moments
