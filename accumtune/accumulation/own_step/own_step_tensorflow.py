"""Accumulates with a model's own `train_step` on TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation import noise_scale
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.engines import gradient_sums as sums
from accumtune.accumulation.engines import tensor_slices as tensors
from accumtune.accumulation.engines.engine_tensorflow import TensorFlowTraining, Window
from accumtune.accumulation.losses import loss_shares
from accumtune.accumulation.own_step import interception
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step import own_trial_tensorflow as own_trial
from accumtune.accumulation.window import Accumulation, shares


class OwnStepTensorFlow(TensorFlowTraining):
    """Trains one window per call, with the model's own step on each micro-batch."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        super().__init__(model, accumulation)
        if self.replicas.number > 1:
            raise own.refusal(model, "and it is spread over several replicas.", "train it on one device.")
        self._form = 3
        self._switches: dict[str, Any] = {}
        self._certificate: own.Certificate | None = None
        self._only = self._compiled(self._whole_step, around=self._whole_window)
        self._first = self._compiled(self._first_micro_step, around=self._recording)
        self._next = self._compiled(self._next_micro_step, around=self._recording)
        self._last = self._compiled(self._last_micro_step, around=self._recording_and_updating)

    def _train(self, window: Window, is_sized: bool) -> Any:
        model = self.model
        before, now = (self._form, self._switches), (window[0][0].form, trials.switches(model))
        self._form, self._switches = now
        self._ghosts.check_window([step[0].samples for step in window])
        first = window[0][0].take()
        known_samples.note(model, first)
        if self._certificate is None or now != before:
            self._certificate = own_trial.certified(model, [step[0].take for step in window], self._form)
            own.accept(model, self._certificate)
        samples = [step[0].samples for step in window]
        # Of the logged losses of outputs: plain Keras weights batches by their samples only if it knows their number.
        weights = [tensors.scalar(weight) for weight in (samples if is_sized else shares(samples))]
        if len(window) == 1:
            return self._only(first, weights[0])
        listener = noise_scale.listening(model, samples)
        parts = list(zip([tensors.scalar(share) for share in shares(samples)], weights, strict=True))
        moments: Any = ()
        leaves: Any = None
        batch: Any = first
        del first
        for index, part in enumerate(parts):
            step = window.pop(0)[0]
            batch = step.take() if index else batch
            if index == 0:
                leaves, moments = self._first(batch, *part)
            elif window:
                leaves, moments = self._next(batch, *part, moments, leaves)
            else:
                leaves = self._last(batch, *part, moments, leaves)
            batch = None  # freed before the next one is taken
            listener(index, self._squared_norm)
        return tree.pack_sequence_as(self._structure, list(leaves))

    @contextlib.contextmanager
    def _recording_and_updating(self) -> Iterator[None]:
        with self._recording(), self._updating():
            yield

    # The compiled functions

    def _whole_step(self, batch: Any, weight: Any) -> Any:
        return self._stepped(batch, weight)

    def _first_micro_step(self, batch: Any, share: Any, weight: Any) -> tuple[Any, Any]:
        return self._micro_step(batch, share, weight, None)

    def _next_micro_step(self, batch: Any, share: Any, weight: Any, moments: Any, leaves: Any) -> tuple[Any, Any]:
        leaves, mine = self._micro_step(batch, share, weight, leaves)
        return leaves, statistics.combined(moments, mine)

    def _micro_step(self, batch: Any, share: Any, weight: Any, leaves: Any) -> tuple[Any, Any]:
        """Runs a micro-step that is not the last, of which only gradients, metrics, seeds and logs are kept."""

        def handed(gradients: list[Any], variables: list[Any], apply: Callable[[list[Any]], Any]) -> None:
            self._sum_up(gradients, variables, share, is_first=leaves is None)

        with interception.Overlay() as overlay:
            leaves = self._run(batch, share, weight, leaves, handed)
        overlay.keep(self.model)
        return leaves, self._noted()

    def _last_micro_step(self, batch: Any, share: Any, weight: Any, moments: Any, leaves: Any) -> Any:
        def handed(gradients: list[Any], variables: list[Any], apply: Callable[[list[Any]], Any]) -> None:
            self._sum_up(gradients, variables, share, is_first=False)
            statistics.moved(self._normalizations_of(), statistics.combined(moments, self._noted()))
            apply(
                [
                    tf.cast(total.value(), variable.dtype) if is_there else None
                    for variable, total, is_there in zip(
                        variables, self._accumulators, self._known().has_gradient, strict=True
                    )
                ]
            )

        return self._run(batch, share, weight, leaves, handed)

    def _normalizations_of(self) -> list[Any]:
        self._noted()
        return self._normalizations

    def _run(self, batch: Any, share: Any, weight: Any, leaves: Any, handed: interception.Handed) -> list[Any]:
        model, known = self.model, self._known()
        with (
            interception.weighed_scalars(model, share, known.scalars),
            interception.one_update(model, handed),
        ):
            logs = self._stepped(batch, weight)
        self._structure = tree.map_structure(lambda _: None, logs)
        return interception.joined_logs(leaves, logs, known.logs, share)

    def _stepped(self, batch: Any, weight: Any) -> Any:
        self._ghosts.see(batch[0])
        with loss_shares.scaled(self.model, None, lambda: None, weight):
            return self.model.train_step(interception.packed(batch, self._form))

    def _known(self) -> own.Certificate:
        assert self._certificate is not None
        return self._certificate

    def _sum_up(self, gradients: list[Any], variables: list[Any], share: Any, is_first: bool) -> None:
        known = self._known()
        if not self._accumulators:
            with tf.init_scope():
                self._weights = variables
                self._accumulators = [sums.accumulator(variable) for variable in variables]
        if tuple(gradient is not None for gradient in gradients) != known.has_gradient or (
            list(map(id, variables)) != list(map(id, self._weights))
        ):
            raise own.refusal(self.model, "it hands other variables to its optimizer than before.", trials.SAME)
        for variable, total, gradient in zip(variables, self._accumulators, gradients, strict=True):
            if gradient is None:
                continue
            if known.reduction == own.MEAN and not getattr(variable, "overwrite_with_gradient", False):
                gradient = _times(gradient, share, total.dtype)
            if is_first:
                sums.put(total, gradient, in_place=not self.model.jit_compile)
            else:
                sums.add(variable, total, gradient)


def _times(gradient: Any, share: Any, dtype: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, dtype) * tf.cast(share, dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype) * tf.cast(share, dtype)
