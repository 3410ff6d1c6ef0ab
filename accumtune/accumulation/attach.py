"""Installs accumulation on a Keras model, and removes it.

Methods are replaced on the instance, never on its class: `make_train_function`, so that `fit` and `train_on_batch` run
a window per step; `make_test_function`, so that a `fit` validates in micro-batches; `fit`, so that only the rows of a
micro-batch are read at a time; and two that Keras's own `fit` calls (`_assert_compile_called` when it begins,
`_symbolic_build` with the iterator of an epoch), so that an epoch counts windows even if another `fit` calls Keras's.
Saving, pickling and cloning use the class and its configuration, so they give a plain Keras model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import types
import weakref
from typing import Any

from accumtune.accumulation import compatibility, ghost_batch, optimizers
from accumtune.accumulation.losses import whole_batch_loss
from accumtune.accumulation.own_step import own_train_step
from accumtune.accumulation.patched_attributes import put, put_back, replaced
from accumtune.accumulation.window import Accumulation
from accumtune.errors import CustomTrainStepError, ModelError, UncompiledModelError

_ADAPT = "override train_step, compute_loss, compute_metrics or call instead; or train without accumulate."


def install(model: Any, accumulation: Accumulation) -> Any:
    """Installs accumulation, as `accumulate` does after it has read its arguments."""
    import keras

    _check(model)
    if accumulation.ghost_batch_size is not None:
        ghost_batch.check(model)
    chosen = whole_batch_loss.choice_of(model, accumulation.whole_batch_loss)
    accumulation = dataclasses.replace(accumulation, whole_batch_loss=chosen)
    if chosen is True and own_train_step.has_own_step(model):
        seen = "and whole_batch_loss=True, which is about the loss of compile."
        raise own_train_step.refusal(model, seen, "leave out whole_batch_loss.")
    compatibility.check()
    remove(model)
    is_tensorflow = keras.backend.backend() == "tensorflow"
    build = "_maybe_symbolic_build" if is_tensorflow else "_symbolic_build"
    attributes = {
        "_accumtune_accumulation": accumulation,
        "_accumtune_rows": None,  # the arrays of the fit that is running
        "_accumtune_certificate": None,  # of a train_step of its own, see certificate.py
        "_accumtune_samples": None,  # a few of the first batch, see known_samples.py
        "_accumtune_validation_size": None,  # of the fit that is running
        "_accumtune_metric_batch_size": None,  # of its validation, for metrics over the batch
        "_accumtune_test_step_batch_size": None,  # of its validation, for a test_step of the model's own
        "_accumtune_validation_samples": None,  # the number of samples in its validation data, if known
        "_accumtune_is_validating": False,  # whether that validation is running, and not another evaluation
        "_accumtune_counts_batches": False,  # whether the fit that is running has set steps_per_epoch by itself
        "_accumtune_fit_begins": False,  # from the call of fit until its data are ready
        "_accumtune_whole_batch_loss": (None, None),  # the compiled loss that was inspected, and whether it couples
        "_accumtune_noise_meter": None,  # of the callback GradientNoiseScale, see noise_scale.py
        "make_train_function": types.MethodType(_make_train_function, model),
        "make_test_function": types.MethodType(_make_test_function, model),
        "_get_metrics_result_or_logs": types.MethodType(_get_metrics_result_or_logs, model),
        "_assert_compile_called": types.MethodType(_assert_compile_called, model),
        "_symbolic_build": types.MethodType(_symbolic_build, model),
        build: types.MethodType(_maybe_symbolic_build if is_tensorflow else _symbolic_build, model),
        "fit": _fit(model, vars(model).get("fit")),
    }
    before = put(model, attributes)
    put(model, {"_accumtune_before": before, "_accumtune_attributes": tuple(attributes)})
    _forget_functions(model)
    return model


def remove(model: Any) -> Any:
    """Removes accumulation, as `stop_accumulating`; does nothing to a plain model."""
    if "_accumtune_accumulation" not in vars(model):
        return model
    put_back(model, model._accumtune_attributes, model._accumtune_before)
    put_back(model, ("_accumtune_before", "_accumtune_attributes"), {})
    _forget_functions(model)
    return model


def _forget_functions(model: Any) -> None:
    """Makes Keras create its functions again, because those that are compiled would train as before."""
    model.train_function = model.test_function = None
    _free_engine(model)


def _free_engine(model: Any) -> None:
    """Frees the accumulators of an engine that is no longer used; it and its functions form a reference cycle."""
    engine = vars(model).get("_accumtune_engine")
    if engine is not None:
        put_back(model, ["_accumtune_engine"], {})
        if engine() is not None:
            gc.collect()


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
    name = "make_train_function"
    is_own = name in vars(model) and "_accumtune_accumulation" not in vars(model)
    if is_own or type(model).make_train_function is not keras.Model.make_train_function:
        raise CustomTrainStepError(
            f"Received model {model.name!r} of class {type(model).__name__}, which has its own {name}.",
            f"Keras's own {name}: accumulation replaces it, so yours would not be called.",
            _ADAPT,
        )
    optimizers.check(model.optimizer)


def _make_train_function(model: Any, force: bool = False) -> Any:
    """Replaces `keras.Model.make_train_function` on an accumulating model."""
    if model.train_function is not None and not force:
        return model.train_function
    _check(model)  # compile may have been called again
    model.train_function = None
    _free_engine(model)
    engine = _engine(own_train_step.has_own_step(model))(model, model._accumtune_accumulation)
    put(model, {"_accumtune_engine": weakref.ref(engine)})
    model.train_function = engine
    return engine


def _make_test_function(model: Any, force: bool = False) -> Any:
    """Replaces `keras.Model.make_test_function`: the function's batches are split while a `fit` requests that."""
    import keras

    from accumtune.accumulation.validation import Validation

    if isinstance(model.test_function, Validation):
        model.test_function.forget()
    if model.test_function is not None and not force:
        return model.test_function
    make = model._accumtune_before.get("make_test_function", types.MethodType(type(model).make_test_function, model))
    if keras.backend.backend() == "tensorflow" and "make_test_function" not in model._accumtune_before:
        from accumtune.accumulation.engines.engine_tensorflow import ordering

        make = make if ordering is None else types.MethodType(ordering.make_test_function, model)
    model.test_function = Validation(model, functools.partial(make, force=force))
    return model.test_function


def _get_metrics_result_or_logs(model: Any, logs: Any) -> Any:
    """Replaces Keras's method, which ends an evaluation: metrics over the batch get their last samples before."""
    from accumtune.accumulation.validation import Validation

    if isinstance(model.test_function, Validation) and model._accumtune_is_validating:
        logs = model.test_function.end(logs)
    return type(model)._get_metrics_result_or_logs(model, logs)


def _engine(is_own: bool) -> Any:
    """Returns the class of the train function for the present backend; `is_own`: for a model's own train_step."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        if is_own:
            from accumtune.accumulation.own_step.own_step_tensorflow import OwnStepTensorFlow

            return OwnStepTensorFlow
        from accumtune.accumulation.engines.engine_tensorflow import TensorFlowTraining

        return TensorFlowTraining
    if backend == "jax":
        if is_own:
            from accumtune.accumulation.own_step.own_step_jax import OwnStepJax

            return OwnStepJax
        from accumtune.accumulation.engines.engine_jax import JaxTraining

        return JaxTraining
    if backend == "torch":
        if is_own:
            from accumtune.accumulation.own_step.own_step_torch import OwnStepTorch

            return OwnStepTorch
        from accumtune.accumulation.engines.engine_torch import TorchTraining

        return TorchTraining
    raise ModelError(
        f"Received a model on the Keras backend {backend!r}.", "tensorflow, jax or torch.", "set KERAS_BACKEND."
    )


def _assert_compile_called(model: Any, method_name: str | None = None) -> None:
    """Replaces Keras's method, which `fit` and other methods call before they look at their data."""
    put(model, {"_accumtune_fit_begins": method_name == "fit"})
    type(model)._assert_compile_called(model, method_name)


def _maybe_symbolic_build(model: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Replaces the method of Keras's TensorFlow trainer, which builds a model under a `tf.distribute` strategy only."""
    _begin_epoch(model, iterator)
    type(model)._maybe_symbolic_build(model, iterator=iterator, data_batch=data_batch)


def _symbolic_build(model: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Replaces Keras's method, which would mistake a window, or the numbers of its rows, for a batch."""
    from accumtune.accumulation.data import batches as feeding

    _begin_epoch(model, iterator)
    if iterator is not None:
        iterator = feeding.first_micro_batches(iterator, model._accumtune_accumulation, model._accumtune_rows)
    type(model)._symbolic_build(model, iterator=iterator, data_batch=data_batch)
    optimizers.check(model.optimizer)  # again, because some inner optimizers are known only now


def _begin_epoch(model: Any, epoch: Any) -> None:
    """Makes the training epoch iterator of a `fit` count windows, once per `fit`; those of validation do not."""
    from accumtune.accumulation.data import batches as feeding

    is_of_fit = epoch is getattr(model, "_eval_epoch_iterator", None) or not feeding.has_stock_fit(model)
    trains = model._accumtune_fit_begins
    put(model, {"_accumtune_is_validating": epoch is not None and is_of_fit and not trains})
    if epoch is not None and model._accumtune_fit_begins:
        put(model, {"_accumtune_fit_begins": False})
        feeding.count_in_windows(epoch, model._accumtune_accumulation, model._accumtune_counts_batches)


def _fit(model: Any, own: Any) -> Any:
    """Returns the model's new `fit`; `own` is the one that this instance had already, or None."""
    from accumtune.accumulation.data import batches as feeding
    from accumtune.accumulation.validation import needs_whole_batches

    @functools.wraps(own or type(model).fit)
    def fit(*args: Any, **kwargs: Any) -> Any:
        accumulation = model._accumtune_accumulation
        if own is None and feeding.has_stock_fit(model):
            named = feeding.named_arguments(model, args, kwargs)
            given, rows = feeding.with_rows(model, accumulation, named)
            size = model._accumtune_metric_batch_size  # in a search, all trials have the same
            # Only during fit, so that the model does not keep its data.
            during: dict[str, Any] = {"_accumtune_rows": rows}
            is_at_default = not named.get("validation_batch_size")
            if needs_whole_batches(model) and is_at_default:
                batch, steps = given.get("batch_size") or feeding.KERAS_BATCH_SIZE, accumulation.accumulation_steps or 1
                given["validation_batch_size"] = batch * steps
                during["_accumtune_validation_size"] = accumulation.micro_batch_size or batch
            elif size is None and is_at_default and feeding.has_validation_arrays(given):
                size = given.get("batch_size") or feeding.KERAS_BATCH_SIZE
                validation_data = feeding.unpacked(given["validation_data"])
                during["_accumtune_validation_samples"] = feeding.samples_of(validation_data)
            ending = contextlib.nullcontext() if rows is None else contextlib.closing(rows)
            with ending, replaced(model, {**during, "_accumtune_metric_batch_size": size}):
                return type(model).fit(model, **given)
        # A fit that prepares the data, or an autologger's, gets data and arguments as they were given.
        size = model._accumtune_test_step_batch_size or accumulation.micro_batch_size
        size = None if kwargs.get("validation_batch_size") else size
        counts_batches = kwargs.get("steps_per_epoch") is None
        with replaced(model, {"_accumtune_validation_size": size, "_accumtune_counts_batches": counts_batches}):
            return own(*args, **kwargs) if own is not None else type(model).fit(model, *args, **kwargs)

    return fit
