"""The train function on TensorFlow: a Python loop over compiled micro-steps, and one compiled update.

Three functions are compiled: the first micro-step of a window (it stores its gradients in the accumulators), all
further ones (they add their gradients in place, as these appear) and the update. A window of one micro-batch has a
function of its own, without accumulators. A `tf.while_loop` in one graph was 1.5 times slower on a CPU, and did not end
with XLA.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation import building, moving_statistics, noise_scale, optimizers
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.data import batches as feeding
from accumtune.accumulation.engines import gradient_sums, tensor_slices
from accumtune.accumulation.engines.inlined_functions import inlined_functions
from accumtune.accumulation.engines.replicas import Replicas
from accumtune.accumulation.ghost_batch import GhostBatches
from accumtune.accumulation.losses import batch_metrics, loss_shares
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.whole_batch_tensorflow import TwoPasses
from accumtune.accumulation.window import Accumulation, factors, shares

# The module that gives operations a fixed order when functions are compiled; `memory` sets it to measure memory.
ordering: Any = None

# For each micro-step, a micro-batch per replica.
Window = list[tuple[feeding.MicroBatch, ...]]


class TensorFlowTraining:
    """Trains one window per call; Keras passes the iterator of an epoch.

    With a `tf.distribute` strategy a micro-step is one micro-batch per replica. Sums stay on their replica until the
    update, which sums them over replicas, clips and applies them.
    """

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.accumulation = accumulation
        self.replicas = Replicas(model.distribute_strategy)
        self.has_mask = False
        self._metrics = batch_metrics.WholeWindow(model, is_able=self.replicas.number == 1)
        self._traced: set[Any] = set()
        self._weights: list[Any] = []
        self._accumulators: list[Any] = []
        self._normalizations: list[Any] = []
        # Which weights get gradients, by which leaves of the batch are None; found when a step is traced.
        self._has_gradient: dict[tuple[bool, ...], tuple[bool, ...]] = {}
        self._notes = moving_statistics.Notes()
        self._ghosts = GhostBatches(model, accumulation)
        self._only = self._compiled(self._only_step, around=self._whole_window)
        self._first = self._compiled(self._first_step, around=self._recording)
        self._next = self._compiled(self._next_step, around=self._recording)
        self._update = self._compiled(self._update_step, around=self._updating)
        # The graph keeps only what the denominators need of this forward pass: masks, rarely predictions.
        self._count = self._compiled(self._count_step, jit_compile=False)
        self._squared_norm = self._compiled(self._squared_norm_step, jit_compile=False)

    def __call__(self, iterator: Any) -> Any:
        """Runs `steps_per_execution` windows; returns the logs. Raises StopIteration when the data end."""
        is_sized = tensor_slices.has_static_batch(self.model, iterator)
        logs = None
        for _ in range(self.model.steps_per_execution):
            window = self._window(iterator)
            if not window:
                break
            logs = self._train(window, is_sized)
        if logs is None:
            raise StopIteration
        return self.replicas.mean(logs)

    def _window(self, iterator: Any) -> Window:
        """Returns the micro-steps of one update: for each, a micro-batch per replica."""
        steps: Window = []
        size = self.accumulation.micro_batch_size
        for batch in iterator:
            columns = [
                feeding.micro_batches(
                    tree.map_structure(tensor_slices.as_tensor, part),
                    size,
                    self.model._accumtune_rows,
                    tensor_slices.cut,
                )
                for part in self.replicas.parts(batch)
            ]
            # Replicas with fewer samples get empty micro-batches at the end.
            nothing = tensor_slices.empty(columns[0]) if len(columns) > 1 else None
            steps += itertools.zip_longest(*columns, fillvalue=nothing)
            if size is not None or len(steps) == self.accumulation.accumulation_steps:
                break
        return steps

    def _train(self, window: Window, is_sized: bool) -> Any:
        first = [part.take() for part in window[0]]
        known_samples.note(self.model, first[0])
        building.build(self.model, first[0])
        self._choose_weights()
        for column in zip(*window, strict=True):
            self._ghosts.check_window([part.samples for part in column if part.samples])
        if whole.is_wanted(self.model):
            whole.check_devices(self.model, self.replicas.number)
            if len(window) > 1:
                return self._train_on_whole_batch(window, first, is_sized)
        parts = self._parts(window, is_sized)
        join = self.replicas.join
        if len(window) == 1 and self.replicas.number == 1:
            return self._only(first[0], *parts[0])
        self._make_accumulators()
        scales = self._factors(window, first, parts)
        if len(window) == 1:  # replicas may have unequal parts of it
            share, _, weight = parts[0]
            return self._only(join(first), share, scales[0], weight)
        batch: Any = join(first)
        first.clear()
        # The norm is not measured with several replicas, whose sums are separate until the update.
        samples = [step[0].samples for step in window] if self.replicas.number == 1 else [1]
        listener = noise_scale.listening(self.model, samples)
        has_gradient = [False] * len(self._weights)
        self._metrics.forget()
        for index, (share, _, weight) in enumerate(parts):
            step = window.pop(0)
            if index == 0:
                logs, moments, outputs = self._first(batch, share, scales[index], weight)
            else:
                batch = join([part.take() for part in step])
                logs, moments, outputs = self._next(batch, share, scales[index], weight, moments)
            self._metrics.take(outputs)
            has_gradient = [a or b for a, b in zip(has_gradient, self._has_gradient[_absent(batch)], strict=True)]
            batch = None  # freed before the next one is taken
            listener(index, self._squared_norm)
        self._update(moments, tuple(has_gradient))
        return self._metrics.update(logs)

    @functools.cached_property
    def two_passes(self) -> TwoPasses:
        """The two passes of a loss over the whole effective batch."""
        return TwoPasses(self)

    def _train_on_whole_batch(self, window: Window, first: list[Any], is_sized: bool) -> Any:
        self._make_accumulators()
        logs, moments, has_gradient = self.two_passes.sum_up(window, first, is_sized)
        self._update(moments, tuple(has_gradient))
        return logs

    def _make_accumulators(self) -> None:
        if not self._accumulators:
            with self.replicas.scope():
                self._accumulators = [gradient_sums.accumulator(variable) for variable in self._weights]

    def _choose_weights(self) -> None:
        """Keeps the weights trainable at the first window, since the compiled functions, as Keras's, do too."""
        weights = list(self.model.trainable_weights)
        if not self._weights or (self.model.run_eagerly and list(map(id, weights)) != list(map(id, self._weights))):
            self._weights, self._accumulators = weights, []

    def _parts(self, window: Window, is_sized: bool) -> list[Any]:
        """Returns share, factors of 1 and the weight in logged losses, for each micro-step."""
        join, number = self.replicas.join, self.replicas.number
        ones = join([tensor_slices.vector([1.0] * len(loss_shares.flat_losses(self.model)))] * number)
        total = sum(part.samples for step in window for part in step)
        parts = []
        for step in window:
            samples = [part.samples for part in step]
            share = [tensor_slices.scalar(size / total if total else 0.0) for size in samples]
            weight = [tensor_slices.scalar(size if is_sized else number * size / total) for size in samples]
            parts.append((join(share), ones, join(weight)))
        return parts

    # The weights of micro-batches

    def _factors(self, window: Window, first: list[Any], parts: list[Any]) -> list[Any]:
        """Returns the factors of the losses, for each micro-step."""
        compiled = loss_shares.flat_losses(self.model)
        if not compiled:
            return [ones for _, ones, _ in parts]
        micro_batches = [part for step in window for part in step]
        samples = [part.samples for part in micro_batches]
        if self._must_count(compiled, micro_batches, first, parts[0]):
            rows = self._counted(compiled, window, samples)
        else:
            columns = [factors(samples) if loss_shares.is_sum(loss) else [1.0] * len(samples) for loss in compiled]
            rows = [tensor_slices.vector(row) for row in zip(*columns, strict=True)]
        number = self.replicas.number
        return [self.replicas.join(rows[start : start + number]) for start in range(0, len(rows), number)]

    def counted_factors(self, parts: list[Any]) -> list[Any]:
        """Returns the factors of the losses, for each micro-batch of a batch of validation."""
        samples = [part.samples for part in parts]
        return self._counted(loss_shares.flat_losses(self.model), [(part,) for part in parts], samples)

    def _must_count(self, compiled: list[Any], micro_batches: list[Any], first: list[Any], part: Any) -> bool:
        has_weight = first[0][2] is not None
        if any(loss_shares.may_depend_on_data(loss, has_weight) for loss in compiled):
            return True
        if not feeding.same_shapes(micro_batches, self.accumulation, self.model._accumtune_rows):
            return True
        shapes = feeding.shapes(first[0])
        if not self.model.run_eagerly and not self.has_mask and shapes not in self._traced:
            # Tracing shows whether predictions have a mask.
            self._first.get_concrete_function(self.replicas.join(first), *part)
            self._traced.add(shapes)
        return self.has_mask or self.model.run_eagerly

    def _counted(self, compiled: list[Any], window: Window, samples: list[int]) -> list[Any]:
        batches = (self.replicas.join([part.take() for part in step]) for step in window)
        counts = tf.stack([count for batch in batches for count in self.replicas.parts(self._count(batch))])
        # The count of an empty micro-batch may be NaN.
        counts = tf.where(tensor_slices.vector(samples)[:, None] > 0, counts, tf.zeros_like(counts))
        relative = tf.math.divide_no_nan(counts, tf.reduce_sum(counts, axis=0))
        is_sum = tf.constant([loss_shares.is_sum(loss) for loss in compiled])
        relative = tf.where(is_sum, tf.ones_like(relative), relative)
        return tf.unstack(tf.math.divide_no_nan(relative, tensor_slices.vector(shares(samples))[:, None]))

    def _count_step(self, batch: Any) -> Any:
        x, y, sample_weight = batch
        y_pred = self._predict(x, training=False)
        with loss_shares.counting(self.model) as counts:
            self.model._compile_loss(y, y_pred, sample_weight)
        return tf.stack([tf.cast(count, tf.float64) for count in counts])

    # The compiled functions

    def _compiled(self, function: Any, jit_compile: bool | None = None, around: Any = contextlib.nullcontext) -> Any:
        function = inlined_functions()(self.replicas.run(function, around))
        if self.model.run_eagerly:
            return function
        jit_compile = self.model.jit_compile if jit_compile is None else jit_compile
        function = tf.autograph.experimental.do_not_convert(function)
        compile = functools.partial(tf.function, reduce_retracing=True, jit_compile=jit_compile)
        is_plain = ordering is None or jit_compile or self.replicas.number > 1
        return compile(function) if is_plain else ordering.compiled(function, compile)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        recorded = moving_statistics.recorded(self.model, may_be_empty=self.replicas.number > 1)
        with recorded as self._notes, self._ghosts.active():
            yield

    @contextlib.contextmanager
    def _updating(self) -> Iterator[None]:
        updating = optimizers.updating(self.model.optimizer)
        with (
            self.replicas.summed_already(updating),
            gradient_sums.one_variable_after_the_other(updating, self.replicas.number),
        ):
            yield

    @contextlib.contextmanager
    def _whole_window(self) -> Iterator[None]:
        """The context of a window with one micro-batch; with several replicas, each has only a part of the window."""
        with self._updating(), self._recording() if self.replicas.number > 1 else self._ghosts.active():
            yield

    def _only_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> Any:
        is_window = self.replicas.number == 1
        gradients, logs, _ = self._gradients(batch, share, None if is_window else scales, metric_weight)
        dense = [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
        self._apply(self.replicas.summed(dense))
        if self.replicas.number > 1:
            self._move(self._noted())
        return logs

    def _first_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> Any:
        gradients, logs, outputs = self._gradients(batch, share, scales, metric_weight)
        in_place = self.replicas.number == 1 and not self.model.jit_compile  # XLA plans memory itself
        sums = list(zip(self._accumulators, gradients, strict=True))
        for total, gradient in sums:
            if gradient is not None:
                gradient_sums.put(total, gradient, in_place=in_place)
        # A later micro-batch of the window may have one.
        gradient_sums.clear((total for total, gradient in sums if gradient is None), in_place=in_place)
        return logs, self._noted(), outputs

    def _next_step(self, batch: Any, share: Any, scales: Any, metric_weight: Any, so_far: Any) -> Any:
        gradients, logs, outputs = self._gradients(batch, share, scales, metric_weight)
        for weight, accumulator, gradient in zip(self._weights, self._accumulators, gradients, strict=True):
            if gradient is not None:
                gradient_sums.add(weight, accumulator, gradient)
        return logs, moving_statistics.combined(so_far, self._noted()), outputs

    def _squared_norm_step(self) -> Any:
        """Returns the squared norm of the sums so far. `l2_loss` needs no memory for the squares."""
        pairs = zip(self._weights, self._accumulators, strict=True)
        totals = [total for weight, total in pairs if not getattr(weight, "overwrite_with_gradient", False)]
        return tf.add_n([2 * tf.nn.l2_loss(total) for total in totals])

    def _update_step(self, moments: Any, has_gradient: tuple[bool, ...]) -> None:
        totals = [
            accumulator.value() if is_there else None
            for accumulator, is_there in zip(self._accumulators, has_gradient, strict=True)
        ]
        totals = self.replicas.summed(totals)
        gradients = [
            None if total is None else tf.cast(total, weight.dtype)
            for weight, total in zip(self._weights, totals, strict=True)
        ]
        self._apply(gradients)
        self._move(moments)

    def _noted(self) -> moving_statistics.Packed:
        """Returns the moments of this replica's present micro-batch."""
        noted = self._notes.mine()
        self._normalizations = [entry.layer for entry in noted]
        return moving_statistics.packed(noted)

    def _move(self, moments: moving_statistics.Packed) -> None:
        if self.replicas.number > 1:
            moments = moving_statistics.over_replicas(moments, self.replicas.summed)
        moving_statistics.moved(self._normalizations, moments)

    def _predict(self, x: Any, training: bool) -> Any:
        return self.model(x, training=training) if self.model._call_has_training_arg else self.model(x)

    def _gradients(self, batch: Any, share: Any, scales: Any, metric_weight: Any) -> tuple[list[Any], Any, Any]:
        """Runs a forward and backward pass, as Keras's train_step; returns the gradients of this micro-batch's part."""
        model = self.model
        x, y, sample_weight = batch
        self._ghosts.see(x)
        is_empty = _is_empty(batch) if self.replicas.number > 1 else None
        part = share if scales is not None and self.replicas.number == 1 else None
        with batch_metrics.tracking(model, part), tf.GradientTape() as tape:
            y_pred = self._predict(x, training=True)
            with loss_shares.scaled(model, scales, self._see_mask, metric_weight, is_empty):
                loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            loss = loss_shares.without_nothing(loss, is_empty)
            loss_shares.check_scalar(loss)
            model._loss_tracker.update_state(loss, sample_weight=tf.shape(_first_tensor(batch))[0])
            loss = model.optimizer.scale_loss(loss * tf.cast(share, loss.dtype))
        gradients = tape.gradient(loss, self._weights) if self._weights else []
        if is_empty is not None:
            gradients = [_nothing_where(is_empty, gradient) for gradient in gradients]
        self._has_gradient[_absent(batch)] = tuple(gradient is not None for gradient in gradients)
        if scales is None:
            return gradients, model.compute_metrics(x, y, y_pred, sample_weight=sample_weight), ()
        with batch_metrics.tracking(model, part), self._metrics.waiting():
            logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return gradients, logs, self._metrics.outputs(y, y_pred, sample_weight)

    def _see_mask(self) -> None:
        self.has_mask = True

    def _apply(self, gradients: list[Any]) -> None:
        if not gradients:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            return
        self.model.optimizer.apply_gradients(zip(gradients, self._weights, strict=True))


def _absent(batch: Any) -> tuple[bool, ...]:
    return tuple(leaf is None for leaf in tree.flatten(batch))


def _first_tensor(batch: Any) -> Any:
    return next(leaf for leaf in tree.flatten(batch) if leaf is not None)


def _is_empty(batch: Any) -> Any:
    """Returns, as a tensor, whether a replica's micro-batch is empty; None if its static shape has samples."""
    first = _first_tensor(batch)
    return None if first.shape[0] else tf.equal(tf.shape(first)[0], 0)


def _nothing_where(is_empty: Any, gradient: Any) -> Any:
    """Zeroes the gradient of an empty micro-batch: TensorFlow's depthwise convolution leaves it uninitialized."""
    if gradient is None or isinstance(gradient, tf.IndexedSlices):
        return gradient
    return tf.where(is_empty, tf.zeros_like(gradient), gradient)
