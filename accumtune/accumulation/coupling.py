"""What keeps accumulation from being exact: results that depend on which samples share a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accumtune.accumulation.layer_probing import STATE, has_code_of_the_user
from accumtune.accumulation.layer_probing import why_coupled as why_layer_coupled

if TYPE_CHECKING:
    import keras


_ALONG_SAMPLES = "works along the axis of the samples."


@dataclass(frozen=True)
class Coupling:
    """A layer or loss whose result depends on which samples share a micro-batch.

    Args:
        name: the layer's or the loss's name.
        kind: its class or function.
        reason: what it does with the batch.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}): {self.reason}"


def batch_coupled_layers(model: keras.Model) -> list[Coupling]:
    """What keeps accumulated training of `model` from equalling training at the effective batch.

    Found are: BatchNormalization and layers derived from it (while trainable), SpectralNormalization, recurrent
    layers with `stateful=True`, normalizations and losses along the axis of the samples, layers that add losses of
    their own with `add_loss` (a mean over samples is exact, a sum is not), in-batch losses of Keras (Circle; Dice
    and Tversky over the whole batch) and overridden `compute_loss`. Losses, layers, Lambdas and models of the user's
    own are tried out on random numbers (layers once they are built): does a sample's result depend on the other
    samples, does a forward pass change variables?

    Args:
        model: a Keras model; losses are looked at when it is compiled.

    Returns:
        One `Coupling` each, `str()` of which reads well; `[]` means that accumulation is exact.
    """
    layers = list(model._flatten_layers(include_self=True))
    found = [_layer(layer) for layer in layers]
    # A block is not coupled by itself where a layer in it is: that one is in the list.
    coupled = {id(layer) for layer, item in zip(layers, found, strict=True) if item}
    inner_first = sorted(layers, key=lambda layer: len(list(layer._flatten_layers())))
    for layer in inner_first:
        if not coupled & {id(part) for part in layer._flatten_layers(include_self=True)}:
            item = _tried(layer)
            found.append(item)
            coupled |= {id(layer)} if item else set()
    found += [_loss(loss) for loss in _compiled_losses(model)]
    found.append(_compute_loss(model))
    return list(dict.fromkeys(item for item in found if item is not None))


def _layer(layer: Any) -> Coupling | None:
    import keras

    def coupling(reason: str) -> Coupling:
        return Coupling(layer.name, type(layer).__name__, reason)

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
    names = getattr(getattr(type(layer).call, "__code__", None), "co_names", ())
    if type(layer).__module__.startswith("keras."):
        return None
    if "add_loss" in names:
        return coupling("adds a loss of its own, which is exact only where it is a mean over samples.")
    if {"assign", "assign_add", "assign_sub"} & set(names):
        return coupling(STATE)
    return None


def _tried(layer: Any) -> Coupling | None:
    """A layer or model with code of the user's, tried out."""
    if not has_code_of_the_user(layer):
        return None
    reason = why_layer_coupled(layer)
    return Coupling(layer.name, type(layer).__name__, reason) if reason else None


def _axis_of(loss: Any) -> Any:
    return getattr(loss, "axis", getattr(loss, "_fn_kwargs", {}).get("axis"))


def _has_samples(axis: Any) -> bool:
    """Whether `axis`, an int or several, has the first one in it."""
    return 0 in (axis if isinstance(axis, (list, tuple)) else (axis,))


def _compute_loss(model: Any) -> Coupling | None:
    import keras

    if type(model).compute_loss is keras.Model.compute_loss:
        return None
    return Coupling(
        model.name,
        type(model).__name__,
        "has its own compute_loss, which is exact only where it is a mean over samples.",
    )


def _compiled_losses(model: Any) -> list[Any]:
    from keras import tree

    compiled = getattr(model, "_compile_loss", None)
    if compiled is None:
        return []
    if compiled.built:
        return [entry.loss for entry in compiled._flat_losses]
    return [loss for loss in tree.flatten(compiled._user_loss) if loss is not None]


def _loss(loss: Any) -> Coupling | None:
    import keras

    from accumtune.accumulation.probing import why_coupled

    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = getattr(loss, "fn", loss)
    if _is_per_sample(loss, function):
        return None
    if isinstance(loss, keras.losses.Circle):
        reason = "compares the samples of a micro-batch with each other."
    elif function in (keras.losses.dice, keras.losses.tversky):
        reason = "is one ratio over the whole micro-batch, not a mean over samples."
    elif _has_samples(_axis_of(loss)):
        reason = _ALONG_SAMPLES
    elif isinstance(loss, keras.losses.Loss) and type(loss).__call__ is not keras.losses.Loss.__call__:
        reason = "has its own __call__, which is exact only where it is a mean over samples."
    else:
        is_sum = getattr(loss, "reduction", None) == "sum"
        reason = why_coupled(loss.call if hasattr(loss, "call") else loss, is_sum)
    kind = getattr(function, "__name__", type(loss).__name__)
    return Coupling(str(getattr(loss, "name", kind)), kind, reason) if reason else None


def _is_per_sample(loss: Any, function: Any) -> bool:
    """Whether this is one of Keras's losses that give each sample a value of its own."""
    import keras

    if isinstance(loss, keras.losses.Circle) or _has_samples(_axis_of(loss)):
        return False
    if function in (keras.losses.dice, keras.losses.tversky):
        return _axis_of(loss) is not None
    is_stock_class = type(loss).__module__.startswith(("keras.", "builtins"))
    return is_stock_class and getattr(function, "__module__", type(loss).__module__).startswith("keras.")
