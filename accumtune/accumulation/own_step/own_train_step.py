"""Models with a `train_step` of their own: the step runs once per micro-batch, and updates once per window.

The gradients that the step passes to its optimizer are not applied but weighted and added up; the last micro-step
applies the sum. Other assignments of the step (an EMA of weights, a counter) are kept in the last micro-step only: the
others run in a scope that keeps only metrics and seeds. `certificate.py` tests whether this equals the step at the
effective batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from accumtune.accumulation.patched_attributes import put
from accumtune.errors import CustomTrainStepError

MEAN, SUM, LAST = "mean", "sum", "last"


@dataclass(frozen=True)
class Certificate:
    """How gradients and logs of micro-batches combine to those of their effective batch, for a model's own step.

    Args:
        reduction: "mean" if gradients are averaged over samples, "sum" if they are added up.
        scalars: the same for each number that the step gives to a `keras.metrics.Mean`, in the order of the calls.
        logs: the same for each leaf of the step's logs; "last" if the last micro-step's value is the window's.
        has_gradient: whether a variable has a gradient, for each variable that is passed to the optimizer.
        hands_on_grad: on torch, whether the step passes to the optimizer what one backward pass has left in `.grad`,
            and does nothing else with it.
    """

    reduction: str
    scalars: tuple[str, ...]
    logs: tuple[str, ...]
    has_gradient: tuple[bool, ...]
    hands_on_grad: bool = False


def has_own_step(model: Any) -> bool:
    """Returns whether the model's class, or the model itself, has its own `train_step`."""
    import keras

    return "train_step" in vars(model) or type(model).train_step is not keras.Model.train_step


def has_own_test_step(model: Any) -> bool:
    """Whether the model's class, or the model itself, has a `test_step` of its own."""
    import keras

    return "test_step" in vars(model) or type(model).test_step is not keras.Model.test_step


def can_be_evaluated(model: Any) -> bool:
    """Returns whether Keras's `evaluate` has a loss: only the model's own `train_step` may have one (a VAE, a GAN)."""
    import keras

    has_loss = model._compile_loss is not None or type(model).compute_loss is not keras.Model.compute_loss
    return has_loss or not has_own_step(model) or has_own_test_step(model)


def certificate_of(model: Any) -> Certificate | None:
    """Returns the certificate of an accumulating model; None before its first batch."""
    return vars(model).get("_accumtune_certificate")


def accept(model: Any, certificate: Certificate) -> None:
    """Keeps a certificate with a model that accumulates, and prints it if the model had another one."""
    import keras

    if certificate == certificate_of(model):
        return
    put(model, {"_accumtune_certificate": certificate})
    text = (
        f"accumtune: the train_step of {type(model).__name__} was tested on the first samples and can be accumulated: "
        f"its gradients are {certificate.reduction}s over samples."
    )
    if keras.config.is_interactive_logging_enabled():
        print(text)
    else:
        logging.getLogger(__name__).info(text)


def refusal(model: Any, seen: str, fix: str) -> CustomTrainStepError:
    """Returns the error for a step that cannot be accumulated."""
    return CustomTrainStepError(
        f"Received model {model.name!r}, whose class {type(model).__name__} has its own train_step: {seen}",
        "a step with one optimizer and one apply, whose gradients are means or sums over samples, so that those of "
        "micro-batches make those of their effective batch.",
        fix,
    )


def certify(model: Any, x: Any, y: Any = None, sample_weight: Any = None) -> Certificate:
    """Tests the step of a compiled model on samples of its data; does not change the model, except that it is built.

    Raises:
        CustomTrainStepError: accumulating the step is not exact; the message says what the test saw.
    """
    import keras

    batch = (x, y, sample_weight)
    data = keras.utils.pack_x_y_sample_weight(*batch)
    form = len(data) if isinstance(data, tuple) else 0
    backend = keras.backend.backend()
    if backend == "tensorflow":
        from accumtune.accumulation.own_step import own_trial_tensorflow

        return own_trial_tensorflow.certified(model, [lambda: batch], form)
    if backend == "torch":
        from accumtune.accumulation.own_step import own_trial_torch

        model._symbolic_build(data_batch=batch)
        return own_trial_torch.certified(model, [lambda: batch], form)
    from accumtune.accumulation.own_step import own_trial_jax

    model._symbolic_build(data_batch=batch)
    state = (
        model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables
    )  # fmt: skip
    values = tuple([variable.value for variable in variables] for variables in state)
    return own_trial_jax.certified(model, values, [lambda: batch], form)
