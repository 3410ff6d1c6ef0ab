"""Feeds the user's data to a trial: a few samples for a probe, and batches of the effective size for training.

Data come as arrays (also dicts and tuples of arrays), a `keras.utils.PyDataset`, or a function without arguments that
returns one of these or a `tf.data.Dataset`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accumtune.accumulation.data.array_datasets import training_arguments, validation_source
from accumtune.accumulation.data.array_kinds import as_rows, first_rows, part
from accumtune.accumulation.data.batches import named_arguments, prepares_its_data
from accumtune.errors import DataError
from accumtune.worker.data.pipeline_process import called
from accumtune.worker.data.trees import join_trees, leaves, map_tree, number_of_rows
from accumtune.worker.transport.payload import is_data_function

_TORCH_LOADER = "torch.utils.data.dataloader.DataLoader"
Samples = tuple[Any, Any, Any]  # x, y, sample_weight: trees of arrays, or None
# The default batch size of `model.evaluate`.
_METRIC_BATCH_SIZE = 32


def input_arguments(fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> Samples:
    """Returns the training data among the arguments of `tuner.search`, before any function is called."""
    named = dict(zip(("x", "y"), fit_args, strict=False))
    return (
        named.get("x", fit_kwargs.get("x")),
        named.get("y", fit_kwargs.get("y")),
        fit_kwargs.get("sample_weight"),
    )


def resolve(x: Any, y: Any = None, sample_weight: Any = None) -> Samples:
    """Calls the functions among the data; a function for `x` may return `(x, y)` or `(x, y, sample_weight)`."""
    if is_data_function(x):
        x = called(x)
        if y is None and isinstance(x, tuple) and 2 <= len(x) <= 3:
            x, y, *rest = x
            sample_weight = rest[0] if rest else sample_weight
    return x, y() if is_data_function(y) else y, sample_weight


def is_tf_dataset(value: Any) -> bool:
    """Returns whether a value is a `tf.data.Dataset`, without importing TensorFlow."""
    return hasattr(value, "element_spec") and hasattr(value, "rebatch")


def is_py_dataset(value: Any) -> bool:
    """Returns whether a value is a `keras.utils.PyDataset` or behaves like one."""
    return hasattr(value, "__getitem__") and hasattr(value, "num_batches")


def is_torch_loader(value: Any) -> bool:
    """Returns whether a value is a `torch.utils.data.DataLoader`, without importing torch."""
    return any(f"{base.__module__}.{base.__name__}" == _TORCH_LOADER for base in type(value).__mro__)


def is_pipeline(value: Any) -> bool:
    """Returns whether a value yields batches, instead of being arrays."""
    return is_tf_dataset(value) or is_py_dataset(value) or is_torch_loader(value)


def first_samples(x: Any, y: Any = None, sample_weight: Any = None, *, count: int, is_batched: bool = True) -> Samples:
    """Returns the first samples of the data, as arrays; a smaller data set is repeated.

    Args:
        x, y, sample_weight: as given to `tuner.search`.
        count: the number of samples.
        is_batched: whether the elements of a `tf.data.Dataset` are batches, as `fit` requires.

    Returns:
        `(x, y, sample_weight)`, each a tree of arrays with `count` rows, or None.
    """
    x, y, sample_weight = resolve(x, y, sample_weight)
    if is_tf_dataset(x):
        x, y, sample_weight = _collect(iter(x if is_batched else x.batch(count)), count)
    elif is_py_dataset(x):
        x, y, sample_weight = _collect((x[index] for index in range(x.num_batches or count)), count)
    elif is_torch_loader(x):
        x, y, sample_weight = _collect(iter(x), count)
    number_of_rows(x)

    def take(leaf: Any) -> Any:
        return first_rows(leaf, count)

    return map_tree(take, x), map_tree(take, y), map_tree(take, sample_weight)


def feed_by_batches(
    model: Any, effective_batch_size: int, micro_batch_size: int, test_step_batch_size: int | None = None
) -> None:
    """Makes `model.fit` train with the effective batch and validate at the micro-batch, whoever calls it.

    Arrays are read batch by batch, so that the data set at rest takes no memory on the device; a pipeline's batches
    are changed in size. Metrics with one value per batch, and losses that couple its samples, are computed over
    `validation_batch_size` samples at a time (default: 32, as in `model.evaluate`), the same number in all trials. The
    model's own `test_step`, whose results may depend on the size of a batch, gets as many (default:
    `test_step_batch_size`, and without it the micro-batch).
    """
    from accumtune.accumulation.own_step.own_train_step import has_own_test_step
    from accumtune.accumulation.patched_attributes import replaced
    from accumtune.accumulation.validation import needs_whole_batches

    keras_fit = model.fit
    by_default = test_step_batch_size or micro_batch_size

    @functools.wraps(keras_fit)
    def fit(*args: Any, **kwargs: Any) -> Any:
        given = named_arguments(model, args, kwargs)
        if given.get("batch_size") not in (None, effective_batch_size):
            warnings.warn(
                f"fit() was called with batch_size={given['batch_size']}, but this trial uses its effective batch, "
                f"{effective_batch_size}. Leave batch_size out of your HyperModel's fit().",
                stacklevel=2,
            )
        given = _with_validation_split(given)
        asked = given.get("validation_batch_size")
        size = asked or _METRIC_BATCH_SIZE
        given = _with_training_batches(model, given, effective_batch_size)
        at_once = samples_validated_at_once(model, asked, by_default)
        given = _with_validation_batches(model, given, at_once or micro_batch_size, size)
        sizes = {
            "_accumtune_metric_batch_size": None if needs_whole_batches(model) else size,
            "_accumtune_test_step_batch_size": asked or by_default if has_own_test_step(model) else None,
        }
        try:
            with replaced(model, sizes):
                return keras_fit(**given)
        except Exception as error:
            refusal = getattr(given["x"], "refusal", None)
            if refusal is None:
                raise
            raise refusal from error

    model.fit = fit


def samples_validated_at_once(model: Any, asked: int | None, test_step_batch_size: int) -> int | None:
    """Returns the samples of a batch of validation; None if they are those of a micro-batch.

    Args:
        asked: the user's `validation_batch_size`.
        test_step_batch_size: for a model with a `test_step` of its own, where the user asks for nothing.
    """
    from accumtune.accumulation.own_step.own_train_step import has_own_test_step
    from accumtune.accumulation.validation import needs_whole_batches

    if needs_whole_batches(model):
        return asked or _METRIC_BATCH_SIZE
    return asked or test_step_batch_size if has_own_test_step(model) else None


def most_validation_samples(given: Mapping[str, Any]) -> int | None:
    """Returns the number of validation samples among the arguments of `fit`; None if it is unknown."""
    validation_data, x = given.get("validation_data"), given.get("x")
    if validation_data is None:
        split = given.get("validation_split") or 0.0
        if not split or is_data_function(x) or is_pipeline(x):
            return None if split else 0
        return number_of_rows(x) - int(number_of_rows(x) * (1 - split))
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    return None if any(is_data_function(leaf) or is_pipeline(leaf) for leaf in parts) else number_of_rows(parts[0])


def fit_by_default(model: Any, effective_batch_size: int) -> Any:
    """Makes the effective batch the default `batch_size` of `model.fit`, instead of Keras's 32.

    Data that come in batches keep their batches.

    Returns:
        The same model.
    """
    keras_fit = model.fit
    names = list(inspect.signature(type(model).fit).parameters)[1:]  # without self

    @functools.wraps(keras_fit)
    def fit(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if "batch_size" in names and given.get("batch_size") is None and _has_no_batches(given.get("x")):
            position = names.index("batch_size")
            if position < len(args):
                args = (*args[:position], effective_batch_size, *args[position + 1 :])
            else:
                kwargs["batch_size"] = effective_batch_size
        return keras_fit(*args, **kwargs)

    model.fit = fit
    return model


def _has_no_batches(x: Any) -> bool:
    """Returns whether data are arrays or lists of numbers, for which Keras takes a batch size."""
    if isinstance(x, (Mapping, list, tuple)):
        return all(map(_has_no_batches, x.values() if isinstance(x, Mapping) else x))
    is_number = isinstance(x, (int, float, str, bool))  # of lists, which Keras takes too
    return is_number or (bool(getattr(x, "shape", None)) and not is_pipeline(x) and not hasattr(x, "__next__"))


def _with_validation_split(given: dict[str, Any]) -> dict[str, Any]:
    share = given.pop("validation_split", 0.0)
    if not share or given.get("validation_data") is not None:
        return given
    x, y, sample_weight = resolve(given.get("x"), given.get("y"), given.get("sample_weight"))
    if is_pipeline(x):
        raise DataError(
            f"Received validation_split={share} with x of type {type(x).__name__}.",
            "arrays, with validation_split.",
            "split the data yourself and pass validation_data.",
        )
    # As in Keras: the last samples, before shuffling.
    split = int(number_of_rows(x) * (1 - share))
    head = map_tree(lambda leaf: part(leaf, slice(None, split)), (x, y, sample_weight))
    tail = map_tree(lambda leaf: part(leaf, slice(split, None)), (x, y, sample_weight))
    return {**given, "x": head[0], "y": head[1], "sample_weight": head[2], "validation_data": tail}


def _with_training_batches(model: Any, given: dict[str, Any], batch_size: int) -> dict[str, Any]:
    given.pop("batch_size", None)
    x, y, sample_weight = resolve(given.pop("x", None), given.pop("y", None), given.pop("sample_weight", None))
    if prepares_its_data(model):
        if is_pipeline(x):
            return {**given, "x": _refuse_endless(_rebatched(model, x, batch_size), given, "steps_per_epoch")}
        return {**given, **training_arguments(model, x, y, sample_weight, batch_size=batch_size)}
    shuffle, class_weight = given.pop("shuffle", True), given.pop("class_weight", None)
    if is_pipeline(x):
        x = _refuse_endless(_rebatched(model, x, batch_size), given, "steps_per_epoch")
        return {**given, "x": x, "class_weight": class_weight, "shuffle": shuffle}
    number_of_rows(x)
    options = {"batch_size": batch_size, "shuffle": shuffle, "class_weight": class_weight}
    return {**given, **training_arguments(model, x, y, sample_weight, **options)}


def _with_validation_batches(model: Any, given: dict[str, Any], batch_size: int, counted_size: int) -> dict[str, Any]:
    """Makes validation use batches of `batch_size`, of the samples in `validation_steps` of the user's batches.

    For arrays, and for data sets of single samples, one of the user's batches has `counted_size` samples.
    """
    validation_data = given.pop("validation_data", None)
    given.pop("validation_batch_size", None)
    if validation_data is None:
        return given
    steps = given.pop("validation_steps", None)
    if is_data_function(validation_data):
        validation_data = called(validation_data)
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    x, y, sample_weight = resolve(*parts)
    if is_pipeline(x):
        if steps and is_tf_dataset(x) and not has_batches(model, x):
            steps *= counted_size
        cut = _refuse_endless(_rebatched(model, x, batch_size, steps), {"validation_steps": steps}, "validation_steps")
        return {**given, "validation_data": cut}
    number_of_rows(x)
    if steps:
        first = slice(0, steps * counted_size)
        x, y, sample_weight = map_tree(lambda leaf: part(leaf, first), (x, y, sample_weight))
    return {**given, "validation_data": validation_source(model, x, y, sample_weight, batch_size=batch_size)}


def _rebatched(model: Any, pipeline: Any, batch_size: int, first: int | None = None) -> Any:
    from accumtune.worker.data.rebatch import rebatched

    return rebatched(pipeline, batch_size, not is_tf_dataset(pipeline) or has_batches(model, pipeline), first)


def _refuse_endless(pipeline: Any, given: Mapping[str, Any], steps: str) -> Any:
    """Returns the pipeline; one that repeats its samples for ever, and without a number of steps, is refused."""
    if is_tf_dataset(pipeline) and int(pipeline.cardinality()) == -1 and not given.get(steps):  # INFINITE_CARDINALITY
        raise DataError(
            "Received a tf.data.Dataset that repeats its samples for ever, so that an epoch would never end.",
            f"a data set with an end, or {steps}.",
            f"leave out .repeat(), or give search() {steps}=...: "
            + ("an update is one step." if steps == "steps_per_epoch" else "one of your batches is one step."),
        )
    return pipeline


def has_batches(model: Any, dataset: Any) -> bool:
    """Returns whether the elements of a `tf.data.Dataset` are batches, as `fit` requires, or single samples.

    It compares ranks with those of the model's inputs; if these are unknown, the elements count as batches.
    """
    spec = dataset.element_spec
    if any(len(shape) == 0 for leaf in leaves(spec) if (shape := _shape(leaf)) is not None):
        return False  # a single number is not a batch
    if prepares_its_data(model):
        return True  # its fit changes the data, so the ranks cannot be compared
    pairs = _with_inputs(model, spec[0] if isinstance(spec, tuple) else spec)
    return not pairs or not all(_may_be_sample(_shape(leaf), tuple(tensor.shape)) for leaf, tensor in pairs)


def _with_inputs(model: Any, features: Any) -> list[tuple[Any, Any]]:
    """Pairs the features with the model's inputs: by name as in Keras, or else in order."""
    inputs = getattr(model, "inputs", None) or []
    if inputs and isinstance(features, Mapping):
        named = {tensor.name: tensor for tensor in inputs}
        if isinstance(model.input, Mapping):
            named |= model.input
        known = [(features[name], named[name]) for name in named if name in features]
        if known:
            return known
    return list(zip(leaves(features), inputs, strict=False))


def _may_be_sample(shape: tuple[int | None, ...] | None, batch_shape: tuple[int | None, ...]) -> bool:
    if shape is None or len(shape) >= len(batch_shape):
        return False
    # Keras adds a last axis of 1 to batches that lack it.
    return len(shape) < len(batch_shape) - 1 or batch_shape[-1] != 1 or shape[-1] == 1


def _shape(spec: Any) -> tuple[int | None, ...] | None:
    shape = getattr(spec, "shape", None)
    return None if shape is None or shape.rank is None else tuple(shape)


def _collect(batches: Iterator[Any], count: int) -> Samples:
    collected: list[Samples] = []
    rows = 0
    for batch in batches:
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)  # torch's are lists
        arrays = map_tree(as_rows, tuple(parts) + (None,) * (3 - len(parts)))
        collected.append(arrays)
        rows += number_of_rows(arrays[0])
        if rows >= count:
            break
    if not collected:
        raise DataError(
            "Received data without a single batch.",
            "at least one sample.",
            "check what the function or the data set yields; an iterator that was read before is empty.",
        )
    joined: tuple[Any, Any, Any] = join_trees(collected)
    return joined
