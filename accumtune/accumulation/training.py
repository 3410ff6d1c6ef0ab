"""Where accumulation takes hold of a Keras model, and lets go of it.

Three methods are replaced on the instance, never on its class: `make_train_function`, so that `fit` and
`train_on_batch` run a window per step; `fit`, so that an epoch has as many steps as windows; and `_symbolic_build`,
which looks at the first batch. Where memory is measured on TensorFlow, `make_test_function` is a fourth one. Saving,
pickling and cloning look at the class and its configuration, so what they give is a plain Keras model.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from accumtune.accumulation import compatibility, optimizers
from accumtune.accumulation.window import Accumulation
from accumtune.errors import CustomTrainStepError, ModelError, UncompiledModelError

_ATTRIBUTES = (
    "_accumtune_accumulation", "_accumtune_rows", "_accumtune_samples", "_accumtune_noise_meter",
    "make_train_function", "make_test_function",
    "_symbolic_build", "fit",
)  # fmt: skip

_ADAPT = """\
leave train_step as it is and override what it calls:
    class MyModel(keras.Model):
        def call(self, inputs, training=None): ...                     # the forward pass
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight) + ...   # a mean over samples
        def compute_metrics(self, x, y, y_pred, sample_weight=None): ...
Losses of a layer go through self.add_loss(mean over samples)."""


def install(model: Any, accumulation: Accumulation) -> Any:
    """`accumulate` after its arguments were read."""
    import keras

    _check(model)
    compatibility.check()
    remove(model)
    _set(model, "_accumtune_accumulation", accumulation)
    _set(model, "_accumtune_rows", None)  # the arrays of the fit that is running
    _set(model, "_accumtune_samples", None)  # a few of the first batch, see known_samples.py
    _set(model, "_accumtune_noise_meter", None)  # of the callback that listens to it, see noise_scale.py
    _set(model, "make_train_function", types.MethodType(_make_train_function, model))
    if keras.backend.backend() == "tensorflow":
        from accumtune.accumulation import sequence

        if sequence.is_on() and "make_test_function" not in vars(model):
            _set(model, "make_test_function", types.MethodType(sequence.make_test_function, model))
    _set(model, "_symbolic_build", types.MethodType(_symbolic_build, model))
    _set(model, "fit", _fit(model, accumulation))
    return model


def remove(model: Any) -> Any:
    """`stop_accumulating`; on a plain model it does nothing."""
    if "_accumtune_accumulation" not in vars(model):
        return model
    for name in _ATTRIBUTES:
        if name in vars(model):
            delattr(model, name)
    model.train_function = None
    return model


def _set(model: Any, name: str, value: Any) -> None:
    # Keras and TensorFlow watch attributes for what has to be saved; these are not to be.
    object.__setattr__(model, name, value)


def _check(model: Any) -> None:
    import keras

    if not isinstance(model, keras.Model):
        raise ModelError(f"Received a {type(model).__name__}.", "a keras.Model.", "pass the model that you compiled.")
    if not model.compiled or model.optimizer is None:
        raise UncompiledModelError(
            f"Received model {model.name!r}, which is not compiled.",
            "a compiled model.",
            'call model.compile(optimizer="adam", loss=...) before accumulate(model, ...).',
        )
    for name in ("train_step", "make_train_function"):
        is_ours = name in vars(model) and "_accumtune_accumulation" in vars(model) and name != "train_step"
        if getattr(type(model), name) is not getattr(keras.Model, name) or (name in vars(model) and not is_ours):
            raise CustomTrainStepError(
                f"Received model {model.name!r} of class {type(model).__name__}, which has its own {name}.",
                "the stock train_step: accumulation replaces it, so what yours does would be lost.",
                _ADAPT,
            )
    optimizers.check(model.optimizer)


def _make_train_function(model: Any, force: bool = False) -> Any:
    """Stands in for `keras.Model.make_train_function` on an accumulating model."""
    if model.train_function is not None and not force:
        return model.train_function
    accumulation = model._accumtune_accumulation
    _check(model)  # compile may have been called again
    model.train_function = _engine()(model, accumulation)
    return model.train_function


def _engine() -> Any:
    """The train function of the Keras backend in use."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        from accumtune.accumulation.tensorflow import TensorFlowTraining

        return TensorFlowTraining
    if backend == "jax":
        from accumtune.accumulation.jax import JaxTraining

        return JaxTraining
    if backend == "torch":
        from accumtune.accumulation.torch import TorchTraining

        return TorchTraining
    raise ModelError(
        f"Received a model on the Keras backend {backend!r}.", "tensorflow, jax or torch.", "set KERAS_BACKEND."
    )


def _symbolic_build(model: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Stands in for Keras's, which would take a window, or the numbers of its rows, for a batch."""
    from accumtune.accumulation import feeding

    if iterator is not None:
        iterator = feeding.first_micro_batches(iterator, model._accumtune_accumulation, model._accumtune_rows)
    type(model)._symbolic_build(model, iterator=iterator, data_batch=data_batch)
    optimizers.check(model.optimizer)  # some are known only now


def _fit(model: Any, accumulation: Accumulation) -> Any:
    """The model's `fit`, whose epochs count windows and whose validation needs no more memory than training."""
    from accumtune.accumulation import feeding

    own_fit = type(model).fit

    @functools.wraps(own_fit)
    def fit(*args: Any, **kwargs: Any) -> Any:
        given = feeding.named_arguments(model, args, kwargs)
        if accumulation.micro_batch_size is not None:
            given = feeding.with_small_validation(accumulation.micro_batch_size, given)
        given, rows = feeding.with_rows_and_windows(model, accumulation, given)
        _set(model, "_accumtune_rows", rows)
        try:
            return own_fit(model, **given)
        finally:
            _set(model, "_accumtune_rows", None)  # a model does not keep the data it was trained on

    return fit
