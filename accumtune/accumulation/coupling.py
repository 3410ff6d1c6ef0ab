"""What keeps accumulation from being exact: results that depend on which samples share a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


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

    Found are: BatchNormalization and layers derived from it (while trainable), SpectralNormalization, layers that
    add losses of their own with `add_loss` (a mean over samples is exact, a sum is not), in-batch losses of Keras
    (Circle; Dice and Tversky over the whole batch), losses of the user that give one number per batch or whose
    values depend on the other samples, and overridden `compute_loss`.

    Args:
        model: a Keras model; losses are looked at when it is compiled.

    Returns:
        One `Coupling` each, `str()` of which reads well; `[]` means that accumulation is exact.
    """
    found = [_layer(layer) for layer in model._flatten_layers(include_self=True)]
    found += [_loss(loss, model) for loss in _compiled_losses(model)]
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
    code = getattr(type(layer).call, "__code__", None)
    is_stock = type(layer).__module__.startswith("keras.")
    if not is_stock and code is not None and "add_loss" in code.co_names:
        return coupling("adds a loss of its own, which is exact only where it is a mean over samples.")
    return None


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


def _loss(loss: Any, model: Any) -> Coupling | None:
    import keras

    function = getattr(loss, "fn", loss)
    name = str(getattr(loss, "name", None) or getattr(function, "__name__", loss))
    if isinstance(loss, str):
        identifier = keras.losses.get(loss)
        return _loss(identifier, model) if not isinstance(identifier, str) else None

    def coupling(reason: str) -> Coupling:
        return Coupling(name, getattr(function, "__name__", type(loss).__name__), reason)

    if isinstance(loss, keras.losses.Circle):
        return coupling("compares the samples of a micro-batch with each other.")
    if function in (keras.losses.dice, keras.losses.tversky):
        if getattr(loss, "axis", None) is None:
            return coupling("is one ratio over the whole micro-batch, not a mean over samples.")
        return None
    if getattr(function, "__module__", "").startswith("keras.") and type(loss).__module__.startswith(
        ("keras.", "builtins")
    ):
        return None
    if isinstance(loss, keras.losses.Loss) and type(loss).__call__ is not keras.losses.Loss.__call__:
        return coupling("has its own __call__, which is exact only where it is a mean over samples.")
    return _probed(loss, coupling)


def _probed(loss: Any, coupling: Any) -> Coupling | None:
    """A user's loss, asked: are the values of four samples those of two and two?"""
    import numpy as np
    from keras import ops

    values = loss.call if hasattr(loss, "call") else loss
    generator = np.random.default_rng(0)
    for shape in ((4, 3), (4, 3, 2), (4, 4, 4, 3), (4, 1)):
        y_true = generator.uniform(0.1, 0.9, shape).astype("float32")
        y_pred = generator.uniform(0.1, 0.9, shape).astype("float32")

        def run(part: slice, y_true: Any = y_true, y_pred: Any = y_pred) -> Any:
            result = values(ops.convert_to_tensor(y_true[part]), ops.convert_to_tensor(y_pred[part]))
            return np.asarray(ops.convert_to_numpy(result), "float64")

        try:
            whole, halves = run(slice(None)), [run(slice(0, 2)), run(slice(2, 4))]
        except Exception:  # a user's function may want other shapes or labels: the next shape, or the note below
            continue
        if whole.ndim == 0:
            if np.allclose(whole, np.mean(halves), rtol=1e-4, atol=1e-6):
                return None if _ignores_partition(run, whole) else coupling(_ONE_NUMBER)
            return coupling("gives one number per micro-batch that is not a mean over samples.")
        if whole.shape[0] == 4 and np.allclose(whole, np.concatenate(halves), rtol=1e-4, atol=1e-6):
            return None
        return coupling("gives each sample a value that depends on the others in its micro-batch.")
    return coupling("could not be tried out, and may depend on which samples share a micro-batch.")


_ONE_NUMBER = "gives one number per micro-batch that is not a mean over samples."


def _ignores_partition(run: Any, whole: Any) -> bool:
    import numpy as np

    parts = 0.25 * run(slice(0, 1)) + 0.75 * run(slice(1, 4))
    return bool(np.allclose(whole, parts, rtol=1e-4, atol=1e-6))
