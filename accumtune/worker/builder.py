"""Calls the user's build function, and checks that it returns a compiled Keras model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accumtune.errors import BuildError, ModelError, UncompiledModelError

# The learning rates in the configurations of schedules; all other entries are steps or shapes.
_RATES_OF_SCHEDULES = (
    "initial_learning_rate", "end_learning_rate", "warmup_target", "values", "learning_rate", "maximal_learning_rate",
)  # fmt: skip


@dataclass(frozen=True)
class ModelBuilder:
    """Builds plain, compiled models from hyperparameters.

    Args:
        hypermodel: a Keras Tuner build function or `keras_tuner.HyperModel`.
        optimizer, loss, metrics: as in `keras_tuner.Tuner`, override what the model was compiled with.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`: how the learning rate grows with the effective batch.
        base_effective_batch_size: the effective batch at which the learning rate is used as the build function sets it.
        whole_batch_loss: as in `accumtune.accumulate`, for all models.
    """

    hypermodel: Any
    optimizer: Any = None
    loss: Any = None
    metrics: Any = None
    learning_rate_scaling: str | None = None
    base_effective_batch_size: int | None = None
    whole_batch_loss: bool | str = "auto"

    def declare_hyperparameters(self, hp: Any) -> None:
        declare = getattr(self.hypermodel, "declare_hyperparameters", None)
        if declare is not None:
            declare(hp)

    def build_plain(self, hp: Any) -> Any:
        """Builds the user's model, compiled, without accumulation.

        Raises:
            BuildError: the build function returned something other than a Keras model.
            UncompiledModelError: the model was not compiled.
        """
        import keras

        from accumtune.accumulation.losses.whole_batch_loss import chosen_for

        build: Callable[[Any], Any] = getattr(self.hypermodel, "build", self.hypermodel)
        model = build(hp)
        if not isinstance(model, keras.Model):
            raise BuildError(
                f"The build function returned {model!r} of type {type(model).__name__}.",
                "a compiled keras.Model.",
                "end the build function with `return model`.",
            )
        if self.optimizer or self.loss or self.metrics:
            self._recompile(model)
        if not model.compiled or model.optimizer is None:
            raise UncompiledModelError(
                f"The build function returned the model {model.name!r}, which is not compiled with an optimizer.",
                "a compiled keras.Model.",
                "call `model.compile(optimizer=..., loss=...)` before returning it.",
            )
        if self.learning_rate_scaling is not None:
            scale_learning_rate(model.optimizer, self._learning_rate_factor(hp))
        chosen_for(model, self.whole_batch_loss)
        return model

    def _recompile(self, model: Any) -> None:
        import keras

        optimizer = self.optimizer
        if optimizer is not None and not isinstance(optimizer, str):
            # Every trial needs an optimizer of its own.
            optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        given = {"optimizer": optimizer, "loss": self.loss, "metrics": self.metrics}
        model.compile(**{**_compiled_with(model), **{name: value for name, value in given.items() if value}})

    def _learning_rate_factor(self, hp: Any) -> float:
        effective = hp.values.get("effective_batch_size")
        if effective is None or self.base_effective_batch_size is None:
            return 1.0
        ratio = float(effective / self.base_effective_batch_size)
        # Goyal et al. 2017 (linear, SGD); Krizhevsky 2014 and Malladi et al. 2022 (square root, adaptive methods).
        return ratio if self.learning_rate_scaling == "linear" else float(ratio**0.5)


def _compiled_with(model: Any) -> dict[str, Any]:
    """Returns the arguments of a model's `compile`; if the class overrides it, only those that Keras Tuner passes."""
    import keras

    known = dict(model._compile_config.config) if model.compiled else {}
    known = {**known, "optimizer": getattr(model, "optimizer", None), "loss": model.loss}
    if type(model).compile is keras.Model.compile:
        return known
    return {name: known.get(name) for name in ("optimizer", "loss", "metrics")}


def scale_learning_rate(optimizer: Any, factor: float) -> None:
    """Multiplies an optimizer's learning rate, also if it is one of Keras's schedules.

    Raises:
        ModelError: a schedule whose configuration has no known learning rate.
    """
    import keras

    inner = getattr(optimizer, "inner_optimizer", optimizer)  # LossScaleOptimizer
    rate = inner._learning_rate
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        inner.learning_rate = float(keras.ops.convert_to_numpy(inner.learning_rate)) * factor
        return
    config = rate.get_config()
    known = [name for name in _RATES_OF_SCHEDULES if config.get(name) is not None]
    if not known:
        raise ModelError(
            f"Received learning_rate_scaling together with the schedule {type(rate).__name__}, whose configuration "
            f"has none of {', '.join(_RATES_OF_SCHEDULES)}.",
            "a number, or one of Keras's own schedules.",
            "scale the learning rate inside the build function, with hp.values['effective_batch_size'].",
        )
    for name in known:
        value = config[name]
        config[name] = [item * factor for item in value] if isinstance(value, (list, tuple)) else value * factor
    inner._learning_rate = type(rate).from_config(config)
