"""Validates in micro-batches, while metrics over the batch still get whole batches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from accumtune.accumulation.data.batches import MicroBatch, micro_batches, samples_of
from accumtune.accumulation.losses import batch_metrics, loss_shares, whole_batch_loss
from accumtune.accumulation.losses.output_losses import output_loss_weights
from accumtune.accumulation.own_step.own_train_step import has_own_step, has_own_test_step
from accumtune.accumulation.patched_attributes import replaced

# A part of a batch, with the factors of its losses, is given to `test_step` under these names.
_PART, _FACTORS = "accumtune_part", "accumtune_factors"


def needs_whole_batches(model: Any) -> bool:
    """Returns whether the loss of validation depends on which micro-batches make a batch.

    Then `fit` validates in the batches of plain Keras, each in micro-batches. Not for a `train_step` or `test_step` of
    the model's own, which get their batches as they are, and not on several devices.
    """
    if has_own_step(model) or has_own_test_step(model):
        return False
    if whole_batch_loss.is_wanted(model):
        return True
    return loss_shares.may_need_factors(model) and not batch_metrics.is_spread(model)


class Validation:
    """A test function of Keras that processes its batches in parts.

    Parts are micro-batches while a `fit` requests that (`_accumtune_validation_size`). Each compiled loss of a part is
    multiplied by its factor, as in training (see window.py), so that the loss is that of the batch. Metrics over the
    batch get whole batches, or as many samples at a time as a `fit` requests (`_accumtune_metric_batch_size`).

    Args:
        make: makes Keras create `model.test_function`, from the present `model.test_step`.
    """

    def __init__(self, model: Any, make: Callable[[], Any]) -> None:
        self._model = model
        self._metrics = batch_metrics.WholeWindow(model) if batch_metrics.may_have_own_metrics(model) else None
        self._weights = output_loss_weights(model)
        self._needs_whole_batches = needs_whole_batches(model)
        with self._step_gives_outputs():
            make()
        self._test = model.test_function

    def __call__(self, *arguments: Any) -> Any:
        """Called by Keras with `(iterator)`, on JAX with `(state, iterator)`; returns logs, on JAX with the state."""
        size = self._model._accumtune_validation_size
        is_taken_apart = size is not None or self._metrics is not None
        if self._weights is not None and self._weights.is_cut_otherwise():
            is_taken_apart = True
        if not is_taken_apart or batch_metrics.is_replicated(self._model):
            if self._weights is not None:
                self._weights.leave_to_keras()
            return self._test(*arguments)
        *state, batches = arguments
        if size is not None and self._needs_whole_batches and whole_batch_loss.is_wanted(self._model):
            logs, state = self._in_two_passes(batches, size, state)
        else:
            logs, state = self._in_parts(batches, size, state)
        if logs is None:
            raise StopIteration
        return (logs, *state) if state else logs

    def _in_parts(self, batches: Any, size: int | None, state: list[Any]) -> tuple[Any, list[Any]]:
        logs = None
        if self._weights is not None:
            self._weights.look_at(batches)
        for batch in itertools.islice(batches, self._model.steps_per_execution):
            parts: list[Any] = [None] if size is None else _parts(batch, size)
            factors: Any = itertools.repeat(None, len(parts))
            if self._needs_whole_batches and len(parts) > 1:
                factors = self._model.train_function.counted_factors(parts, *state)
            for micro_batch, row in zip(parts, factors, strict=True):
                part = batch if micro_batch is None else micro_batch.take()
                pieces = [part] if self._weights is None else self._weights.pieces(part, samples_of(batch))
                for piece in pieces:
                    logs, state = self._take(piece if row is None else {_PART: piece, _FACTORS: row}, state)
            logs, state = self._update_metrics(logs, state)
        return logs, state

    def _in_two_passes(self, batches: Any, size: int, state: list[Any]) -> tuple[Any, list[Any]]:
        """Evaluates a loss over the batch, and metrics, on the outputs of all micro-batches together."""
        import keras

        logs, others = None, []
        if keras.backend.backend() == "tensorflow":
            from accumtune.accumulation.engines.tensor_slices import has_static_batch

            others = [has_static_batch(self._model, batches)]
        for batch in itertools.islice(batches, self._model.steps_per_execution):
            result = self._model.train_function.two_passes.test(*state, _parts(batch, size), *others)
            logs, *state = result if state else (result,)
        return logs, state

    def _take(self, part: Any, state: list[Any]) -> tuple[Any, list[Any]]:
        with self._step_gives_outputs():
            result = self._test(*state, iter([part])) if state else (self._test([part]),)
        logs, *state = result
        if self._metrics is not None:
            logs, noted = logs
            for outputs in noted:
                self._metrics.take(outputs)
        return logs, state

    def _update_metrics(self, logs: Any, state: list[Any]) -> tuple[Any, list[Any]]:
        if self._metrics is None:
            return logs, state
        size = self._model._accumtune_metric_batch_size if self._model._accumtune_is_validating else None
        if not state:
            return self._metrics.update(logs, size), state
        trainable, non_trainable, metrics = state[0]
        logs, metrics = self._metrics.update_within(metrics, logs, size)
        return logs, [(trainable, non_trainable, metrics)]

    def end(self, logs: Any) -> Any:
        """Passes the remaining samples to the metrics; returns the logs with the results."""
        return logs if self._metrics is None else self._metrics.update(logs)

    def forget(self) -> None:
        """Drops what an interrupted validation has left."""
        if self._metrics is not None:
            self._metrics.forget()
        if self._weights is not None:
            self._weights.begin()

    @contextlib.contextmanager
    def _step_gives_outputs(self) -> Iterator[None]:
        """Makes `test_step` return `(logs, outputs)` instead of logs, if metrics need the outputs of a whole batch.

        Losses are multiplied by the factors of a part. `OutputLossWeights` weights the logged losses of outputs.
        """
        metrics, weights, step = self._metrics, self._weights, self._model.test_step
        if metrics is None and weights is None and not self._needs_whole_batches:
            yield
            return

        def on_jax(state: Any, data: Any) -> Any:
            data, factors = _unpacked(data)
            with self._multiplied(factors):
                if metrics is None:
                    return step(state, data)
                with metrics.noting() as noted:
                    logs, state = step(state, data)
            return (logs, noted), state

        def elsewhere(data: Any) -> Any:
            data, factors = _unpacked(data)
            with self._multiplied(factors), contextlib.nullcontext() if weights is None else weights.applied():
                if metrics is None:
                    return step(data)
                with metrics.noting() as noted:
                    logs = step(data)
            return logs, noted

        import keras

        test_step = on_jax if keras.backend.backend() == "jax" else elsewhere
        with replaced(self._model, {"test_step": test_step}):
            yield

    def _multiplied(self, factors: Any) -> contextlib.AbstractContextManager[None]:
        """Multiplies each compiled loss by its factor, inside the `with` block (run or traced)."""
        return contextlib.nullcontext() if factors is None else loss_shares.scaled(self._model, factors, lambda: None)


def _unpacked(data: Any) -> tuple[Any, Any]:
    """Returns a batch, or a part of one, and the factors of its losses (None: none)."""
    return (data[_PART], data[_FACTORS]) if isinstance(data, dict) and _FACTORS in data else (data, None)


def _parts(batch: Any, size: int) -> list[MicroBatch]:
    import keras
    from keras import tree

    if keras.backend.backend() != "tensorflow":
        return micro_batches(batch, size, None)
    from accumtune.accumulation.engines import tensor_slices

    return micro_batches(tree.map_structure(tensor_slices.as_tensor, batch), size, None, tensor_slices.cut)
