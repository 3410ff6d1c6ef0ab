"""The two passes of a loss over the whole effective batch on JAX: see losses/whole_batch_loss.py."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from keras import StatelessScope, tree

from accumtune.accumulation import moving_statistics
from accumtune.accumulation.engines import carried_state as carrying
from accumtune.accumulation.losses import loss_shares
from accumtune.accumulation.losses import whole_batch_loss as whole
from accumtune.accumulation.losses.leftovers import Leftovers
from accumtune.accumulation.window import shares


class TwoPasses:
    """Sums the gradients of a window.

    Args:
        engine: the `JaxTraining`, which compiles, and knows how to sum and update.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.model
        self._replay = whole.Replay()
        self._states = whole.seed_states(self.model)
        self._outputs = whole.Outputs()
        self._left = Leftovers(self.model)
        self._forward = engine._jitted(self._forward_step)
        self._combine = engine._jitted(moving_statistics.combined)
        self._loss = engine._jitted(self._loss_step, donate=(0,))
        self._backward = engine._jitted(self._backward_step, donate=(0,))
        self._forward_in_test = engine._jitted(self._forward_in_test_step)
        self._loss_in_test = engine._jitted(self._loss_in_test_step, donate=(0,))

    def sum_up(self, state: Any, window: list[Any], first: list[Any]) -> tuple[Any, ...]:
        """Runs both passes of a window; empties the lists.

        Args:
            state: the model's, as in Keras's train_step.
            window: its micro-batches.
            first: the data of the first one.

        Returns:
            The logs, the sums of gradients, the moments of BatchNormalization layers, the non-trainable variables and
            those of metrics.
        """
        trainable, non_trainable, optimizer, metrics = state
        samples = [part.samples for part in window]
        of_window = shares(samples)
        states, losses_of_layers, moments, given = self._first_pass(trainable, non_trainable, window, first)
        leaves, masks, x, y, sample_weight = whole.joined_all(given, samples, jnp.concatenate)
        del given
        self._replay.begin(leaves)
        of_layers = whole.mean_losses(losses_of_layers, of_window)
        inputs = (leaves, masks, x, y, sample_weight, of_layers)
        logs, gradients, of_layers, sums, non_trainable, metrics = self._loss(
            metrics, trainable, states.pop(), optimizer, *inputs
        )
        del inputs, leaves, masks, x, y, sample_weight
        for part, size, start in zip(of_window, samples, itertools.accumulate(samples, initial=0), strict=False):
            rows = slice(start, start + size)
            its_gradients = [gradient[rows] for gradient in gradients]
            of_its_layers = [gradient * jnp.asarray(part, gradient.dtype) for gradient in of_layers]
            x = window.pop(0).take()[0]
            sums, again = self._backward(sums, trainable, states.pop(0), x, its_gradients, of_its_layers)
            self._replay.compare(again, rows)
            del x, its_gradients, again
        self._replay.end()
        self._left.end()
        return logs, sums, moments, non_trainable, metrics

    def test(self, state: Any, parts: list[Any]) -> tuple[Any, Any]:
        """Evaluates a batch given as micro-batches; returns logs and state (trainable, non-trainable, metrics)."""
        trainable, non_trainable, metrics = state
        samples = [part.samples for part in parts]
        losses_of_layers, given = [], []
        for part in parts:
            x, y, sample_weight = part.take()
            leaves, masks, added, changed = self._forward_in_test(trainable, non_trainable, x)
            non_trainable = carrying.with_changes(changed, non_trainable)
            losses_of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        joined = whole.joined_all(given, samples, jnp.concatenate)
        del given
        of_layers = whole.mean_losses(losses_of_layers, shares(samples))
        logs, changed, metrics = self._loss_in_test(metrics, trainable, non_trainable, *joined, of_layers)
        return logs, (trainable, carrying.with_changes(changed, non_trainable), metrics)

    def _first_pass(self, trainable: Any, non_trainable: Any, window: list[Any], first: list[Any]) -> tuple[Any, ...]:
        """Runs the first pass.

        Returns:
            The non-trainable variables before each micro-batch and after the last, the losses of layers, the moments,
            and the outputs and data to join.
        """
        states, of_layers, given, moments = [non_trainable], [], [], None
        for part in window:
            x, y, sample_weight = first.pop() if first else part.take()
            leaves, masks, added, noted, changed = self._forward(trainable, states[-1], x)
            moments = noted if moments is None else self._combine(moments, noted)
            states.append(carrying.with_changes(changed, states[-1]))
            of_layers.append(added)
            given.append((leaves, masks, x if whole.reads_inputs(self.model) else None, y, sample_weight))
            del x, y, sample_weight, leaves, masks
        return states, of_layers, moments, given

    # The jitted functions

    def _forward_step(self, trainable: Any, non_trainable: Any, x: Any) -> Any:
        with (
            moving_statistics.recorded(self.model) as notes,
            self.engine._ghosts.active(x),
            whole.without_state(self.model, self._states),
        ):
            y_pred, changed, added = self._called(trainable, non_trainable, x)
        noted = notes.mine()
        self.engine._normalizations = [entry.layer for entry in noted]
        changed = carrying.changed(changed, non_trainable)
        return *self._outputs.flat(y_pred), added, moving_statistics.packed(noted), changed

    def _forward_in_test_step(self, trainable: Any, non_trainable: Any, x: Any) -> Any:
        y_pred, changed, added = self._called(trainable, non_trainable, x, training=False)
        return *self._outputs.flat(y_pred), added, carrying.changed(changed, non_trainable)

    def _called(self, trainable: Any, non_trainable: Any, x: Any, training: bool = True) -> tuple[Any, Any, Any]:
        arguments = {"training": training} if self.model._call_has_training_arg else {}
        with self._left.noted():
            y_pred, non_trainable, added = self.model.stateless_call(
                trainable, non_trainable, x, return_losses=True, **arguments
            )
        return y_pred, non_trainable, whole.losses_of_layers(self.model, added)

    def _loss_step(
        self,
        metrics: Any,
        trainable: Any,
        non_trainable: Any,
        optimizer: Any,
        leaves: Any,
        masks: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        of_layers: Any,
    ) -> Any:
        """Computes the window's loss, its gradients by outputs, losses of layers and weights, and the metrics."""
        model = self.model

        def packed(floats: Any) -> Any:
            given = iter(floats)
            return self._outputs.packed([next(given) if _is_float(leaf) else leaf for leaf in leaves], masks)

        def objective(trainable: Any, floats: Any, of_layers: Any) -> tuple[Any, Any]:
            state = trainable, non_trainable, metrics
            loss, new = self._value(state, x, y, packed(floats), sample_weight, of_layers, training=True)
            with StatelessScope(state_mapping=list(zip(model.optimizer.variables, optimizer, strict=True))):
                scaled = model.optimizer.scale_loss(loss)
            return scaled, (loss, new)

        floats = [leaf for leaf in leaves if _is_float(leaf)]
        (_, (loss, new)), (direct, gradients, of_layers) = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(
            trainable, floats, of_layers
        )
        non_trainable, metrics = new
        logs, metrics = self._logged(metrics, loss, x, y, packed(floats), sample_weight)
        return logs, gradients, of_layers, carrying.as_sums(direct), non_trainable, metrics

    def _value(
        self, state: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, of_layers: Any, *, training: bool
    ) -> tuple[Any, list[Any]]:
        """Returns Keras's loss, and the non-trainable variables and those of metrics after it."""
        model = self.model
        groups = (model.trainable_variables, model.non_trainable_variables, model.metrics_variables)
        mapping = [
            pair for names, values in zip(groups, state, strict=True) for pair in zip(names, values, strict=True)
        ]
        with StatelessScope(state_mapping=mapping) as scope, self._left.hidden():
            with whole.without_changes(model, self._states), whole.with_losses_of_layers(model, of_layers):
                loss = model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
            new = [[scope.get_current_value(variable) for variable in names] for names in groups[1:]]
        loss_shares.check_scalar(loss)
        return loss, new

    def _logged(self, metrics: Any, loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        count = next(leaf for leaf in tree.flatten(y_pred) if leaf is not None).shape[0]
        # Keras needs the number of samples, even if nothing reads x.
        x = jnp.zeros(count) if x is None else x
        with self._left.hidden():
            return self.model._update_metrics_variables(metrics, loss, x, y, y_pred, sample_weight)

    def _loss_in_test_step(
        self,
        metrics: Any,
        trainable: Any,
        non_trainable: Any,
        leaves: Any,
        masks: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        of_layers: Any,
    ) -> Any:
        y_pred = self._outputs.packed(leaves, masks)
        state = trainable, non_trainable, metrics
        loss, (new, metrics) = self._value(state, x, y, y_pred, sample_weight, of_layers, training=False)
        logs, metrics = self._logged(metrics, loss, x, y, y_pred, sample_weight)
        return logs, carrying.changed(new, non_trainable), metrics

    def _backward_step(
        self, sums: Any, trainable: Any, non_trainable: Any, x: Any, gradients: Any, of_layers: Any
    ) -> tuple[Any, Any]:
        """Repeats a micro-batch's forward pass and adds its part of the gradient; returns the sums and the outputs."""

        def outputs(trainable: Any) -> tuple[Any, Any]:
            with moving_statistics.recorded(self.model), self.engine._ghosts.active(x):
                y_pred, _, added = self._called(trainable, non_trainable, x)
            leaves = tree.flatten(y_pred)
            return ([leaf for leaf in leaves if _is_float(leaf)], added), leaves

        _, backward, leaves = jax.vjp(outputs, trainable, has_aux=True)
        (totals,) = backward((gradients, of_layers))
        return carrying.added(self.model.trainable_variables, sums, totals), leaves


def _is_float(leaf: Any) -> bool:
    return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)
