"""The weights of a trial, loaded into a model that its build function has made anew."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accumtune.worker.transport.task_directory import TaskDirectory


def save_weights(model: Any, weights_file: str | Path) -> None:
    """As Keras does, also of a model that is never called itself, only its layers in its `train_step`."""
    with _called(model):
        model.save_weights(weights_file)


def build_config_of(model: Any) -> dict[str, Any]:
    """What `build_as_trained` needs of a trained model: its shapes, or, where only its layers were called, theirs."""
    return model.get_build_config() or {"layers": [layer.get_build_config() for layer in model.layers]}


def build_as_trained(model: Any, weights_file: Path) -> None:
    """Creates a model's variables, by the shapes of the inputs that the trained one had.

    Args:
        model: of the trial's build function.
        weights_file: of the trial; beside it lies what its model was built with.
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
    # The user's own build() leaves layers to the first call: it is called, without computing.
    with contextlib.suppress(Exception):  # whatever it raises for inputs that are no numbers
        if "input_shape" in config:
            model(tree.map_shape_structure(KerasTensor, config["input_shape"]))
        else:
            inputs = {name.removesuffix("_shape"): shape for name, shape in config["shapes_dict"].items()}
            model(**tree.map_shape_structure(KerasTensor, inputs))


def load_weights(model: Any, weights_file: str | Path) -> None:
    """As Keras does, which leaves a Dense or an Embedding that is not built as it is, and says nothing.

    Raises:
        ValueError: the weights do not fit, or a layer that has some in the file is not built.
    """
    passed_over: list[str] = []

    def note(layer: Any, store: Any) -> None:
        if len(store.keys()):
            passed_over.append(layer.name)

    with _called(model):
        unbuilt = [layer for layer in model._flatten_layers() if not layer.built]
        for layer in unbuilt:
            vars(layer)["load_own_variables"] = functools.partial(note, layer)
        try:
            model.load_weights(weights_file)
        finally:
            for layer in unbuilt:
                del vars(layer)["load_own_variables"]
    if passed_over:
        raise ValueError(
            f"The file has weights for layers that are not built: {', '.join(passed_over)}. Call the model on a batch "
            "first, or build its layers in its build()."
        )


@contextlib.contextmanager
def _called(model: Any) -> Iterator[None]:
    """While open, Keras takes a model for built that has variables, whether or not it was called itself."""
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
