"""Translates a configuration to Keras's own `gradient_accumulation_steps`, and lists how the training then differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accumtune.config.training_config import TrainingConfig


@dataclass(frozen=True)
class KerasArguments:
    """Arguments for plain Keras, and how the training then differs.

    Args:
        optimizer: for the optimizer's constructor: `gradient_accumulation_steps`, or nothing for a single step.
        fit: for `model.fit`: `batch_size` (the micro-batch), `epochs`, and the search's other options.
        hyperparameters: the values for the build function, without the batch sizes.
        differences: from training with accumtune, each in a sentence or two, the larger ones first.

    Example:

    >>> arguments = config.keras_arguments()
    >>> optimizer = keras.optimizers.Adam(1e-3, **arguments.optimizer)
    >>> model.fit(x, y, **arguments.fit)
    """

    optimizer: Mapping[str, Any]
    fit: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "optimizer": dict(self.optimizer),
            "fit": dict(self.fit),
            "hyperparameters": dict(self.hyperparameters),
            "differences": list(self.differences),
        }

    def __str__(self) -> str:
        lines = [f"{name} {_call(getattr(self, name))}" for name in ("hyperparameters", "optimizer", "fit")]
        return "\n".join([*lines, *(f"- {difference}" for difference in self.differences)])


def keras_arguments(config: TrainingConfig) -> KerasArguments:
    """See `TrainingConfig.keras_arguments`."""
    steps = config.accumulation_steps
    # The batch of all replicas, which a strategy divides among them.
    fit = {**config.fit_arguments(), "batch_size": config.micro_batch_size * config.replicas}
    if "steps_per_epoch" in fit:
        fit["steps_per_epoch"] *= steps
    return KerasArguments(
        optimizer={"gradient_accumulation_steps": steps} if steps > 1 else {},
        fit=fit,
        hyperparameters=config.own_hyperparameters,
        differences=tuple(_differences(config, steps)),
    )


def _differences(config: TrainingConfig, steps: int) -> Iterator[str]:
    """Yields the differences, as read from Keras 3.15's source and as tried."""
    if config.learning_rate_scaling is not None:
        ratio = config.effective_batch_size / (config.base_effective_batch_size or config.effective_batch_size)
        factor = ratio if config.learning_rate_scaling == "linear" else ratio**0.5
        yield (
            f"The search multiplied the learning rate by {factor:g} ({config.learning_rate_scaling} scaling of the "
            f"effective batch); with plain Keras, multiply it yourself."
        )
    if config.ghost_batch_size is not None and config.ghost_batch_size < config.micro_batch_size:
        yield (
            f"BatchNormalization normalizes all {config.micro_batch_size} samples of a micro-batch together instead of "
            f"groups of {config.ghost_batch_size} (ghost batches), so the training differs: a batch_size of "
            f"{config.ghost_batch_size} with more steps comes closer."
        )
    for item in config.trial.get("not_carried", ()):
        yield f"The trial also depended on what a configuration does not hold: {item}."
    if steps == 1:
        return
    effective = config.micro_batch_size * steps * config.replicas
    if effective != config.effective_batch_size:
        yield (
            f"An update is over {effective} samples instead of {config.effective_batch_size}: all micro-batches have "
            "the same size."
        )
    yield (
        f"Learning-rate schedules are read at the micro-step, so they run {steps} times too fast: multiply their "
        f"decay_steps and warmup_steps by {steps}."
    )
    yield (
        f"An incomplete window makes no update: if an epoch's micro-batches are not a multiple of {steps}, the rest is "
        "added to the next epoch's first window, and at the end of fit it is lost."
    )
    yield (
        "Gradients are averaged over micro-batches with equal weights: with a smaller last micro-batch, masks, sample "
        "or class weights (other than through the loss's default reduction), or reduction='sum', the gradient is not "
        "that of the effective batch."
    )
    yield (
        f"An optimizer with use_ema averages at every micro-step, {steps} times per update (ema_momentum ** (1 / "
        f"{steps}) compensates for it), and ema_overwrite_frequency counts micro-steps: multiply it by {steps}."
    )
    yield f"Batch callbacks, the progress bar and steps_per_epoch count micro-batches: {steps} for each update."
    if config.whole_batch_loss:
        yield "The loss couples the samples of a batch, and Keras averages it over micro-batches: that is another loss."
    if config.batch_coupled_layers or config.ghost_batch_size is not None:
        yield "BatchNormalization's moving statistics are updated, and its momentum applied, with every micro-batch."
    yield (
        "With mixed_float16 the loss scale is checked for each micro-batch: one that overflows is dropped, and the "
        "window has one micro-batch more. In pure float16 or bfloat16 the sums lose digits, because they have the "
        "parameters' type."
    )
    yield "Peak memory and speed differ: on JAX, for example, the whole optimizer runs at every micro-step."


def _call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "(none)"
