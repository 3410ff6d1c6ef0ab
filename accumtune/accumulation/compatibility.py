"""Lists every internal name of Keras that accumtune uses, some of TensorFlow's, and checks that they are there.

`accumulate` checks them before it changes a model: after a change in Keras, training would otherwise crash in the
middle of a window, or silently skip what a name was for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from accumtune.accumulation.data import batches as feeding
from accumtune.errors import CompatibilityError

# The tested versions of Keras; others are refused only if a name is missing.
TESTED = "3.14 and 3.15"


@dataclass(frozen=True)
class Name:
    """An internal name of Keras, or of TensorFlow, that accumtune uses.

    Args:
        path: `module:object.attribute`.
        called_with: the parameters that accumtune passes, in Keras's order; None if it does not call it.
        backend: the only backend on which it is used; None for all.
    """

    path: str
    called_with: tuple[str, ...] | None = None
    backend: str | None = None

    def fault(self) -> str | None:
        """Returns what is wrong with the name in the installed Keras; None if nothing is."""
        module_name, _, attributes = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError) as error:
            return f"{self.path} is missing ({error})"
        if self.called_with is None:
            return None
        taken = tuple(inspect.signature(found).parameters)
        positions = [taken.index(name) if name in taken else -1 for name in self.called_with]
        if -1 in positions or positions != sorted(positions):
            return f"{self.path} takes ({', '.join(taken)}) instead of ({', '.join(self.called_with)})"
        return None


_MODEL = "keras:Model."
_FIT = ("self", "x", "y", "batch_size", "epochs", "validation_data", "validation_batch_size")
_ADAPTERS = "keras.src.trainers.data_adapters"
_TENSORFLOW = "keras.src.backend.tensorflow"
_TF_FUNCTION = "tensorflow.python.eager.polymorphic_function"
_JAX = "keras.src.backend.jax.trainer:JAXTrainer."

NAMES = (
    # The model: what accumulation replaces on it, and what it calls.
    *(
        # The class that defines it, because an autologger may have wrapped that of keras.Model.
        Name(f"keras.src.backend.{backend}.trainer:{name}Trainer.fit", _FIT, backend)
        for backend, name in (("tensorflow", "TensorFlow"), ("jax", "JAX"), ("torch", "Torch"))
    ),
    Name(_MODEL + "make_train_function", ("self", "force")),
    Name(_MODEL + "make_test_function", ("self", "force")),
    Name(_MODEL + "_assert_compile_called", ("self", "method_name")),
    Name(_MODEL + "_get_metrics_result_or_logs", ("self", "logs")),
    Name(_MODEL + "_symbolic_build", ("self", "iterator", "data_batch")),
    Name(_MODEL + "_compute_loss", ("self", "x", "y", "y_pred", "sample_weight", "training")),
    Name(_MODEL + "_aggregate_additional_loss", ("self", "loss")),
    Name(_MODEL + "_get_regularization_losses", ("self",)),
    Name(_MODEL + "compute_metrics", ("self", "x", "y", "y_pred", "sample_weight")),
    Name(_MODEL + "_flatten_layers", ("self", "include_self", "recursive")),
    Name("keras.src.trainers.compile_utils:CompileLoss", ("loss",)),
    Name("keras.src.optimizers.base_optimizer:BaseOptimizer.apply", ("self", "grads", "trainable_variables")),
    Name("keras.src.losses.loss:apply_mask"),
    Name("keras.src.losses.loss:squeeze_or_expand_to_same_rank", ("x1", "x2")),
    Name("keras.src.backend:get_keras_mask", ("x",)),
    Name("keras.src.random.seed_generator:global_seed_generator", ()),
    # Data.
    Name("keras.src.trainers.epoch_iterator:EpochIterator", ("x", "steps_per_epoch", "steps_per_execution")),
    Name(f"{_ADAPTERS}:get_data_adapter", ("x", "y", "sample_weight", "batch_size", "shuffle")),
    Name(f"{_ADAPTERS}.data_adapter:DataAdapter"),
    Name(f"{_ADAPTERS}.array_data_adapter:ArrayDataAdapter", ("x", "y", "sample_weight", "batch_size", "shuffle")),
    Name(f"{_ADAPTERS}.array_data_adapter:can_convert_arrays", ("arrays",)),
    Name(f"{_ADAPTERS}.data_adapter_utils:unpack_x_y_sample_weight", ("data",)),
    Name(f"{_ADAPTERS}.array_slicing:train_validation_split", ("arrays", "validation_split")),
    # Layers.
    Name("keras.layers:BatchNormalization._moments", ("self", "inputs", "mask")),
    # Optimizers.
    Name("keras.optimizers:Optimizer._apply_weight_decay"),
    Name("keras.optimizers:Optimizer.update_step", ("self", "gradient", "variable", "learning_rate")),
    Name("keras.optimizers:Optimizer.scale_loss", ("self", "loss")),
    # One backend each.
    Name("keras.src.losses.loss:scale_loss_for_distribution", ("value",), "tensorflow"),
    Name(_MODEL + "_maybe_symbolic_build", ("self", "iterator", "data_batch"), "tensorflow"),
    Name("keras.src.losses.loss:unscale_loss_for_distribution", ("value",), "tensorflow"),
    Name(f"{_TENSORFLOW}.trainer:reduce_per_replica", ("values", "strategy", "reduction"), "tensorflow"),
    Name(f"{_TENSORFLOW}.optimizer:TFOptimizer._all_reduce_sum_gradients", ("self", "grads_and_vars"), "tensorflow"),
    Name("tensorflow.python.autograph.core.ag_ctx:ControlStatusCtx", ("status", "options"), "tensorflow"),
    Name(f"{_TF_FUNCTION}.autograph_util:py_func_from_autograph", ("python_func",), "tensorflow"),
    Name(f"{_TF_FUNCTION}.polymorphic_function:Function.python_function", None, "tensorflow"),
    Name(
        _JAX + "compute_loss_and_updates",
        ("self", "trainable_variables", "non_trainable_variables", "metrics_variables", "x", "y", "sample_weight"),
        "jax",
    ),
    Name(
        _JAX + "_update_metrics_variables",
        ("self", "metrics_variables", "unscaled_loss", "x", "y", "y_pred", "sample_weight"),
        "jax",
    ),
    Name(_JAX + "_get_state_sharding_spec", ("self",), "jax"),
    Name("keras.src.backend.jax.trainer:jit", None, "jax"),
    Name("jax:make_user_context", None, "jax"),  # since 0.8
    Name("keras.src.backend.jax.trainer:_distribute_data", ("data",), "jax"),
    Name(_MODEL + "_should_torch_compile", ("self",), "torch"),
    Name(
        "keras.src.backend.torch.optimizers.torch_sgd:SGD._parallel_update_step",
        ("self", "grads", "variables", "learning_rate"),
        "torch",
    ),
)

# Attributes of instances.
_INSTANCES = {
    "a CompileLoss": ("_flat_losses", "_metrics", "_user_loss"),
    "a functional model": (
        "_build_shapes_dict", "_call_has_training_arg", "_compile_loss", "_compile_metrics", "_inbound_nodes",
        "_inputs_struct", "_loss_tracker", "_non_trainable_variables", "_seed_generators", "_trainable_variables",
    ),
    "an ArrayDataAdapter": ("_inputs",),
    "an EpochIterator": ("data_adapter", "_num_batches", "steps_per_epoch"),
}  # fmt: skip


def check() -> None:
    """Raises CompatibilityError if the installed Keras or backend lacks a name, or has other parameters for it."""
    import keras

    found = faults(keras.backend.backend())
    if found:
        raise CompatibilityError(
            f"Received Keras {keras.__version__} on {keras.backend.backend()}, in which " + "; ".join(found) + ".",
            f"a version with the internal names that accumtune uses; it was tested with {TESTED}.",
            "install one of those (pip install 'keras<3.16'), or a newer accumtune; where the backend lacks a name, a "
            "version of it that accumtune's pyproject.toml allows (JAX 0.8 or newer).",
        )


@functools.cache
def faults(backend: str) -> tuple[str, ...]:
    """Returns what is wrong with the names that are used on a backend."""
    used = [name for name in NAMES if name.backend in (None, backend)]
    return tuple(fault for fault in (*(name.fault() for name in used), *_behaviour()) if fault is not None)


def _behaviour() -> Iterable[str]:
    import keras
    from keras.src.trainers import compile_utils
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
    from keras.src.trainers.epoch_iterator import EpochIterator

    # Named, so that Keras's counters for the user's default names do not change.
    inputs = keras.Input((1,), name="accumtune_inputs")
    model = keras.Model(inputs, keras.layers.Identity(name="accumtune_identity")(inputs), name="accumtune_model")
    array = np.zeros((1, 1))
    instances = (compile_utils.CompileLoss("mse"), model, ArrayDataAdapter(array), EpochIterator(array))
    for (source, names), instance in zip(_INSTANCES.items(), instances, strict=True):
        yield from (f"{source} has no {name}" for name in names if not hasattr(instance, name))
    # Accumulation replaces `_moments`; statistics computed elsewhere would move once per micro-batch.
    if "_moments" not in keras.layers.BatchNormalization.call.__code__.co_names:
        yield "BatchNormalization.call does not use _moments"
    if "_eval_epoch_iterator" not in inspect.unwrap(feeding.keras_fit()).__code__.co_names:
        yield "Model.fit does not use _eval_epoch_iterator"
    used = keras.metrics.MeanMetricWrapper.update_state.__code__.co_names
    for name in {"_fn", "_fn_kwargs"} - set(used):
        yield f"MeanMetricWrapper.update_state does not use {name}"
