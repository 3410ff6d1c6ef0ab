"""Saves the weights of a trial, and loads them into a model that its build function has built again."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accumtune.accumulation import optimizers
from accumtune.worker.transport.task_directory import TaskDirectory


def save_weights(model: Any, weights_file: str | Path) -> None:
    """Saves weights like Keras, also those of a model that is never called, only its layers in its `train_step`."""
    with _called(model):
        model.save_weights(weights_file)


def build_config_of(model: Any) -> dict[str, Any]:
    """Returns what `build_as_trained` needs: the model's input shapes, or its layers' if only these were called."""
    return model.get_build_config() or {"layers": [layer.get_build_config() for layer in model.layers]}


def build_as_trained(model: Any, weights_file: Path) -> None:
    """Creates a model's variables, from the input shapes of the trained model.

    Args:
        model: from the trial's build function.
        weights_file: of the trial; the file with its model's input shapes is beside it.
    """
    from keras import KerasTensor, tree

    config_file = TaskDirectory(weights_file.parent).build_config_file
    if _is_built(model) or not config_file.exists():
        return
    config = json.loads(config_file.read_text())
    if config and "layers" in config:
        for layer, layer_config in zip(model.layers, config["layers"], strict=False):
            if not layer.built and layer_config:
                layer.build_from_config(layer_config)
        return
    if not model.built:
        model.build_from_config(config)
    if _is_built(model) or not config:
        return
    # The user's build() has left layers to the first call: call the model symbolically.
    with contextlib.suppress(Exception):  # whatever it raises for symbolic inputs
        if "input_shape" in config:
            model(tree.map_shape_structure(KerasTensor, config["input_shape"]))
        else:
            inputs = {name.removesuffix("_shape"): shape for name, shape in config["shapes_dict"].items()}
            model(**tree.map_shape_structure(KerasTensor, inputs))


def load_weights(model: Any, weights_file: str | Path) -> None:
    """Loads weights like Keras, but refuses unbuilt layers, which Keras leaves as they are without an error.

    An optimizer that is not built stays as it is, as in Keras, which warns of it. What continues a trial builds it
    first; a warm start begins with a new optimizer, whose schedule is not at its end.

    Raises:
        ValueError: the weights do not fit, or a layer with weights in the file is not built.
    """
    unbuilt_with_weights: list[str] = []

    def note(layer: Any, store: Any) -> None:
        if len(store.keys()):
            unbuilt_with_weights.append(layer.name)

    with _called(model):
        layers = [layer for layer in model._flatten_layers() if not layer.built]
        optimizer = getattr(model, "optimizer", None)
        every = [] if optimizer is None else [optimizer, *optimizers.updating(optimizer)]
        unbuilt = [one for one in every if not one.built]
        for layer in layers:
            vars(layer)["load_own_variables"] = functools.partial(note, layer)
        for one in unbuilt:
            vars(one)["load_own_variables"] = lambda store: None
        try:
            model.load_weights(weights_file)
        finally:
            for changed in (*layers, *unbuilt):
                vars(changed).pop("load_own_variables", None)
    if unbuilt_with_weights:
        raise ValueError(
            f"The file has weights for layers that are not built: {', '.join(unbuilt_with_weights)}. Call the model on "
            "a batch first, or build its layers in its build()."
        )


@contextlib.contextmanager
def _called(model: Any) -> Iterator[None]:
    """Marks a model that has variables as built, until the context ends, even if it was never called."""
    if model.built or not model.variables:
        yield
        return
    model.built = True
    try:
        yield
    finally:
        model.built = False


def _is_built(model: Any) -> bool:
    return all(layer.built for layer in model._flatten_layers())
