"""Accumulates with a model's own `train_step` on torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from keras import tree

from accumtune.accumulation import moving_statistics as statistics
from accumtune.accumulation import noise_scale, optimizers
from accumtune.accumulation.coupling import known_samples
from accumtune.accumulation.data import batches as feeding
from accumtune.accumulation.engines import grouped_update as groups
from accumtune.accumulation.engines.engine_torch import TorchTraining
from accumtune.accumulation.own_step import interception
from accumtune.accumulation.own_step import own_gradients_torch as own_gradients
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step import own_trial_torch as own_trial
from accumtune.accumulation.window import Accumulation, shares


class OwnStepTorch(TorchTraining):
    """Trains one window per call, with the model's own step on each micro-batch (not compiled)."""

    def __init__(self, model: Any, accumulation: Accumulation) -> None:
        super().__init__(model, accumulation)
        self._certificate: own.Certificate | None = None
        self._form = 3
        self._switches: dict[str, Any] = {}
        self._variables: list[Any] = []
        self._sums: list[Any] = []
        self._of_backward = own_gradients.SummedGradients(self._added)
        self._share = 1.0
        self._replaced: set[int] = set()

    def _train(self, window: list[feeding.MicroBatch]) -> Any:
        model, form = self.model, window[0].form
        self._ghosts.check_window([part.samples for part in window])
        batch = window[0].take()
        known_samples.note(model, batch)
        switches = trials.switches(model)
        if self._certificate is None or (form, switches) != (self._form, self._switches):
            self._form, self._switches = form, switches
            self._certificate = own_trial.certified(model, [part.take for part in window], form)
            own.accept(model, self._certificate)
        if len(window) == 1:
            with groups.updating_in_groups(optimizers.updating(model.optimizer)), self._ghosts.active(batch[0]):
                return model.train_step(interception.packed(batch, form))
        samples = [part.samples for part in window]
        listener = noise_scale.listening(model, samples)
        moments: Any = ()
        leaves: Any = None
        self._variables, self._sums, self._normalizations = [], [], []
        variables = model.trainable_variables
        self._replaced = {id(one.value) for one in variables if getattr(one, "overwrite_with_gradient", False)}
        parameters = [variable.value for variable in variables]
        structure: Any = None
        with self._of_backward.taken(parameters) if self._certificate.hands_on_grad else contextlib.nullcontext():
            for index, share in enumerate(shares(samples)):
                part = window.pop(0)
                data = interception.packed(part.take() if index else batch, form)
                batch = None
                if window:
                    structure, leaves, moments = self._micro_step(data, share, leaves, moments)
                else:
                    structure, leaves = self._last_micro_step(data, share, leaves, moments)
                data = None  # freed before the next one is taken
                listener(index, functools.partial(_squared_norm, self._sums))
        self._sums = []
        return tree.pack_sequence_as(structure, leaves)

    def _micro_step(self, data: Any, share: float, leaves: Any, moments: Any) -> tuple[Any, Any, Any]:
        def handed(gradients: list[Any], variables: list[Any], apply: Callable[[list[Any]], Any]) -> None:
            self._sum_up(gradients, variables)
            for variable in variables:
                variable.value.grad = None  # summed up

        with interception.Overlay() as overlay, statistics.recorded(self.model) as notes:
            structure, leaves = self._run(data, share, leaves, handed)
        with torch.no_grad():
            overlay.keep(self.model)
        return structure, leaves, self._joined(moments, notes.mine())

    def _last_micro_step(self, data: Any, share: float, leaves: Any, moments: Any) -> tuple[Any, Any]:
        def handed(gradients: list[Any], variables: list[Any], apply: Callable[[list[Any]], Any]) -> None:
            self._sum_up(gradients, variables)
            totals = [
                None if total is None else total.to(variable.value.dtype)
                for variable, total in zip(variables, self._sums, strict=True)
            ]
            whole = self._joined(moments, notes.mine())
            with torch.no_grad(), groups.updating_in_groups(optimizers.updating(self.model.optimizer)):
                statistics.moved(self._normalizations, whole)
                apply(totals)

        with statistics.recorded(self.model) as notes:
            return self._run(data, share, leaves, handed)

    def _run(self, data: Any, share: float, leaves: Any, handed: interception.Handed) -> tuple[Any, Any]:
        known, self._share = self._known(), share
        self._of_backward.begin()
        with (
            interception.weighed_scalars(self.model, share, known.scalars),
            interception.one_update(self.model, handed),
            self._ghosts.active(data[0] if isinstance(data, tuple) else data),
        ):
            logs = self.model.train_step(data)
        with torch.no_grad():
            return tree.map_structure(lambda _: None, logs), interception.joined_logs(leaves, logs, known.logs, share)

    def _joined(self, so_far: Any, noted: list[Any]) -> Any:
        with torch.no_grad():
            if not self._normalizations:
                self._normalizations = [entry.layer for entry in noted]
                return statistics.packed(noted)
            return statistics.combined(so_far, statistics.packed(noted))

    def _known(self) -> own.Certificate:
        assert self._certificate is not None
        return self._certificate

    def _sum_up(self, gradients: list[Any], variables: list[Any]) -> None:
        known = self._known()
        if tuple(gradient is not None for gradient in gradients) != known.has_gradient or (
            self._variables and list(map(id, variables)) != list(map(id, self._variables))
        ):
            raise own.refusal(self.model, "it hands other variables to its optimizer than before.", trials.SAME)
        self._sums = self._sums or [None] * len(variables)
        self._variables = variables
        for index, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
            if gradient is None:
                continue
            if known.hands_on_grad:
                self._sums[index] = self._of_backward.sum_of(variable.value, gradient)
                if self._sums[index] is None:
                    raise own.refusal(self.model, "it hands on other gradients than when it was tried.", trials.SAME)
            else:
                with torch.no_grad():
                    self._sums[index] = self._added(variable.value, self._sums[index], gradient)

    def _added(self, parameter: Any, so_far: Any, gradient: Any) -> Any:
        """The sum of a parameter's gradients, with this micro-batch's."""
        replaces = id(parameter) in self._replaced  # float8 scales: a new value, not a sum
        weight = 1.0 if replaces or self._known().reduction == own.SUM else self._share
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        if so_far is None or replaces:
            return gradient.to(dtype) * weight  # not in place: it may share its memory with another gradient
        return so_far.add_(gradient.to(dtype), alpha=weight)


def _squared_norm(totals: list[Any]) -> Any:
    return torch.stack(torch._foreach_norm([total for total in totals if total is not None])).square().sum()
