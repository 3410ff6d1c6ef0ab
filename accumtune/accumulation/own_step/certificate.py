"""Certifies a model's own `train_step`: tests it on the user's first samples, before the first update.

From one state the step runs on seven samples and on three parts of them, with the same random draws. It is certified if
three conditions hold: the gradients of the parts, averaged or added up, are those of the whole; the operations that
compute them are linear once samples have been added up (`dataflow.py`); and the other variables that the step assigns
do not depend on the samples. Data and weights are varied, so that cases which the first samples lack (padding, other
sizes) are tested too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from accumtune.accumulation.own_step.dataflow import Recording, Rules, why_not_linear
from accumtune.accumulation.own_step.own_train_step import LAST, MEAN, SUM, Certificate, refusal
from accumtune.accumulation.own_step.trial_samples import PARTS, SAMPLES, Draws, NotPerSampleError, variants
from accumtune.errors import CustomTrainStepError

_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
_LOW_PRECISION = 2e-2

ONE_OPTIMIZER = "compute one gradient, and hand it once to self.optimizer (that of compile)."
LEAVE_IT = "If it adds up the gradients of several calls, leave that to accumulate()."
_LOSS = (
    "make the loss a mean over samples; leave train_step as it is and return the loss from compute_loss, where it is "
    "one over the batch; or train without accumulate."
)
NUMBER_OF_SAMPLES = "take the number of samples from the data, such as ops.shape(x)[0]: micro-batches differ in it."
_CLIPPING = "let the optimizer clip (clipnorm=, global_clipnorm=, clipvalue=). Otherwise: " + _LOSS


@dataclass(eq=False)
class Run:
    """The results of one run of a step; arrays are on the host."""

    recording: Recording
    gradients: list[Any] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    applies: int = 0
    other_optimizers: list[str] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    logs: list[Any] = field(default_factory=list)
    assigned: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    metric_state: Any = None


class Trial(Protocol):
    """Runs a model's step on one backend, without changing the model.

    `hands_on_grad` is that of a `Certificate`, for all runs so far.
    """

    rules: Rules
    hands_on_grad: bool

    def run(
        self,
        batch: Any,
        draws: Draws,
        share: float,
        *,
        kinds: tuple[str, ...] | None = None,
        update: list[Any] | None = None,
        is_last: bool = True,
        metric_state: Any = None,
        change_of_weights: float = 0.0,
    ) -> Run:
        """Runs the step once; if it `is_last`, the step sees weights changed by `update`, or by the gradients."""
        ...


class ConditionError(Exception):
    """A step has a condition, of which only one branch can be tested."""


def certify(model: Any, trial: Trial, batch: Any) -> Certificate:
    """Returns the certificate of a model's step.

    Args:
        batch: seven samples (x, y, sample_weight), NumPy arrays.

    Raises:
        CustomTrainStepError: accumulating the step is not exact, or may not be.
    """
    findings = _Findings(model)
    for index, (data, change) in enumerate(variants(batch)):
        try:
            _try(model, trial, data, change, findings)
        except _SaysNothing as nothing:
            if not index:
                raise refusal(model, str(nothing), nothing.fix) from nothing
    return findings.certificate(trial.hands_on_grad)


class _SaysNothing(Exception):
    """The step cannot be tested on a variant of the data."""

    def __init__(self, seen: str, fix: str = "look at what it computes for the first samples.") -> None:
        super().__init__(seen)
        self.fix = fix


class _Findings:
    """The ways of accumulating (mean, sum, last) that all variants of the data so far allow."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reductions = [MEAN, SUM]
        self.scalars: list[list[str]] = []
        self.logs: list[list[str]] = []
        self.has_gradient: tuple[bool, ...] = ()
        self.unequal_metrics: set[str] = set()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple((allowed or [MEAN])[0] for allowed in self.scalars)

    def certificate(self, hands_on_grad: bool) -> Certificate:
        names = sorted(self.unequal_metrics)
        if not all(self.logs):
            names.append(f"{sum(not allowed for allowed in self.logs)} of what it returns")
        if names:
            warnings.warn(
                f"The train_step of {self.model.name!r} reports numbers that are neither means nor sums over samples "
                f"({', '.join(names)}): those of micro-batches are averaged. The training itself is exact.",
                stacklevel=2,
            )
        logs = tuple((allowed or [MEAN])[0] for allowed in self.logs)
        return Certificate(self.reductions[0], self.kinds, logs, self.has_gradient, hands_on_grad)


def _try(model: Any, trial: Trial, batch: Any, change: float, findings: _Findings) -> None:
    draws = Draws()
    try:
        whole = trial.run(batch, draws, 1.0, change_of_weights=change)
        again = trial.run(batch, Draws(draws), 1.0, change_of_weights=change)
    except CustomTrainStepError:
        raise
    except ConditionError as error:
        seen = "it has a condition, of which only one branch can be tried."
        raise refusal(model, seen, "write it with ops.where for each sample, or without.") from error
    except Exception as error:
        seen = f"it raised {type(error).__name__} for seven samples of the first batch: {error}"
        raise _SaysNothing(seen, NUMBER_OF_SAMPLES) from error
    _check_apply(model, whole)
    if not any(gradient is not None and np.any(gradient) for gradient in whole.gradients):
        raise _SaysNothing("its gradients are all zero.")
    if not all(gradient is None or np.all(np.isfinite(gradient)) for gradient in whole.gradients):
        raise _SaysNothing("its gradients are not finite.")
    if not _is_whole(whole, [again], MEAN):
        raise refusal(model, "a second run on the same samples gives another gradient.", _LOSS)
    for by_view in (True, False):
        parts, cut = _parts(model, trial, batch, draws, whole, change, findings.kinds, by_view)
        allowed = [kind for kind in findings.reductions if _is_whole(whole, parts, kind)]
        if allowed or not any(one.has_views for one in cut):
            break
    reason = _why_not_linear(trial.rules, whole, parts)
    if reason:
        raise refusal(model, reason, _CLIPPING if "optimizer" in reason else _LOSS)
    if not allowed:
        raise refusal(
            model,
            "its gradients for a batch are neither the mean nor the sum of those for parts of the batch.",
            _CLIPPING,
        )
    findings.reductions = allowed
    findings.has_gradient = tuple(gradient is not None for gradient in whole.gradients)
    _check_assigned(model, whole, parts[-1])
    _compare_scalars(whole, parts, findings)
    if SUM in findings.kinds:
        parts, _ = _parts(model, trial, batch, draws, whole, change, findings.kinds, by_view)
    _compare_logs(whole, parts, findings)


def _parts(
    model: Any,
    trial: Trial,
    batch: Any,
    draws: Draws,
    whole: Run,
    change: float,
    kinds: tuple[str, ...],
    by_view: bool,
) -> tuple[list[Run], list[Draws]]:
    from keras import tree

    runs: list[Run] = []
    cut = [Draws(draws, part, by_view) for part in PARTS]
    state = None
    for part, own_draws in zip(PARTS, cut, strict=True):
        data = tree.map_structure(lambda leaf, part=part: None if leaf is None else leaf[part], batch)
        try:
            run = trial.run(
                data,
                own_draws,
                _share(part),
                kinds=kinds or None,
                update=whole.gradients,
                is_last=part is PARTS[-1],
                metric_state=state,
                change_of_weights=change,
            )
        except CustomTrainStepError:
            raise
        except NotPerSampleError as error:
            raise refusal(model, str(error), "draw random numbers for each sample: shape=(batch, ...).") from error
        except Exception as error:
            seen = f"it raised {type(error).__name__} for a part of a batch: {error}"
            raise refusal(model, seen, NUMBER_OF_SAMPLES) from error
        if len(own_draws.values) != len(draws.values):
            seen = "it draws random numbers another number of times for other samples."
            raise refusal(model, seen, "draw the same for every batch.")
        state = run.metric_state
        runs.append(run)
    return runs, cut


def _share(part: slice) -> float:
    return (part.stop - part.start) / SAMPLES


def _check_apply(model: Any, run: Run) -> None:
    if run.other_optimizers:
        used = ", ".join(dict.fromkeys(run.other_optimizers))
        also = "besides that of compile " if run.applies else ""
        seen = f"it uses other optimizers {also}({used}): a later one needs what an earlier one has updated."
        raise refusal(model, seen, ONE_OPTIMIZER + " Networks that take turns (a GAN) train without accumulate.")
    if not run.applies:
        raise refusal(model, "it hands no gradients to self.optimizer.", f"{ONE_OPTIMIZER} {LEAVE_IT}")
    if run.applies > 1:
        raise refusal(model, f"it updates {run.applies} times.", ONE_OPTIMIZER)


def _why_not_linear(rules: Rules, whole: Run, parts: list[Run]) -> str:
    for one, part in zip(parts, PARTS, strict=True):
        samples = (SAMPLES, part.stop - part.start)
        reason = why_not_linear(rules, (whole.recording, whole.keys), (one.recording, one.keys), samples)
        if reason:
            return reason
    return ""


def _is_whole(whole: Run, parts: list[Run], kind: str) -> bool:
    if any(len(part.gradients) != len(whole.gradients) or part.applies != 1 for part in parts):
        return False
    weights = [_share(part) if kind == MEAN and len(parts) > 1 else 1.0 for part in PARTS[: len(parts)]]
    is_rounded = whole.recording.is_rounded(whole.keys)  # a loss of Keras's casts to floatx, whatever the model has
    sizes = [np.max(np.abs(one), initial=0.0) for one in whole.gradients if one is not None]
    largest = max(sizes, default=0.0)
    for index, gradient in enumerate(whole.gradients):
        found = [part.gradients[index] for part in parts]
        if gradient is None or any(one is None for one in found):
            if gradient is not None or any(one is not None for one in found):
                return False
            continue
        terms = [weight * one for weight, one in zip(weights, found, strict=True)]
        scale = max(*(np.max(np.abs(one), initial=0.0) for one in [gradient, *terms]), 0.01 * largest)
        precision = "float32" if is_rounded and whole.dtypes[index] == "float64" else whole.dtypes[index]
        tolerance = _TOLERANCE.get(precision, _LOW_PRECISION)
        if not np.all(np.abs(sum(terms) - gradient) <= tolerance * scale):
            return False
    return True


def _check_assigned(model: Any, whole: Run, last: Run) -> None:
    for name in sorted(set(whole.assigned) | set(last.assigned)):
        one, other = whole.assigned.get(name), last.assigned.get(name)
        if one is None or other is None or not _close(one, other):
            raise refusal(
                model,
                f"what it assigns to the variable {name!r} depends on the samples of the batch.",
                "assign after the update, and from weights and counters only; or keep it as a keras.metrics.Metric.",
            )


def _compare_scalars(whole: Run, parts: list[Run], findings: _Findings) -> None:
    columns = list(zip(*(part.scalars for part in parts), strict=True))
    if len(columns) != len(whole.scalars):
        return
    findings.scalars = findings.scalars or [[MEAN, SUM] for _ in columns]
    for index, (value, column) in enumerate(zip(whole.scalars, columns, strict=True)):
        findings.scalars[index] = _allowed(value, column, findings.scalars[index])


def _compare_logs(whole: Run, parts: list[Run], findings: _Findings) -> None:
    columns = list(zip(*(part.logs for part in parts), strict=True))
    pairs = zip(whole.logs, columns, strict=True)
    if any(one.shape != value.shape for value, column in pairs for one in column):
        seen = "it returns logs with a number for each sample."
        raise refusal(findings.model, seen, "return one number for the batch, such as their mean.")
    findings.logs = findings.logs or [[LAST, MEAN, SUM] for _ in columns]
    for index, (value, column) in enumerate(zip(whole.logs, columns, strict=True)):
        findings.logs[index] = _allowed(value, column, findings.logs[index])
    for name, value in whole.metrics.items():
        if not _close(value, parts[-1].metrics.get(name, np.nan)):
            findings.unequal_metrics.add(name)


def _allowed(value: Any, column: Sequence[Any], kinds: list[str]) -> list[str]:
    shares = [_share(part) for part in PARTS]
    made: dict[str, Callable[[], Any]] = {
        LAST: lambda: column[-1],
        MEAN: lambda: sum(share * one for share, one in zip(shares, column, strict=True)),
        SUM: lambda: sum(column),
    }
    return [kind for kind in kinds if _close(value, made[kind]())]


def _close(one: Any, other: Any) -> bool:
    one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
    if one.shape != other.shape:
        return False
    scale = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
    return bool(np.allclose(one, other, rtol=0, atol=1e-4 * scale + 1e-12, equal_nan=True))
