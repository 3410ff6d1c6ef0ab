"""Finds what keeps accumulation from being exact: results that depend on which samples share a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accumtune.accumulation import ghost_batch
from accumtune.accumulation.coupling.known_samples import Samples
from accumtune.accumulation.coupling.layer_trials import (
    axes_in,
    has_code_of_the_user,
    may_have_samples,
    recorded_calls,
)
from accumtune.accumulation.coupling.layer_trials import why_coupled as why_layer_coupled
from accumtune.accumulation.own_step import own_train_step
from accumtune.errors import CustomTrainStepError

if TYPE_CHECKING:
    import keras


_ALONG_SAMPLES = "works along the axis of the samples."
# An attribute that the user may set on a layer, model, loss or metric, its class or its function.
DECLARATION = "samples_are_independent"
DECLARED = f"declares {DECLARATION} = False."
HOW_TO_KNOW = f"Test it with data, batch_coupled_layers(model, x, y), or declare it: {DECLARATION} = True."


@dataclass(frozen=True)
class Coupling:
    """A layer or loss whose result depends on which samples share a micro-batch.

    Args:
        name: the layer's or the loss's name.
        kind: its class or function.
        reason: what it does with the batch.
        is_known: False if it could not be tested, so that accumulation may be exact all the same.
    """

    name: str
    kind: str
    reason: str
    is_known: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


def batch_coupled_layers(model: keras.Model, x: Any = None, y: Any = None) -> list[Coupling]:
    """Lists what keeps accumulated training of `model` from equalling training at the effective batch.

    It finds BatchNormalization and layers derived from it (if they are trainable, and the model does not accumulate
    with a `ghost_batch_size`), SpectralNormalization, recurrent layers with `stateful=True`, normalizations and losses
    along the axis of the samples, layers whose `add_loss` is not a mean over samples, in-batch losses of Keras (Circle;
    Dice and Tversky over the whole batch) and an overridden `compute_loss`. Your own losses, layers, Lambdas and models
    are tested by running them: does a sample's result depend on the other samples, does a forward pass change
    variables, is a loss a mean over samples, also with missing targets?

    A model that accumulates computes losses that couple samples over the whole effective batch, unless
    `accumulate(..., whole_batch_loss=False)` says otherwise, so they are not listed. For a model that does not
    accumulate yet, they are.

    Whatever could not be tested is listed as unknown (`is_known` is False). A subclassed model can be tested after it
    was trained, or with samples of its data. You can also declare the answer on a layer, model, loss or metric (the
    object, its class or the function): `samples_are_independent = True`, or False.

    Args:
        model: a Keras model; losses are inspected if it is compiled.
        x, y: a few samples of the training data (NumPy arrays, or structures of them), to test the model's own code
            with; five rows are enough for x. A model that is not built yet is built, as by a call. Default: samples of
            the last `fit`, if the model accumulates.

    Returns:
        A `Coupling` for each; print it with `str()`. `[]` means that accumulation is exact.
    """
    accumulation = getattr(model, "_accumtune_accumulation", None)
    if accumulation is None or accumulation.ghost_batch_size is None:
        return _coupled(model, x, y)
    return coupled_with_ghost_batches(model, x, y)


def coupled_with_ghost_batches(model: keras.Model, x: Any = None, y: Any = None) -> list[Coupling]:
    """Lists what `batch_coupled_layers` would list if the model accumulated with a `ghost_batch_size`."""
    with ghost_batch.set_aside(model):
        return _coupled(model, x, y)


def _coupled(model: Any, x: Any, y: Any) -> list[Coupling]:
    if own_train_step.has_own_step(model):
        return _with_own_step(model, x, y)
    seen = Samples(x, y) if x is not None else getattr(model, "_accumtune_samples", None)
    layers = list(model._flatten_layers(include_self=True))
    has_own_code = any(map(has_code_of_the_user, layers))
    calls = recorded_calls(model, None if seen is None else seen.x) if has_own_code else {}
    layers = list(model._flatten_layers(include_self=True))
    found = [_layer(layer) for layer in layers]
    found += _tried_layers(layers, {id(layer) for layer, item in zip(layers, found, strict=True) if item}, calls)
    is_whole = _takes_whole_batches(model)
    found += [] if is_whole else _losses(model, seen)
    found += _metrics(model)
    found.append(None if is_whole else _compute_loss(model))
    return list(dict.fromkeys(item for item in found if item is not None))


def couples_samples_in_its_loss(model: keras.Model) -> bool:
    """Returns whether a compiled loss, or an overridden `compute_loss`, may be something else than a mean over samples.

    On several devices, where whole batches are refused, an overridden `compute_loss` counts as a mean.
    """
    from accumtune.accumulation.losses.batch_metrics import is_spread

    own = None if is_spread(model) else _compute_loss(model)
    return any(item is not None for item in (own, *_losses(model, None)))


def _takes_whole_batches(model: Any) -> bool:
    """Returns whether `model` accumulates with its loss over the whole effective batch; its losses are then exact."""
    accumulation = getattr(model, "_accumtune_accumulation", None)
    chosen = False if accumulation is None else accumulation.whole_batch_loss
    return couples_samples_in_its_loss(model) if chosen == "auto" else bool(chosen)


def _with_own_step(model: Any, x: Any, y: Any) -> list[Coupling]:
    """Lists the coupling of a model with its own `train_step`: known layers, and what the step's certificate says."""
    certificate, reason = own_train_step.certificate_of(model), ""
    if certificate is None and x is None:
        reason = "has its own train_step, which is tested with data: unknown."
    elif certificate is None:
        try:
            own_train_step.certify(model, x, y)
        except CustomTrainStepError as error:
            reason = error.received
    layers = [_layer(layer) for layer in model._flatten_layers()]
    found = list(dict.fromkeys(item for item in layers if item is not None))
    return [*found, Coupling(model.name, type(model).__name__, reason, is_known=x is not None)] if reason else found


def runs_code_of_the_user(model: keras.Model) -> bool:
    """Returns whether some of a model's layers or losses must be tested by running them, preferably on data."""
    import keras

    if own_train_step.has_own_step(model):
        return True
    losses = [keras.losses.get(loss) if isinstance(loss, str) else loss for loss in _compiled_losses(model)]
    own_losses = [loss for loss in losses if not _is_per_sample(loss, getattr(loss, "fn", loss))]
    return bool(own_losses) or any(map(has_code_of_the_user, model._flatten_layers(include_self=True)))


def _tried_layers(layers: list[Any], coupled: set[int], calls: dict[int, Any]) -> list[Coupling]:
    """Tests the layers with code of the user's, inner ones first.

    A block is not listed if a layer in it is. If a block is found to be independent, so are the layers in it.
    """
    found: dict[int, Coupling] = {}
    for layer in sorted(layers, key=lambda layer: len(list(layer._flatten_layers()))):
        parts = {id(part) for part in layer._flatten_layers(include_self=True)}
        if coupled & parts or not has_code_of_the_user(layer):
            continue
        declared = getattr(layer, DECLARATION, None)
        reason = DECLARED if declared is False else "" if declared else why_layer_coupled(layer, calls.get(id(layer)))
        if reason is None:
            found[id(layer)] = Coupling(layer.name, type(layer).__name__, _unknown(layer), is_known=False)
            continue
        found = {key: item for key, item in found.items() if key not in parts or item.is_known}
        if reason:
            found[id(layer)] = Coupling(layer.name, type(layer).__name__, reason)
            coupled = coupled | {id(layer)}
    return list(found.values())


def _unknown(layer: Any) -> str:
    names = getattr(getattr(type(layer).call, "__code__", None), "co_names", ())
    does = ""
    if "add_loss" in names:
        does = ", and adds a loss of its own"
    elif {"assign", "assign_add", "assign_sub"} & set(names):
        does = ", and assigns to variables"
    return f"could not be tested{does}: unknown. {HOW_TO_KNOW}"


def _layer(layer: Any) -> Coupling | None:
    import keras

    def coupling(reason: str) -> Coupling:
        return Coupling(layer.name, type(layer).__name__, reason)

    if getattr(layer, DECLARATION, None):
        return None

    if isinstance(layer, keras.layers.BatchNormalization):
        return coupling("normalizes with the statistics of the micro-batch.") if layer.trainable else None
    if "BatchNorm" in type(layer).__name__ or "BatchRenorm" in type(layer).__name__:
        return coupling("by its name, normalizes with the statistics of the micro-batch.")
    if isinstance(layer, keras.layers.SpectralNormalization):
        return coupling("takes a power iteration in every forward pass, hence several per update.")
    if getattr(layer, "stateful", False):
        return coupling("carries its state from micro-batch to micro-batch.")
    along_an_axis = (
        keras.layers.LayerNormalization,
        keras.layers.RMSNormalization,
        keras.layers.Softmax,
        keras.layers.UnitNormalization,
    )
    if isinstance(layer, along_an_axis) and _has_samples(layer.axis):
        return coupling(_ALONG_SAMPLES)
    return None


def _axis_of(loss: Any) -> Any:
    return getattr(loss, "axis", getattr(loss, "_fn_kwargs", {}).get("axis"))


def _has_samples(axis: Any) -> bool:
    """Returns whether `axis`, an int or several, includes the first axis."""
    return 0 in axes_in(axis)


def _compute_loss(model: Any) -> Coupling | None:
    import keras

    if type(model).compute_loss is keras.Model.compute_loss or getattr(model, DECLARATION, None):
        return None
    return Coupling(
        model.name,
        type(model).__name__,
        "has its own compute_loss, which is exact only if it is a mean over samples.",
    )


def _compiled_losses(model: Any) -> list[Any]:
    from keras import tree

    compiled = getattr(model, "_compile_loss", None)
    if compiled is None:
        return []
    if compiled.built:
        return [entry.loss for entry in compiled._flat_losses]
    return [loss for loss in tree.flatten(compiled._user_loss) if loss is not None]


def _losses(model: Any, seen: Samples | None) -> list[Coupling | None]:
    losses = _compiled_losses(model)
    outputs = [output.shape for output in getattr(model, "outputs", None) or []]
    pairs = [] if seen is None else seen.targets_and_predictions(model)
    # If there is one loss for each output, they correspond.
    return [
        _loss(
            loss,
            shapes=[outputs[index]] if len(losses) == len(outputs) else outputs,
            seen=[pairs[index]] if len(losses) == len(pairs) else [],
        )
        for index, loss in enumerate(losses)
    ]


def _metrics(model: Any) -> list[Coupling]:
    """Lists metrics over the batch, if it is spread over devices; otherwise they get whole effective batches."""
    from accumtune.accumulation.losses.batch_metrics import own_metrics_of_spread_windows

    reason = f"may be a single number for a batch, which differs for each device's micro-batches. {HOW_TO_KNOW}"
    return [
        Coupling(str(metric.name), type(metric).__name__, reason, is_known=False)
        for metric in own_metrics_of_spread_windows(model)
    ]


def _loss(loss: Any, shapes: list[Any], seen: list[Any]) -> Coupling | None:
    import keras

    from accumtune.accumulation.coupling.loss_trials import UNKNOWN, why_coupled
    from accumtune.accumulation.losses.loss_shares import is_sum

    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = getattr(loss, "fn", loss)
    declared = getattr(function, DECLARATION, getattr(loss, DECLARATION, None))
    if declared or _is_per_sample(loss, function):
        return None
    if declared is False:
        reason = DECLARED
    elif isinstance(loss, keras.losses.Circle):
        reason = "compares the samples of a micro-batch with each other."
    elif function in (keras.losses.dice, keras.losses.tversky) and _axis_of(loss) is None:
        reason = "is one ratio over the whole micro-batch, not a mean over samples."
    elif _has_samples(_axis_of(loss)):
        reason = _ALONG_SAMPLES
    elif isinstance(loss, keras.losses.Loss) and type(loss).__call__ is not keras.losses.Loss.__call__:
        reason = "has its own __call__, which is exact only if it is a mean over samples."
    else:
        values = loss.call if hasattr(loss, "call") else loss
        reason = why_coupled(values, is_sum(loss), code=loss, shapes=shapes, seen=seen)
    kind = getattr(function, "__name__", type(loss).__name__)
    is_known = reason != UNKNOWN
    reason = reason if is_known else f"{reason} {HOW_TO_KNOW}"
    return Coupling(str(getattr(loss, "name", kind)), kind, reason, is_known) if reason else None


def _is_per_sample(loss: Any, function: Any) -> bool:
    """Returns whether this is one of Keras's losses that give each sample its own value."""
    import keras

    axis = _axis_of(loss)
    if isinstance(loss, keras.losses.Circle) or _has_samples(axis) or may_have_samples(axis):
        return False
    if function in (keras.losses.dice, keras.losses.tversky):
        return axis is not None
    is_stock_class = type(loss).__module__.startswith(("keras.", "builtins"))
    return is_stock_class and getattr(function, "__module__", type(loss).__module__).startswith("keras.")
