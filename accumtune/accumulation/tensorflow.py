"""One train function on TensorFlow: a Python loop over compiled micro-steps, and one compiled update.

Three functions are compiled: the first micro-step of a window (its gradients become the accumulators), every further
one (its gradients are added in place as they appear) and the update. A window of one micro-batch has a function of
its own, without accumulators. A `tf.while_loop` in one graph was 1.5 times slower on a CPU and never ended with XLA.
"""

from __future__ import annotations

import warnings
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation import feeding, losses, statistics, training
from accumtune.accumulation.window import Accumulation, factors, shares
from accumtune.errors import ModelError


class TensorFlowTraining:
    """Trains one window per call; Keras hands it the iterator of an epoch."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.accumulation = accumulation
        self.has_mask = False
        self._accumulators: list[Any] = []
        self._moments: list[tuple[Any, ...]] = []
        self._normalizations: list[Any] = []
        self._has_gradient: list[bool] = []
        self._only = self._compiled(self._only_step)
        self._first = self._compiled(self._first_step)
        self._next = self._compiled(self._next_step)
        self._update = self._compiled(self._update_step)
        # Only what the denominators need of this forward pass is kept in the graph: masks, seldom predictions.
        self._count = self._compiled(self._count_step, jit_compile=False)

    def __call__(self, iterator: Any) -> Any:
        """Runs `steps_per_execution` windows; returns the logs. Raises StopIteration where there is no data."""
        is_sized = _has_static_batch(iterator)
        logs = None
        for _ in range(self.model.steps_per_execution):
            window = self._window(iterator)
            if not window:
                break
            logs = self._train(window, is_sized)
        if logs is None:
            raise StopIteration
        return logs

    def _window(self, iterator: Any) -> list[Any]:
        batches: list[Any] = []
        for batch in iterator:
            batch = tree.map_structure(_tensor, feeding.unpacked(batch))
            if self.accumulation.micro_batch_size is not None:
                return feeding.micro_batches(batch, self.accumulation.micro_batch_size, _cut)
            batches.append(batch)
            if len(batches) == self.accumulation.accumulation_steps:
                break
        return batches

    def _train(self, window: list[Any], is_sized: bool) -> Any:
        training.build(self.model, window[0])
        samples = [feeding.samples_of(batch) for batch in window]
        parts = shares(samples)
        if len(window) == 1:
            return self._only(window[0], _scalar(1.0), self._ones(), _scalar(samples[0] if is_sized else 1.0))
        if not self._accumulators:
            self._accumulators = [_accumulator(variable) for variable in self.model.trainable_weights]
        scales = self._factors(window, samples, parts)
        for index, batch in enumerate(window):
            step = self._next if index else self._first
            weight = _scalar(samples[index] if is_sized else parts[index])
            logs = step(batch, _scalar(parts[index]), scales[index], weight)
            window[index] = None
        self._update()
        return logs

    # What each micro-batch counts for

    def _ones(self) -> Any:
        return tf.ones([len(losses.flat_losses(self.model))], tf.float64)

    def _factors(self, window: list[Any], samples: list[int], parts: list[float]) -> list[Any]:
        compiled = losses.flat_losses(self.model)
        if not compiled:
            return [self._ones()] * len(window)
        has_weight = window[0][2] is not None
        if any(losses.may_depend_on_data(loss, has_weight) for loss in compiled) or not feeding.same_shapes(window):
            return self._counted(window, samples, parts)
        if isinstance(self._first, tf.types.experimental.PolymorphicFunction) and not self.has_mask:
            # Traced before it runs: whether predictions carry a mask shows only then.
            ones = self._ones()
            self._first.get_concrete_function(window[0], _scalar(parts[0]), ones, _scalar(1.0))
        if self.has_mask or self.model.run_eagerly:
            return self._counted(window, samples, parts)
        columns = [factors(samples, None) if losses.is_sum(loss) else [1.0] * len(window) for loss in compiled]
        return [tf.constant(row, tf.float64) for row in zip(*columns, strict=True)]

    def _counted(self, window: list[Any], samples: list[int], parts: list[float]) -> list[Any]:
        counts = tf.stack([self._count(batch) for batch in window])
        relative = tf.math.divide_no_nan(counts, tf.reduce_sum(counts, axis=0))
        is_sum = tf.constant([losses.is_sum(loss) for loss in losses.flat_losses(self.model)])
        relative = tf.where(is_sum, tf.ones_like(relative), relative)
        return tf.unstack(tf.math.divide_no_nan(relative, tf.constant(parts, tf.float64)[:, None]))

    def _count_step(self, batch: Any) -> Any:
        x, y, sample_weight = batch
        y_pred = self._predict(x, training=False)
        with losses.counting(self.model) as counts:
            self.model._compile_loss(y, y_pred, sample_weight)
        return tf.stack([tf.cast(count, tf.float64) for count in counts])

    # The compiled functions

    def _compiled(self, function: Any, jit_compile: bool | None = None) -> Any:
        if self.model.run_eagerly:
            return function
        jit_compile = self.model.jit_compile if jit_compile is None else jit_compile
        function = tf.autograph.experimental.do_not_convert(function)
        return tf.function(function, reduce_retracing=True, jit_compile=jit_compile)

    def _only_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> Any:
        gradients, logs = self._gradients(batch, share, scales, metric_weight)
        self._apply([None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients])
        return logs

    def _first_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> Any:
        with statistics.recorded(self.model) as moments:
            gradients, logs = self._gradients(batch, share, scales, metric_weight)
        self._has_gradient = [gradient is not None for gradient in gradients]
        for accumulator, gradient in zip(self._accumulators, gradients, strict=True):
            if gradient is not None:
                accumulator.assign(tf.cast(tf.convert_to_tensor(gradient), accumulator.dtype))
        if not self._moments:
            with tf.init_scope():
                self._normalizations = [entry.layer for entry in moments]
                self._moments = [tuple(_like(tensor) for tensor in entry.tensors()) for entry in moments]
        for variables, entry in zip(self._moments, moments, strict=True):
            for variable, value in zip(variables, entry.tensors(), strict=True):
                variable.assign(value)
        return logs

    def _next_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> Any:
        with statistics.recorded(self.model) as moments:
            gradients, logs = self._gradients(batch, share, scales, metric_weight)
        weights = self.model.trainable_weights
        for weight, accumulator, gradient in zip(weights, self._accumulators, gradients, strict=True):
            if gradient is not None:
                _add(weight, accumulator, gradient)
        for variables, entry in zip(self._moments, moments, strict=True):
            so_far = tuple(variable.read_value() for variable in variables)
            for variable, value in zip(variables, statistics.combined(so_far, entry.tensors()), strict=True):
                variable.assign(value)
        return logs

    def _update_step(self) -> None:
        weights = self.model.trainable_weights
        self._apply(
            [
                tf.cast(accumulator.value(), weight.dtype) if has_gradient else None
                for weight, accumulator, has_gradient in zip(
                    weights, self._accumulators, self._has_gradient, strict=True
                )
            ]
        )
        for layer, variables in zip(self._normalizations, self._moments, strict=True):
            statistics.moved(layer, tuple(variable.value() for variable in variables))

    def _predict(self, x: Any, training: bool) -> Any:
        return self.model(x, training=training) if self.model._call_has_training_arg else self.model(x)

    def _gradients(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> tuple[list[Any], Any]:
        """One forward and backward pass, as in Keras's train_step; gradients of this micro-batch's part."""
        model = self.model
        x, y, sample_weight = batch
        with tf.GradientTape() as tape:
            y_pred = self._predict(x, training=True)
            with losses.scaled(model, scales, self._see_mask, metric_weight):
                loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            if loss.shape.rank:
                raise ModelError(
                    f"Received a loss of shape {loss.shape}.",
                    "one number per batch.",
                    'use a reduction other than None or "none".',
                )
            model._loss_tracker.update_state(loss, sample_weight=tf.shape(tree.flatten(batch)[0])[0])
            loss = model.optimizer.scale_loss(loss * tf.cast(share, loss.dtype))
        gradients = tape.gradient(loss, model.trainable_weights) if model.trainable_weights else []
        return gradients, model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _see_mask(self) -> None:
        self.has_mask = True

    def _apply(self, gradients: list[Any]) -> None:
        if not gradients:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            return
        self.model.optimizer.apply_gradients(zip(gradients, self.model.trainable_weights, strict=True))


def _has_static_batch(iterator: Any) -> bool:
    """Whether plain Keras would know the samples of a batch while tracing, and weigh the logged losses by them."""
    spec = getattr(iterator, "element_spec", None)
    if spec is None:
        return True
    return tree.flatten(spec)[0].shape[:1].is_fully_defined()


def _tensor(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, tf.experimental.Optional):
        return None
    return leaf if isinstance(leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)) else tf.convert_to_tensor(leaf)


def _cut(leaf: Any, part: slice) -> Any:
    if isinstance(leaf, tf.SparseTensor):
        start = [part.start] + [0] * (len(leaf.shape) - 1)
        return tf.sparse.slice(leaf, start, [part.stop - part.start, *leaf.shape[1:]])
    if isinstance(leaf, tf.RaggedTensor):
        return leaf[part]
    with tf.device(leaf.device):  # else a slice of host memory would be made, whole window and all, on the GPU
        return leaf[part]


def _scalar(value: float) -> Any:
    return tf.constant(value, tf.float64)


def _accumulator(variable: Any) -> Any:
    dtype = tf.float64 if variable.dtype == "float64" else tf.float32
    return tf.Variable(tf.zeros(variable.shape, dtype), trainable=False, name="accumulated_gradient")


def _like(tensor: Any) -> Any:
    return tf.Variable(tf.zeros(tensor.shape, tensor.dtype), trainable=False, name="moments")


def _add(weight: Any, accumulator: Any, gradient: Any) -> None:
    if getattr(weight, "overwrite_with_gradient", False):  # not a gradient but a new value (float8 scales)
        accumulator.assign(tf.cast(gradient, accumulator.dtype))
    elif isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, accumulator.dtype)
        accumulator.scatter_add(tf.IndexedSlices(values, gradient.indices, gradient.dense_shape))
    else:
        accumulator.assign_add(tf.cast(gradient, accumulator.dtype))
