"""Accumulates with a model's own `train_step` on JAX."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
from keras import tree

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation import noise_scale
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.engines.carried_state import as_sums, changed, copies, with_changes, zeros
from accumtune.accumulation.engines.engine_jax import JaxTraining, _precision
from accumtune.accumulation.own_step import interception
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step import own_trial_jax as own_trial
from accumtune.accumulation.own_step.retraced_jits import retraced_jits
from accumtune.accumulation.patched_attributes import replaced
from accumtune.accumulation.window import Accumulation, shares


class OwnStepJax(JaxTraining):
    """Trains one window per call, with the model's own step on each micro-batch."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        super().__init__(model, accumulation)
        if keras.distribution.distribution() is not None:
            raise own.refusal(model, "and it is spread over several devices.", "train it on one device.")
        self._form = 3
        self._switches: dict[str, Any] = {}
        self._certificate: own.Certificate | None = None
        self._structure: Any = None
        self._only = self._jitted(self._whole_step, donate=(0,))
        self._first = self._jitted(self._first_micro_step)
        self._next = self._jitted(self._next_micro_step, donate=(0,))
        self._last = self._jitted(self._last_micro_step, donate=(0, 1, 2))

    def _train(self, state: Any, window: list[Any]) -> tuple[Any, Any]:
        model = self.model
        before, now = (self._form, self._switches), (window[0].form, trials.switches(model))
        self._form, self._switches = now
        self._ghosts.check_window([part.samples for part in window])
        batch = window[0].take()
        known_samples.note(model, batch)
        if self._certificate is None or now != before:
            self._certificate = own_trial.certified(model, state, [part.take for part in window], self._form)
            own.accept(model, self._certificate)
        if len(window) == 1:
            return self._only(state, batch)
        trainable, non_trainable, optimizer, metrics = state
        samples = [part.samples for part in window]
        listener = noise_scale.listening(model, samples)
        parts = np.asarray(shares(samples), _precision())
        carried: Any = self._begun(state, batch, parts[0]) if self.is_jitted else None
        for index, share in enumerate(parts):
            part = window.pop(0)
            batch = part.take() if index else batch
            if carried is None:
                carried = self._first(metrics, trainable, non_trainable, optimizer, batch, share)
            elif window:
                carried = self._next(carried, trainable, non_trainable, optimizer, batch, share)
            else:
                new, sums, leaves = self._last(trainable, optimizer, carried, non_trainable, batch, share)
                state = (new[0], with_changes(new[1], non_trainable), new[2], new[3])
                carried = (sums,)
            batch = None  # freed before the next one is taken
            listener(index, functools.partial(self._squared_norm, carried[0]))
        return tree.pack_sequence_as(self._structure, list(leaves)), state

    # The jitted functions

    def _whole_step(self, state: Any, batch: Any) -> Any:
        with self._ghosts.active(batch[0]), retraced_jits(self.is_jitted):
            return self.model.train_step(state, interception.packed(batch, self._form))

    def _begin_step(self, first: Any, non_trainable: Any, metrics: Any) -> Any:
        """Returns sums, logs and moments of nothing, and copies, since micro-steps use up what they are given."""
        return *zeros(first[:3]), *copies((metrics, _seeds(self.model, non_trainable)))

    def _first_micro_step(
        self, metrics: Any, trainable: Any, non_trainable: Any, optimizer: Any, batch: Any, share: Any
    ) -> Any:
        return self._micro_step(None, metrics, trainable, non_trainable, optimizer, batch, share)

    def _next_micro_step(
        self, carried: Any, trainable: Any, non_trainable: Any, optimizer: Any, batch: Any, share: Any
    ) -> Any:
        so_far, metrics, seeds = carried[:3], carried[3], carried[4]
        non_trainable = _with_seeds(self.model, non_trainable, seeds)
        return self._micro_step(so_far, metrics, trainable, non_trainable, optimizer, batch, share)

    def _micro_step(
        self, so_far: Any, metrics: Any, trainable: Any, non_trainable: Any, optimizer: Any, batch: Any, share: Any
    ) -> Any:
        """Runs a micro-step that is not the last, of which only gradients, metrics, seeds and logs are kept."""
        state = (trainable, non_trainable, optimizer, metrics)
        sums, leaves, moments, new = self._run(state, batch, share, so_far, None)
        return sums, leaves, moments, new[3], _seeds(self.model, new[1])

    def _last_micro_step(
        self, trainable: Any, optimizer: Any, carried: Any, non_trainable: Any, batch: Any, share: Any
    ) -> Any:
        so_far, metrics, seeds = carried[:3], carried[3], carried[4]
        given, non_trainable = non_trainable, _with_seeds(self.model, non_trainable, seeds)
        state = (trainable, non_trainable, optimizer, metrics)
        own_apply = self.model.optimizer.stateless_apply
        sums, leaves, _, new = self._run(state, batch, share, so_far, own_apply)
        # In the order of the arguments: JAX gives a result the memory of the first argument that has its shape.
        return (new[0], changed(new[1], given), new[2], new[3]), sums, leaves

    def _run(self, state: Any, batch: Any, share: Any, so_far: Any, apply: Any) -> tuple[Any, Any, Any, Any]:
        model, known = self.model, self._known()
        sums: list[Any] = []

        def handed(optimizer: Any, gradients: Any, trainable: Any) -> Any:
            mine = self._sums(gradients, None if so_far is None else so_far[0], share)
            sums.extend(mine)
            if apply is None:
                return trainable, optimizer
            pairs = zip(_each_after_all(mine, share < 0), trainable, strict=True)
            return apply(optimizer, [total.astype(value.dtype) for total, value in pairs], trainable)

        with (
            interception.weighed_scalars(model, share, known.scalars),
            replaced(model.optimizer, {"stateless_apply": handed}),
            _moments_in_place(model, None if apply is None else so_far[2]) as counts,
            self._ghosts.active(batch[0]),
            retraced_jits(self.is_jitted),
        ):
            logs, new = model.train_step(state, interception.packed(batch, self._form))
        self._structure = tree.map_structure(lambda _: None, logs)
        leaves = interception.joined_logs(None if so_far is None else so_far[1], logs, known.logs, share)
        moments = _packed_moments(model, counts, new[1]) if apply is None else ()
        return sums, leaves, moments if so_far is None else statistics.combined(so_far[2], moments), new

    def _sums(self, gradients: Any, so_far: Any, share: Any) -> list[Any]:
        known, variables = self._known(), self.model.trainable_variables
        totals = []
        for index, (variable, gradient) in enumerate(zip(variables, as_sums(list(gradients)), strict=True)):
            replaces = getattr(variable, "overwrite_with_gradient", False)  # float8 scales: a new value, not a sum
            if known.reduction == own.MEAN and not replaces:
                gradient = gradient * jnp.asarray(share, gradient.dtype)
            totals.append(gradient if so_far is None or replaces else so_far[index] + gradient)
        return totals

    def _known(self) -> own.Certificate:
        assert self._certificate is not None
        return self._certificate


def _each_after_all(values: list[Any], never: Any) -> list[Any]:
    """Returns the same values, each of which waits for all: `never` is false, but the compiler cannot know that.

    Else an update may begin while a backward pass still needs the weights, and XLA plans with copies of these. On a CPU
    it drops `jax.lax.optimization_barrier`, which would say the same.
    """
    firsts = [jnp.sum(jnp.ravel(value)[:1].astype(jnp.float32)) for value in values]
    of_all = jnp.sum(jnp.stack(firsts))
    return [jnp.where(never, of_all.astype(value.dtype), value) for value in values]


def _seeds(model: Any, values: Any) -> list[Any]:
    pairs = zip(model.non_trainable_variables, values, strict=True)
    return [value for variable, value in pairs if interception.is_seed(variable)]


def _with_seeds(model: Any, values: Any, seeds: Any) -> list[Any]:
    rest = iter(seeds)
    return [
        next(rest) if interception.is_seed(variable) else value
        for variable, value in zip(model.non_trainable_variables, values, strict=True)
    ]


@contextlib.contextmanager
def _moments_in_place(model: Any, so_far: Any) -> Iterator[list[tuple[Any, float]]]:
    """Makes layers set their moving statistics to the batch's moments, in the block: the step then returns these.

    The list gets each BatchNormalization layer and the number of its entries per channel.

    Args:
        so_far: the moments of the window's other micro-batches, if this one is the last: then moving statistics are set
            to their values after the window, which the step may use.
    """
    counts: list[tuple[Any, float]] = []

    def kept(layer: Any, number: Any, mean: Any, variance: Any) -> tuple[Any, Any]:
        if not isinstance(number, float) or any(known is layer for known, _ in counts):
            raise own.refusal(
                model,
                f"it calls {layer.name!r}, a BatchNormalization, several times or with a mask.",
                "call it once, on all views of the batch together; or use another backend.",
            )
        if so_far is not None:
            start = sum(known.moving_mean.shape[0] for known, _ in counts)
            others = tuple(one[start : start + layer.moving_mean.shape[0]] for one in so_far)
            mine = statistics.packed([statistics.Moments(layer, number, mean, variance)])
            mean, variance = statistics.moved_values(layer, statistics.combined(others, mine))
        counts.append((layer, number))
        return mean, variance

    def noting(layer: Any, held: dict[int, Any]) -> Callable[..., Any]:
        own_moments = layer._moments

        def moments(inputs: Any, mask: Any) -> tuple[Any, Any]:
            mean, variance = own_moments(inputs, mask)
            number = math.prod(inputs.shape) / inputs.shape[layer.axis] if mask is None else None
            held[id(layer.moving_mean)], held[id(layer.moving_variance)] = kept(layer, number, mean, variance)
            return mean, variance

        return moments

    class OfGroups:
        """Takes the statistics that a normalization in ghost batches records."""

        def add(self, seen: statistics.Moments) -> None:
            variables = seen.layer.moving_mean, seen.layer.moving_variance
            values = kept(seen.layer, seen.number, seen.mean, seen.variance)
            for variable, value in zip(variables, values, strict=True):
                type(variable).assign(variable, value)

    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if statistics.keeps_statistics(layer):
                held: dict[int, Any] = {}
                stack.enter_context(statistics.left_as_they_are(layer, noting(layer, held), held))
                stack.enter_context(replaced(layer, {"_accumtune_notes": OfGroups()}))
        yield counts


def _packed_moments(model: Any, counts: list[tuple[Any, float]], non_trainable: Any) -> statistics.Packed:
    values = {id(one): value for one, value in zip(model.non_trainable_variables, non_trainable, strict=True)}
    return statistics.packed(
        [
            statistics.Moments(layer, number, values[id(layer.moving_mean)], values[id(layer.moving_variance)])
            for layer, number in counts
        ]
    )
