"""The two passes of a loss over the whole effective batch on torch: see losses/whole_batch_loss.py.

They run eagerly, whatever `jit_compile` says.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from keras import tree

from accumtune.accumulation import moving_statistics
from accumtune.accumulation.losses import batch_metrics, loss_shares
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.leftovers import Leftovers
from accumtune.accumulation.window import shares


class TwoPasses:
    """Sums the gradients of a window.

    Args:
        engine: the `TorchTraining`, which predicts and keeps the sums.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.model
        self._replay = whole.Replay()
        self._states = whole.seed_states(self.model)
        self._outputs = whole.Outputs()
        self._left = Leftovers(self.model)

    def sum_up(self, window: list[Any], first: list[Any]) -> tuple[Any, list[Any]]:
        """Runs both passes of a window; empties the lists. Returns the logs, and sums that `.grad` cannot hold.

        Args:
            window: its micro-batches.
            first: the data of the first one.
        """
        samples = [part.samples for part in window]
        of_window = shares(samples)
        randomness, losses_of_layers, given = self._first_pass(window, first, of_window)
        leaves, masks, x, y, sample_weight = whole.joined_all(given, samples, _concatenated)
        del given
        self._replay.begin(leaves)
        of_layers = whole.mean_losses(losses_of_layers, of_window)
        logs, gradients, of_layers = self._loss(leaves, masks, x, y, sample_weight, of_layers, sum(samples))
        sums = self.engine.collected([None] * len(self.model.trainable_weights))
        del leaves, masks, x, y, sample_weight
        with self._randomness_kept():
            for part, size, start in zip(of_window, samples, itertools.accumulate(samples, initial=0), strict=False):
                rows = slice(start, start + size)
                _restore(self._states, randomness.pop(0))
                x = window.pop(0).take()[0]
                outputs, added = self._again_step(x)
                pairs = [
                    *(
                        (leaf, gradient[rows])
                        for leaf, gradient in zip(outputs, gradients, strict=True)
                        if gradient is not None
                    ),
                    *(
                        (loss, gradient * part)
                        for loss, gradient in zip(added, of_layers, strict=True)
                        if gradient is not None
                    ),
                ]
                pairs = [pair for pair in pairs if pair[0].requires_grad]
                self._replay.compare([None if leaf is None else leaf.detach() for leaf in outputs], rows)
                del x, outputs, added
                if pairs:
                    targets, cotangents = zip(*pairs, strict=True)
                    torch.autograd.backward(targets, cotangents)
                    del targets, cotangents
                del pairs
                sums = self.engine.collected(sums)
        self._replay.end()
        self._left.end()
        return logs, sums

    def test(self, parts: list[Any]) -> Any:
        """Evaluates a batch given as micro-batches; returns the logs."""
        with torch.no_grad():
            return self._evaluated(parts)

    def _evaluated(self, parts: list[Any]) -> Any:
        samples = [part.samples for part in parts]
        losses_of_layers, given = [], []
        for part in parts:
            x, y, sample_weight = part.take()
            with self._left.noted():
                leaves, masks, added = self._flat(self.engine._predict(x, training=False))
            losses_of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        leaves, masks, x, y, sample_weight = whole.joined_all(given, samples, _concatenated)
        del given
        of_layers = whole.mean_losses(losses_of_layers, shares(samples))
        y_pred = self._outputs.packed(leaves, masks)
        with self._left.hidden():
            self._value(x, y, y_pred, sample_weight, of_layers, sum(samples), training=False)
            return self.model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _first_pass(self, window: list[Any], first: list[Any], of_window: list[float]) -> tuple[Any, ...]:
        """Returns the random states, losses of layers, and the outputs and data to join, of each micro-batch."""
        randomness, of_layers, given = [], [], []
        for part, share in zip(window, of_window, strict=True):
            x, y, sample_weight = first.pop() if first else part.take()
            randomness.append(_random_state(self._states))
            with (
                torch.no_grad(),
                moving_statistics.recorded(self.model) as notes,
                self.engine._ghosts.active(x),
                batch_metrics.tracking(self.model, share),
            ):
                leaves, masks, added = self._forward_step(x)
            self.engine.note_moments(notes.mine())
            of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        return randomness, of_layers, given

    def _forward_step(self, x: Any) -> tuple[Any, Any, Any]:
        with self._left.noted(), whole.without_state(self.model, self._states):
            y_pred = self.engine._predict(x, training=True)
        return self._flat(y_pred)

    def _flat(self, y_pred: Any) -> tuple[Any, Any, Any]:
        return *self._outputs.flat(y_pred), whole.losses_of_layers(self.model)

    def _again_step(self, x: Any) -> tuple[Any, Any]:
        with (
            moving_statistics.recorded(self.model),
            self.engine._ghosts.active(x),
            whole.metrics_at_rest(self.model),
        ):
            y_pred = self.engine._predict(x, training=True)
            return tree.flatten(y_pred), whole.losses_of_layers(self.model)

    def _loss(
        self, leaves: Any, masks: Any, x: Any, y: Any, sample_weight: Any, of_layers: Any, count: int
    ) -> tuple[Any, Any, Any]:
        """Computes the window's loss, its gradients with respect to outputs and losses of layers, and the metrics."""
        model = self.model
        leaves, of_layers = _leaves_of_a_graph(leaves), _leaves_of_a_graph(of_layers)
        y_pred = self._outputs.packed(leaves, masks)
        with self._left.hidden():
            loss = self._value(x, y, y_pred, sample_weight, of_layers, count, training=True)
            if loss.requires_grad:
                model.optimizer.scale_loss(loss).backward()
            logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs, *([None if leaf is None else leaf.grad for leaf in group] for group in (leaves, of_layers))

    def _value(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any, of_layers: Any, count: int, *, training: bool
    ) -> Any:
        """Returns Keras's loss; updates the logged loss."""
        model = self.model
        with whole.without_changes(model, self._states), whole.with_losses_of_layers(model, of_layers):
            loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        loss_shares.check_scalar(loss)
        model._loss_tracker.update_state(loss, sample_weight=count)
        return loss

    @contextlib.contextmanager
    def _randomness_kept(self) -> Iterator[None]:
        """Restores all random states after the second pass."""
        kept = _random_state(self._states)
        try:
            yield
        finally:
            _restore(self._states, kept)


def _concatenated(leaves: list[Any]) -> Any:
    """Joins tensors, or the NumPy arrays that Keras's `train_on_batch` passes on as it got them."""
    return np.concatenate(leaves) if isinstance(leaves[0], np.ndarray) else torch.cat(leaves)


def _leaves_of_a_graph(leaves: Any) -> list[Any]:
    return [leaf if leaf is None or not leaf.is_floating_point() else leaf.detach().requires_grad_() for leaf in leaves]


def _random_state(states: list[Any]) -> tuple[Any, ...]:
    """Returns the states of Keras's generators and of torch's own, from which torch modules draw."""
    with torch.no_grad():
        seeds = [state.value.clone() for state in states]
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return seeds, torch.get_rng_state(), on_gpu


def _restore(states: list[Any], kept: tuple[Any, ...]) -> None:
    seeds, on_cpu, on_gpu = kept
    with torch.no_grad():
        for state, seed in zip(states, seeds, strict=True):
            state.assign(seed)
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu)
