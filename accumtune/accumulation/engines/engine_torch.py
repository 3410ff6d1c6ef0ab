"""The train function on torch: each micro-batch's part is backpropagated into `.grad`, followed by one update."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from keras import tree

from accumtune.accumulation import moving_statistics, noise_scale, optimizers
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.data import batches as feeding
from accumtune.accumulation.engines import grouped_update
from accumtune.accumulation.ghost_batch import GhostBatches
from accumtune.accumulation.losses import batch_metrics, loss_shares
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.blank_predictions import BlankPredictions
from accumtune.accumulation.losses.whole_batch_torch import TwoPasses
from accumtune.accumulation.window import Accumulation, factors, shares


class TorchTraining:
    """Trains one window per call; Keras passes a list with one batch, or with one window of batches."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        self.model = model
        self.accumulation = accumulation
        self.has_mask: bool | None = None
        self._metrics = batch_metrics.WholeWindow(model)
        self._normalizations: list[Any] = []
        self._ghosts = GhostBatches(model, accumulation)
        self._moments: Any = ()
        self._blank = BlankPredictions()
        self._part = torch.compile(self._backward) if model._should_torch_compile() else self._backward

    def __call__(self, data: Any) -> Any:
        """Runs `steps_per_execution` windows; returns the logs."""
        logs = None
        size, rows = self.accumulation.micro_batch_size, self.model._accumtune_rows
        for batch in data:
            batches = batch.micro_batches if isinstance(batch, feeding.Window) else [batch]
            logs = self._train([part for one in batches for part in feeding.micro_batches(one, size, rows)])
        return logs

    def _train(self, window: list[feeding.MicroBatch]) -> Any:
        model = self.model
        self._ghosts.check_window([part.samples for part in window])
        model.zero_grad()  # an interrupted window may have left gradients
        self._normalizations, self._moments = [], ()
        self._metrics.forget()
        batch = window[0].take()
        known_samples.note(model, batch)
        if len(window) == 1:
            logs, _ = self._only(batch)
        elif whole.is_wanted(model):
            first, batch = [batch], None
            logs, totals = self.two_passes.sum_up(window, first)
            self._restore(totals)
        else:
            samples = [part.samples for part in window]
            parts, scales = _numbers(shares(samples)), _numbers(self._factors(window, batch, samples))
            sums: list[Any] = [None] * len(model.trainable_weights)
            listener = noise_scale.listening(model, samples)
            for index in range(len(parts)):
                part = window.pop(0)
                batch = part.take() if index else batch
                with (
                    moving_statistics.recorded(model) as notes,
                    self._ghosts.active(batch[0]),
                    self._metrics.waiting(),
                    batch_metrics.tracking(model, parts[index]),
                ):
                    logs, outputs = self._part(batch, parts[index], scales[index])
                self._metrics.take(outputs)
                self.note_moments(notes.mine())
                sums = self.collected(sums)
                batch = None  # freed before the next one is taken
                listener(index, functools.partial(_squared_norm, model.trainable_weights, sums))
            self._restore(sums)
        self._update()
        with torch.no_grad():
            return self._metrics.update(logs)

    @functools.cached_property
    def two_passes(self) -> TwoPasses:
        """The two passes of a loss over the whole effective batch."""
        return TwoPasses(self)

    def _only(self, batch: Any) -> Any:
        with self._ghosts.active(batch[0]):
            return self._part(batch, _numbers(1.0), None)

    def _factors(
        self, window: list[feeding.MicroBatch], first: tuple[Any, Any, Any], samples: list[int]
    ) -> list[list[float]]:
        """Returns the factors of the losses, one row per micro-batch; `first` is the first one's data."""
        compiled = loss_shares.flat_losses(self.model)
        if not compiled:
            return [[] for _ in window]
        if self.has_mask is None:
            y_pred = self._look(first[0])
            self.has_mask = any(loss_shares.mask_of(leaf) is not None for leaf in tree.flatten(y_pred))
        has_weight = first[2] is not None
        is_even = feeding.same_shapes(window, self.accumulation, self.model._accumtune_rows)
        must_count = self.has_mask or not is_even
        if must_count or any(loss_shares.may_depend_on_data(loss, has_weight) for loss in compiled):
            counts = [self._count(part.take()) for part in window]
            columns = [
                factors(samples, None if loss_shares.is_sum(loss) else [row[index] for row in counts])
                for index, loss in enumerate(compiled)
            ]
        else:
            columns = [factors(samples) if loss_shares.is_sum(loss) else [1.0] * len(window) for loss in compiled]
        return [list(row) for row in zip(*columns, strict=True)]

    def counted_factors(self, parts: list[feeding.MicroBatch]) -> list[Any]:
        """Returns the factors of the losses, for each micro-batch of a batch of validation."""
        return list(_numbers(self._factors(parts, parts[0].take(), [part.samples for part in parts])))

    def _count(self, batch: Any) -> list[float]:
        x, y, sample_weight = batch

        def count(y_pred: Any) -> list[Any]:
            with torch.no_grad(), loss_shares.counting(self.model) as counts:
                self.model._compile_loss(y, y_pred, sample_weight)
            return counts

        counts = None if self.has_mask else self._blank.counts(x, count)
        return [float(number) for number in count(self._look(x))] if counts is None else counts

    def _look(self, x: Any) -> Any:
        with torch.no_grad():
            y_pred = self._predict(x, training=False)
        self._blank.learn(x, y_pred)
        return y_pred

    def _predict(self, x: Any, training: bool) -> Any:
        return self.model(x, training=training) if self.model._call_has_training_arg else self.model(x)

    def _backward(self, batch: Any, share: Any, scales: Any) -> Any:
        """Runs one forward and backward pass, as Keras's train_step; adds this micro-batch's part to `.grad`."""
        model = self.model
        x, y, sample_weight = batch
        y_pred = self._predict(x, training=True)
        with loss_shares.scaled(model, scales, self._see_mask):
            loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        loss_shares.check_scalar(loss)
        model._loss_tracker.update_state(loss, sample_weight=feeding.samples_of(batch))
        if model.trainable_weights:
            model.optimizer.scale_loss(loss * share.to(loss.dtype)).backward()
        logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs, () if scales is None else self._metrics.outputs(y, y_pred, sample_weight)

    def _see_mask(self) -> None:
        self.has_mask = True

    def _restore(self, sums: list[Any]) -> None:
        for variable, total in zip(self.model.trainable_weights, sums, strict=True):
            if total is not None:
                variable.value.grad = total.to(variable.value.dtype)

    def note_moments(self, noted: list[Any]) -> None:
        """Combines the moments of a micro-batch with those of the window so far."""
        with torch.no_grad():
            if self._normalizations:
                self._moments = moving_statistics.combined(self._moments, moving_statistics.packed(noted))
            else:
                self._normalizations = [entry.layer for entry in noted]
                self._moments = moving_statistics.packed(noted)

    def collected(self, sums: list[Any]) -> list[Any]:
        """Moves sums that `.grad` cannot hold out of it, after a backward pass."""
        return _collected(self.model.trainable_weights, sums)

    def _update(self) -> None:
        model = self.model
        weights = model.trainable_weights[:]
        with torch.no_grad():
            if weights:
                with grouped_update.updating_in_groups(optimizers.updating(model.optimizer)):
                    model.optimizer.apply([weight.value.grad for weight in weights], weights)
            else:
                warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            moving_statistics.moved(self._normalizations, self._moments)
        model.zero_grad()  # no gradient is kept beyond its window


def _numbers(values: Any) -> Any:
    """Returns numbers as a tensor, because compiled code would be recompiled for each Python number."""
    return torch.tensor(values, dtype=torch.float64)


def _collected(variables: list[Any], sums: list[Any]) -> list[Any]:
    """Moves gradients that `.grad` would sum with less precision than float32 into float32 sums."""
    for index, variable in enumerate(variables):
        gradient = variable.value.grad
        if gradient is None:
            continue
        overwrites = getattr(variable, "overwrite_with_gradient", False)  # float8 scales: a new value, not a sum
        if gradient.dtype in (torch.float32, torch.float64) and not overwrites:
            continue
        so_far = None if overwrites else sums[index]
        gradient = gradient.to(torch.float32)
        sums[index] = gradient if so_far is None else so_far.add_(gradient)
        variable.value.grad = None
    return sums


def _squared_norm(variables: list[Any], sums: list[Any]) -> Any:
    """Returns the squared norm of the sums so far, in `sums` or in `.grad`."""
    pairs = [
        (variable, variable.value.grad if total is None else total)
        for variable, total in zip(variables, sums, strict=True)
        if not getattr(variable, "overwrite_with_gradient", False)
    ]
    norms = torch._foreach_norm([total for _, total in pairs if total is not None])
    return torch.stack(norms).square().sum()
