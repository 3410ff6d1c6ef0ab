"""The two passes of a loss over the whole effective batch on TensorFlow: see losses/whole_batch_loss.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation import moving_statistics
from accumtune.accumulation.engines import gradient_sums, tensor_slices
from accumtune.accumulation.losses import batch_metrics, loss_shares
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.leftovers import Leftovers
from accumtune.accumulation.window import shares


class TwoPasses:
    """Sums the gradients of a window in the accumulators of an engine.

    Args:
        engine: the `TensorFlowTraining`, which compiles, accumulates and updates.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.model
        self._replay = whole.Replay()
        self._states = whole.seed_states(self.model)
        self._outputs = whole.Outputs()
        self._left = Leftovers(self.model)
        self._has_gradient: dict[Any, list[bool]] = {}
        self._forward = engine._compiled(self._forward_step, around=engine._recording)
        self._loss = engine._compiled(self._loss_step, around=self._left.hidden)
        self._backward = engine._compiled(self._backward_step, around=engine._recording)
        self._forward_in_test = engine._compiled(self._forward_in_test_step, around=self._left.noted)
        self._loss_in_test = engine._compiled(self._loss_in_test_step, around=self._left.hidden)

    def sum_up(self, window: list[Any], first: list[Any], is_sized: bool) -> tuple[Any, Any, list[bool]]:
        """Runs both passes of a window; empties the lists.

        Args:
            window: its micro-steps.
            first: the data of the first one.

        Returns:
            The logs, the moments of batch normalizations, and which weights have a gradient.
        """
        samples = [step[0].samples for step in window]
        of_window = shares(samples)
        parts = [tensor_slices.scalar(share) for share in of_window]
        seeds, losses_of_layers, moments, given = self._first_pass(window, first, parts)
        leaves, masks, x, y, sample_weight = whole.joined_all(given, samples, _concatenated)
        del given
        self._replay.begin(leaves)
        count = tensor_slices.scalar(sum(samples))
        weight = count if is_sized else tensor_slices.scalar(1.0)
        inputs = (leaves, masks, x, y, sample_weight, whole.mean_losses(losses_of_layers, of_window), count, weight)
        logs, gradients, of_layers = self._loss(*inputs)
        has_gradient = self._has_gradient[_absent(inputs)]
        del inputs, leaves, masks, x, y, sample_weight
        with self._seeds_kept():
            for part, size, start in zip(parts, samples, itertools.accumulate(samples, initial=0), strict=False):
                rows = slice(start, start + size)
                its_gradients = [None if one is None else one[rows] for one in gradients]
                of_its_layers = [None if one is None else one * tf.cast(part, one.dtype) for one in of_layers]
                again = (window.pop(0)[0].take()[0], seeds.pop(0), its_gradients, of_its_layers)
                self._replay.compare(self._backward(*again), rows)
                known = self._has_gradient[_absent(again)]
                has_gradient = [a or b for a, b in zip(has_gradient, known, strict=True)]
                del again, its_gradients
        self._replay.end()
        self._left.end()
        return logs, moments, has_gradient

    def test(self, parts: list[Any], is_sized: bool) -> Any:
        """Evaluates a batch given as micro-batches; returns the logs."""
        samples = [part.samples for part in parts]
        losses_of_layers, given = [], []
        for part in parts:
            x, y, sample_weight = part.take()
            leaves, masks, added = self._forward_in_test(x)
            losses_of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        joined = whole.joined_all(given, samples, _concatenated)
        del given
        count = tensor_slices.scalar(sum(samples))
        of_layers = whole.mean_losses(losses_of_layers, shares(samples))
        return self._loss_in_test(*joined, of_layers, count, count if is_sized else tensor_slices.scalar(1.0))

    def _first_pass(self, window: list[Any], first: list[Any], parts: list[Any]) -> tuple[Any, ...]:
        """Returns the seeds, losses of layers, moments, and outputs and data to join, of each micro-batch."""
        seeds, of_layers, given, moments = [], [], [], None
        for step, part in zip(window, parts, strict=True):
            x, y, sample_weight = first.pop() if first else step[0].take()
            its_seeds, leaves, masks, added, noted = self._forward(x, part)
            moments = noted if moments is None else moving_statistics.combined(moments, noted)
            seeds.append(its_seeds)
            of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        return seeds, of_layers, moments, given

    @contextlib.contextmanager
    def _seeds_kept(self) -> Iterator[None]:
        """Leaves the seeds as they are, whatever the second pass draws."""
        kept = [tf.identity(state.value) for state in self._states]
        try:
            yield
        finally:
            for state, value in zip(self._states, kept, strict=True):
                state.assign(value)

    # The compiled functions

    def _forward_step(self, x: Any, share: Any) -> Any:
        self.engine._ghosts.see(x)
        seeds = [tf.identity(state.value) for state in self._states]
        with (
            self._left.noted(),
            batch_metrics.tracking(self.model, share),
            whole.without_state(self.model, self._states),
        ):
            y_pred = self.engine._predict(x, training=True)
        return seeds, *self._flat(y_pred), self.engine._noted()

    def _forward_in_test_step(self, x: Any) -> Any:
        return self._flat(self.engine._predict(x, training=False))

    def _flat(self, y_pred: Any) -> tuple[Any, Any, Any]:
        return *self._outputs.flat(y_pred), whole.losses_of_layers(self.model)

    def _loss_step(
        self,
        leaves: Any,
        masks: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        of_layers: Any,
        count: Any,
        metric_weight: Any,
    ) -> Any:
        """Computes the window's loss, its gradients with respect to outputs and losses of layers, and the metrics."""
        model, weights = self.model, self.engine._weights
        inputs = (leaves, masks, x, y, sample_weight, of_layers, count, metric_weight)
        y_pred = self._outputs.packed(leaves, masks)
        floats = [leaf if _is_float(leaf) else None for leaf in leaves]
        with tf.GradientTape() as tape:
            tape.watch([leaf for leaf in (*floats, *of_layers) if leaf is not None])
            loss = self._value(x, y, y_pred, sample_weight, of_layers, count, metric_weight, training=True)
            loss = model.optimizer.scale_loss(loss)
        gradients, of_layers, direct = _gradients(tape, loss, [floats, of_layers, weights])
        self._has_gradient[_absent(inputs)] = [gradient is not None for gradient in direct]
        in_place = not model.jit_compile
        sums = list(zip(self.engine._accumulators, direct, strict=True))
        gradient_sums.clear((total for total, gradient in sums if gradient is None), in_place=in_place)
        for total, gradient in sums:
            if gradient is not None:
                gradient_sums.put(total, gradient, in_place=in_place)
        logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs, gradients, of_layers

    def _value(
        self,
        x: Any,
        y: Any,
        y_pred: Any,
        sample_weight: Any,
        of_layers: Any,
        count: Any,
        metric_weight: Any,
        *,
        training: bool,
    ) -> Any:
        """Returns Keras's loss; updates the logged loss."""
        model = self.model
        with (
            whole.without_changes(model, self._states),
            whole.with_losses_of_layers(model, of_layers),
            loss_shares.scaled(model, None, lambda: None, metric_weight),
        ):
            loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        loss_shares.check_scalar(loss)
        model._loss_tracker.update_state(loss, sample_weight=count)
        return loss

    def _loss_in_test_step(
        self,
        leaves: Any,
        masks: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        of_layers: Any,
        count: Any,
        metric_weight: Any,
    ) -> Any:
        y_pred = self._outputs.packed(leaves, masks)
        self._value(x, y, y_pred, sample_weight, of_layers, count, metric_weight, training=False)
        return self.model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _backward_step(self, x: Any, seeds: Any, gradients: Any, of_layers: Any) -> Any:
        """Repeats a micro-batch's forward pass and adds its part of the gradient; returns the outputs."""
        self.engine._ghosts.see(x)
        weights = self.engine._weights
        for state, seed in zip(self._states, seeds, strict=True):
            state.assign(seed)
        with tf.GradientTape() as tape, whole.metrics_at_rest(self.model):
            leaves = tree.flatten(self.engine._predict(x, training=True))
            added = whole.losses_of_layers(self.model)
        pairs = [
            pair
            for pair in zip([*leaves, *added], [*gradients, *of_layers], strict=True)
            if all(one is not None for one in pair)
        ]
        outputs, given = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
        totals = tape.gradient(outputs, weights, output_gradients=given) if pairs and weights else [None] * len(weights)
        self._has_gradient[_absent((x, seeds, gradients, of_layers))] = [total is not None for total in totals]
        for weight, accumulator, gradient in zip(weights, self.engine._accumulators, totals, strict=True):
            if gradient is not None:
                gradient_sums.add(weight, accumulator, gradient)
        return leaves


def _gradients(tape: Any, loss: Any, sources: list[list[Any]]) -> Iterator[list[Any]]:
    """Yields dense gradients for each list of tensors; None for a tensor without one."""
    flat = [source for group in sources for source in group if source is not None]
    found = iter(tape.gradient(loss, flat) if flat else [])
    for group in sources:
        gradients = [None if source is None else next(found) for source in group]
        yield [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]


def _is_float(leaf: Any) -> bool:
    return leaf is not None and leaf.dtype.is_floating


def _absent(structure: Any) -> tuple[Any, ...]:
    return len(tree.flatten(structure)), tuple(leaf is None for leaf in tree.flatten(structure))


def _concatenated(leaves: list[Any]) -> Any:
    if all(isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)) for leaf in leaves):
        is_sparse = isinstance(leaves[0], tf.SparseTensor)
        return tf.sparse.concat(0, leaves) if is_sparse else tf.concat(leaves, 0)
    return tf.concat(leaves, 0)
