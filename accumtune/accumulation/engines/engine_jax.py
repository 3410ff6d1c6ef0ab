"""The train function on JAX: a Python loop over a jitted micro-step, and one jitted update.

The model's state is donated to the update only, so an interrupted window leaves the model intact. Values that a
micro-step passes to the next one (sums, metrics, changed non-trainable variables such as seeds) are donated from
micro-step to micro-step; the first one gets sums of 0, so that all run one program, compiled once. Unchanged values are
not returned, because a compiled function would copy them, frozen weights too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation import noise_scale
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.data import batches as feeding
from accumtune.accumulation.engines import carried_state as carrying
from accumtune.accumulation.ghost_batch import GhostBatches
from accumtune.accumulation.losses import batch_metrics
from accumtune.accumulation.losses import loss_shares as losses
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.whole_batch_jax import TwoPasses
from accumtune.accumulation.window import Accumulation, factors, shares

# Compiles a step's functions; memory/device_jax.py replaces it to measure memory.
compiled: Callable[..., Any] = jax.jit


class JaxTraining:
    """Trains one window per call; Keras passes the model's state and the iterator of an epoch."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.accumulation = accumulation
        self.is_jitted = bool(model.jit_compile and not model.run_eagerly)
        self.has_mask = False
        self._metrics = batch_metrics.WholeWindow(model, is_able=keras.distribution.distribution() is None)
        self._traced: set[Any] = set()
        self._normalizations: list[Any] = []
        self._ghosts = GhostBatches(model, accumulation)
        state = trainable, non_trainable, optimizer, metrics = _shardings(model)
        self._carried = carried = (trainable, _replicated(), non_trainable, metrics)
        self._only = self._jitted(self._only_step, (None, state), donate=(0,))
        # Without a compiler it is a window's first micro-step; else it is only traced, for what it would pass on.
        self._first = self._jitted(self._first_step, (None, carried))
        self._begin: dict[Any, Callable[..., Any]] = {}  # by the kind of batch
        self._next = self._jitted(self._next_step, (None, carried), donate=(0,))
        self._update = self._jitted(self._update_step, (trainable, optimizer, non_trainable), donate=(0, 1))
        # The compiler keeps only what the denominators need of this forward pass: masks, rarely predictions.
        self._count = self._jitted(self._count_step)
        self._squared_norm = self._jitted(self._squared_norm_step)

    def __call__(self, state: Any, iterator: Any) -> tuple[Any, Any]:
        """Runs `steps_per_execution` windows; returns logs and state. Raises StopIteration when the data end."""
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
        self._ghosts.check_window([part.samples for part in window])
        batch = window[0].take()
        known_samples.note(self.model, batch)
        is_whole = whole.is_wanted(self.model)
        if is_whole:
            whole.check_devices(self.model, _devices())
        if len(window) == 1:
            return self._only(state, batch)
        if is_whole:
            first, batch = [batch], None
            return self._train_on_whole_batch(state, window, first)
        trainable, non_trainable, optimizer, metrics = state
        scales = self._scales(state, window, batch)
        listener = noise_scale.listening(self.model, [part.samples for part in window])
        logs: Any = None
        carried: Any = self._begun(state, batch, *scales[0]) if self.is_jitted else None
        self._metrics.forget()
        for index in range(len(scales)):
            part = window.pop(0)
            batch = part.take() if index else batch
            inputs = (trainable, non_trainable, optimizer, batch, *scales[index])
            result = self._first(metrics, *inputs) if carried is None else self._next(carried, *inputs)
            (logs, outputs), carried = result
            self._metrics.take(outputs)
            del inputs, result, outputs
            batch = None  # freed before the next one is taken
            listener(index, functools.partial(self._squared_norm, carried[0]))
        sums, moments, changed, metrics = carried
        del carried
        non_trainable = carrying.with_changes(changed, non_trainable)
        trainable, optimizer, changed = self._update(trainable, optimizer, sums, moments, non_trainable)
        logs, metrics = self._metrics.update_within(metrics, logs)
        return logs, (trainable, carrying.with_changes(changed, non_trainable), optimizer, metrics)

    @functools.cached_property
    def two_passes(self) -> TwoPasses:
        """The two passes of a loss over the whole effective batch."""
        return TwoPasses(self)

    def _train_on_whole_batch(self, state: Any, window: list[Any], first: list[Any]) -> tuple[Any, Any]:
        trainable, _, optimizer, _ = state
        logs, sums, moments, non_trainable, metrics = self.two_passes.sum_up(state, window, first)
        trainable, optimizer, changed = self._update(trainable, optimizer, sums, moments, non_trainable)
        return logs, (trainable, carrying.with_changes(changed, non_trainable), optimizer, metrics)

    def _begun(self, state: Any, batch: Any, *weights: Any) -> Any:
        """Returns what the first micro-step of a window is given instead of sums so far."""
        trainable, non_trainable, optimizer, metrics = state
        kind = jax.tree.structure(batch), tuple(shape[1:] for shape in feeding.shapes(batch))
        if kind not in self._begin:
            traced = self._first.trace(metrics, trainable, non_trainable, optimizer, batch, *weights)
            step = functools.partial(self._begin_step, traced.out_info)
            self._begin[kind] = self._jitted(step, self._carried)
        return self._begin[kind](non_trainable, metrics)

    # The weights of micro-batches

    def _scales(self, state: Any, window: list[Any], first: Any) -> list[tuple[Any, Any]]:
        """Returns share and factors of each micro-batch; `first` is the first one's data."""
        samples = [part.samples for part in window]
        parts = [np.asarray(part, _precision()) for part in shares(samples)]
        compiled = losses.flat_losses(self.model)
        plain = [factors(samples) if losses.is_sum(loss) else [1.0] * len(window) for loss in compiled]
        rows = np.asarray(plain, _precision()).reshape(len(compiled), len(window)).T
        if self._must_count(state, window, compiled, (first, parts[0], rows[0])):
            rows = self.counted_factors(window, state)
        return list(zip(parts, rows, strict=True))

    def counted_factors(self, parts: list[Any], state: Any) -> Any:
        """Returns the factors of the losses, for each micro-batch of a window or of a batch of validation.

        Args:
            state: of training or of validation, both of which begin with the trainable and other variables.
        """
        samples, (trainable, non_trainable) = [part.samples for part in parts], state[:2]
        columns = np.asarray([self._count(trainable, non_trainable, part.take()) for part in parts]).T.tolist()
        compiled = enumerate(losses.flat_losses(self.model))
        counted = [factors(samples, None if losses.is_sum(loss) else columns[i]) for i, loss in compiled]
        return np.asarray(counted, _precision()).T

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
            # Tracing shows whether predictions have a mask; JAX keeps the trace for the run.
            trainable, non_trainable, optimizer, metrics = state
            self._first.trace(metrics, trainable, non_trainable, optimizer, *first)
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

    def _jitted(self, function: Any, out_shardings: Any = None, donate: tuple[int, ...] = ()) -> Any:
        if not self.is_jitted:
            return function
        if keras.distribution.distribution() is None:
            return compiled(function, donate_argnums=donate)
        # As in Keras: otherwise results have another layout, for which each function would be compiled again.
        return compiled(function, donate_argnums=donate, out_shardings=out_shardings)

    def _only_step(self, state: Any, batch: Any) -> Any:
        with self._ghosts.active(batch[0]):
            return self.model.train_step(state, batch)

    def _first_step(self, metrics: Any, trainable: Any, non_trainable: Any, *inputs: Any) -> tuple[Any, Any]:
        logs, gradients, moments, new, metrics = self._gradients(metrics, trainable, non_trainable, *inputs)
        return logs, (carrying.as_sums(gradients), moments, carrying.changed(new, non_trainable), metrics)

    def _begin_step(self, first: Any, non_trainable: Any, metrics: Any) -> Any:
        """Returns sums and moments of nothing, and copies, since micro-steps use up what they are given.

        Args:
            first: the shapes of what `_first_step` returns.
        """
        _, shapes = first
        pairs = zip(shapes[2], non_trainable, strict=True)
        changed = [None if shape is None else value for shape, value in pairs]
        return *carrying.zeros(shapes[:2]), *carrying.copies((changed, metrics))

    def _next_step(self, carried: Any, trainable: Any, non_trainable: Any, *inputs: Any) -> tuple[Any, Any]:
        sums, moments_so_far, changed, metrics = carried
        so_far = carrying.with_changes(changed, non_trainable)
        logs, gradients, moments, new, metrics = self._gradients(metrics, trainable, so_far, *inputs)
        added = carrying.added(self.model.trainable_variables, sums, gradients)
        moments = statistics.combined(moments_so_far, moments)
        return logs, (added, moments, carrying.changed(new, non_trainable), metrics)

    def _squared_norm_step(self, accumulators: Any) -> Any:
        pairs = zip(self.model.trainable_variables, accumulators, strict=True)
        sums = [total for variable, total in pairs if not getattr(variable, "overwrite_with_gradient", False)]
        return sum(jnp.sum(jnp.square(total)) for total in sums)

    def _update_step(
        self, trainable: Any, optimizer: Any, sums: Any, moments: Any, non_trainable: Any
    ) -> tuple[Any, Any, Any]:
        from keras import StatelessScope

        gradients = [total.astype(value.dtype) for total, value in zip(sums, trainable, strict=True)]
        trainable, optimizer = self.model.optimizer.stateless_apply(optimizer, gradients, trainable)
        variables = self.model.non_trainable_variables
        with StatelessScope(state_mapping=list(zip(variables, non_trainable, strict=True))) as scope:
            statistics.moved(self._normalizations, moments)
        moved = [scope.get_current_value(variable) for variable in variables]
        return trainable, optimizer, carrying.changed(moved, non_trainable)

    def _gradients(
        self, metrics: Any, trainable: Any, non_trainable: Any, optimizer: Any, batch: Any, share: Any, scales: Any
    ) -> tuple[Any, ...]:
        """Runs a forward and backward pass, as Keras's train_step; returns the gradients of this micro-batch's part."""
        x, y, sample_weight = batch

        def objective(trainable: Any) -> tuple[Any, Any]:
            with (
                statistics.recorded(self.model) as notes,
                self._ghosts.active(x),
                batch_metrics.tracking(self.model, share),
                losses.scaled(self.model, scales, self._see_mask),
            ):
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
        with self._metrics.waiting(), batch_metrics.tracking(self.model, share):
            logs, new_metrics = self.model._update_metrics_variables(new_metrics, loss, x, y, y_pred, sample_weight)
        outputs = self._metrics.outputs(y, y_pred, sample_weight)
        return (logs, outputs), gradients, moments, new_non_trainable, new_metrics

    def _see_mask(self) -> None:
        self.has_mask = True


def _shardings(model: Any) -> tuple[Any, Any, Any, Any]:
    """Returns the shardings of a model's state: trainable, non-trainable, optimizer's and metrics' variables."""
    if keras.distribution.distribution() is None:
        return None, None, None, None
    shardings: tuple[Any, Any, Any, Any] = model._get_state_sharding_spec()
    return shardings


def _replicated() -> Any:
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    return jax.sharding.NamedSharding(distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec())


def _devices() -> int:
    """Returns the number of devices over which Keras spreads a model or its data."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else int(np.size(distribution.device_mesh.devices))


def _data_parallel_devices() -> int:
    """Returns the number of devices over which Keras spreads a batch; each holds a micro-batch."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return 1
    mesh = distribution.device_mesh
    return int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])


def _spread(part: feeding.MicroBatch, devices: int) -> feeding.MicroBatch:
    """Spreads a part of a batch over the devices, if its samples can be divided among them."""
    from keras.src.backend.jax.trainer import _distribute_data

    if part.samples % devices:
        return part
    return feeding.MicroBatch(part.samples, lambda: _distribute_data(part.take()))


def _precision() -> Any:
    return np.float64 if jax.config.read("jax_enable_x64") else np.float32
