"""One train function on JAX: a Python loop over a jitted micro-step, and one jitted update.

The accumulators are donated from micro-step to micro-step, weights and optimizer state to the update only. What a
micro-step changes besides (seeds, metrics) is not donated, so an interrupted window leaves the model whole.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from accumtune.accumulation import feeding, known_samples, losses, noise_scale, statistics
from accumtune.accumulation.window import Accumulation, factors, shares


class JaxTraining:
    """Trains one window per call; Keras hands it the model's state and the iterator of an epoch."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.accumulation = accumulation
        self.is_jitted = bool(model.jit_compile and not model.run_eagerly)
        self.has_mask = False
        self._traced: set[Any] = set()
        self._normalizations: list[Any] = []
        self._only = self._jitted(model.train_step, donate=(0,))
        self._first = self._jitted(self._first_step)
        self._next = self._jitted(self._next_step, donate=(0,))
        self._update = self._jitted(self._update_step, donate=(0, 1))
        # Only what the denominators need of this forward pass is compiled: masks, seldom predictions.
        self._count = self._jitted(self._count_step)
        self._squared_norm = self._jitted(self._squared_norm_step)

    def __call__(self, state: Any, iterator: Any) -> tuple[Any, Any]:
        """Runs `steps_per_execution` windows; returns logs and state. Raises StopIteration where there is no data."""
        logs = None
        for _ in range(self.model.steps_per_execution):
            window = self._window(iterator)
            if not window:
                break
            logs, state = self._train(state, window)
        if logs is None:
            raise StopIteration
        return logs, state

    def _window(self, iterator: Any) -> list[feeding.MicroBatch]:
        size, rows = self.accumulation.micro_batch_size, self.model._accumtune_rows
        if size is None:
            batches = itertools.islice(iterator, self.accumulation.accumulation_steps)
            return [part for batch in batches for part in feeding.micro_batches(batch, None, rows)]
        for batch in itertools.islice(iterator, 1):
            devices = _data_parallel_devices()
            parts = feeding.micro_batches(batch, size * devices, rows)
            return [_spread(part, devices) for part in parts] if devices > 1 and len(parts) > 1 else parts
        return []

    def _train(self, state: Any, window: list[Any]) -> tuple[Any, Any]:
        batch = window[0].take()
        known_samples.note(self.model, batch)
        if len(window) == 1:
            return self._only(state, batch)
        trainable, non_trainable, optimizer, metrics = state
        scales = self._scales(state, window, batch)
        listener = noise_scale.listening(self.model, [part.samples for part in window])
        logs, sums = None, None
        for index in range(len(scales)):
            part = window.pop(0)
            batch = part.take() if index else batch
            inputs = (trainable, non_trainable, optimizer, metrics, batch, *scales[index])
            result = self._first(*inputs) if sums is None else self._next(sums, *inputs)
            logs, sums, non_trainable, metrics = result
            del inputs
            batch = None  # gone before the next one is taken
            listener(index, functools.partial(self._squared_norm, sums[0]))
        trainable, optimizer, non_trainable = self._update(trainable, optimizer, sums, non_trainable)
        return logs, (trainable, non_trainable, optimizer, metrics)

    # What each micro-batch counts for

    def _scales(self, state: Any, window: list[Any], first: Any) -> list[tuple[Any, Any]]:
        """Share and factors of each micro-batch; `first` is the first one's."""
        samples = [part.samples for part in window]
        parts = [np.asarray(part, _precision()) for part in shares(samples)]
        compiled = losses.flat_losses(self.model)
        plain = [factors(samples) if losses.is_sum(loss) else [1.0] * len(window) for loss in compiled]
        rows = np.asarray(plain, _precision()).reshape(len(compiled), len(window)).T
        if self._must_count(state, window, compiled, (first, parts[0], rows[0])):
            trainable, non_trainable = state[:2]
            counts = [self._count(trainable, non_trainable, part.take()) for part in window]
            columns = np.asarray(counts).T.tolist()
            counted = [factors(samples, None if losses.is_sum(loss) else columns[i]) for i, loss in enumerate(compiled)]
            rows = np.asarray(counted, _precision()).T
        return list(zip(parts, rows, strict=True))

    def _must_count(self, state: Any, window: list[Any], compiled: list[Any], first: tuple[Any, Any, Any]) -> bool:
        if not compiled:
            return False
        has_weight = first[0][2] is not None
        if any(losses.may_depend_on_data(loss, has_weight) for loss in compiled):
            return True
        if not feeding.same_shapes(window, self.accumulation, self.model._accumtune_rows):
            return True
        shapes = feeding.shapes(first[0])
        if self.is_jitted and not self.has_mask and shapes not in self._traced:
            self._traced.add(shapes)
            # Traced before it runs: whether predictions carry a mask shows only then. JAX keeps the trace.
            trainable, non_trainable, optimizer, metrics = state
            self._first.trace(trainable, non_trainable, optimizer, metrics, *first)
        return self.has_mask or not self.is_jitted

    def _count_step(self, trainable: Any, non_trainable: Any, batch: Any) -> Any:
        from keras import StatelessScope

        model = self.model
        x, y, sample_weight = batch
        mapping = [*zip(model.trainable_variables, trainable), *zip(model.non_trainable_variables, non_trainable)]  # noqa: B905
        with StatelessScope(state_mapping=mapping):
            y_pred = model(x, training=False) if model._call_has_training_arg else model(x)
            with losses.counting(model) as counts:
                model._compile_loss(y, y_pred, sample_weight)
        return jnp.stack([jnp.asarray(count, _precision()) for count in counts])

    # The jitted functions

    def _jitted(self, function: Any, donate: tuple[int, ...] = ()) -> Any:
        return jax.jit(function, donate_argnums=donate) if self.is_jitted else function

    def _first_step(self, *inputs: Any) -> tuple[Any, ...]:
        logs, gradients, moments, non_trainable, metrics = self._gradients(*inputs)
        sums = [gradient.astype(_accumulator_dtype(gradient)) for gradient in gradients]
        return logs, (sums, moments), non_trainable, metrics

    def _next_step(self, sums: Any, *inputs: Any) -> tuple[Any, ...]:
        logs, gradients, moments, non_trainable, metrics = self._gradients(*inputs)
        accumulators, moments_so_far = sums
        added = []
        for variable, total, gradient in zip(self.model.trainable_variables, accumulators, gradients, strict=True):
            gradient = gradient.astype(total.dtype)
            # float8 scales are not summed: their "gradient" is a new value
            added.append(gradient if getattr(variable, "overwrite_with_gradient", False) else total + gradient)
        return logs, (added, statistics.combined(moments_so_far, moments)), non_trainable, metrics

    def _squared_norm_step(self, accumulators: Any) -> Any:
        pairs = zip(self.model.trainable_variables, accumulators, strict=True)
        sums = [total for variable, total in pairs if not getattr(variable, "overwrite_with_gradient", False)]
        return sum(jnp.sum(jnp.square(total)) for total in sums)

    def _update_step(self, trainable: Any, optimizer: Any, sums: Any, non_trainable: Any) -> tuple[Any, Any, Any]:
        from keras import StatelessScope

        accumulators, moments = sums
        gradients = [total.astype(value.dtype) for total, value in zip(accumulators, trainable, strict=True)]
        trainable, optimizer = self.model.optimizer.stateless_apply(optimizer, gradients, trainable)
        variables = self.model.non_trainable_variables
        with StatelessScope(state_mapping=list(zip(variables, non_trainable, strict=True))) as scope:
            statistics.moved(self._normalizations, moments)
        non_trainable = [scope.get_current_value(variable) for variable in variables]
        return trainable, optimizer, non_trainable

    def _gradients(
        self, trainable: Any, non_trainable: Any, optimizer: Any, metrics: Any, batch: Any, share: Any, scales: Any
    ) -> tuple[Any, ...]:
        """One forward and backward pass, as in Keras's train_step; gradients of this micro-batch's part."""
        x, y, sample_weight = batch

        def objective(trainable: Any) -> tuple[Any, Any]:
            with statistics.recorded(self.model) as notes, losses.scaled(self.model, scales, self._see_mask):
                loss, extra = self.model.compute_loss_and_updates(
                    trainable,
                    non_trainable,
                    metrics,
                    x,
                    y,
                    sample_weight,
                    training=True,
                    optimizer_variables=optimizer,
                )
            losses.check_scalar(loss)
            noted = notes.mine()
            self._normalizations = [entry.layer for entry in noted]
            return loss * jnp.asarray(share, loss.dtype), (extra, statistics.packed(noted))

        (_, (extra, moments)), gradients = jax.value_and_grad(objective, has_aux=True)(trainable)
        loss, y_pred, new_non_trainable, new_metrics = extra
        logs, new_metrics = self.model._update_metrics_variables(new_metrics, loss, x, y, y_pred, sample_weight)
        return logs, gradients, moments, new_non_trainable, new_metrics

    def _see_mask(self) -> None:
        self.has_mask = True


def _data_parallel_devices() -> int:
    """Over how many devices Keras spreads a batch; a micro-batch is what one of them holds."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return 1
    mesh = distribution.device_mesh
    return int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])


def _spread(part: feeding.MicroBatch, devices: int) -> feeding.MicroBatch:
    """A part of a batch, laid out over the devices anew; as it is where it does not divide."""
    from keras.src.backend.jax.trainer import _distribute_data

    if part.samples % devices:
        return part
    return feeding.MicroBatch(part.samples, lambda: _distribute_data(part.take()))


def _precision() -> Any:
    return np.float64 if jax.config.read("jax_enable_x64") else np.float32


def _accumulator_dtype(gradient: Any) -> Any:
    return jnp.float64 if gradient.dtype == jnp.float64 else jnp.float32
