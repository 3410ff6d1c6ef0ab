"""Pickles the Keras objects of a script for another process.

Keras pickles an object as its configuration. A class whose configuration lacks its own arguments would be restored with
their defaults, and an unregistered class not at all. So metrics and losses are sent with all their attributes; layers,
models and optimizers with the classes and functions that their configuration names.
"""

from __future__ import annotations

import copyreg
import io
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

_SCRIPT = "__main__"


def reduce_keras_object(obj: Any) -> Any:
    """Implements `pickle.Pickler.reducer_override` for Keras's objects; returns `NotImplemented` for others."""
    if "keras" not in sys.modules or isinstance(obj, type):
        return NotImplemented
    import keras
    from keras.src.saving.keras_saveable import KerasSaveable
    from keras.src.utils import tracking

    if type(obj) in (tracking.TrackedList, tracking.TrackedDict, tracking.TrackedSet):
        plain = next(kind for kind in (list, dict, set) if isinstance(obj, kind))
        return type(obj), (plain(obj),), {"tracker": obj.tracker}
    if isinstance(obj, (keras.Metric, keras.Loss)):
        # Without TensorFlow's attributes for checkpoints, which it sets again.
        state = {name: value for name, value in vars(obj).items() if not name.startswith("_self_")}
        return copyreg.__newobj__, (type(obj),), state, None, None, _fill  # type: ignore[attr-defined]
    if isinstance(obj, KerasSaveable):
        _, (file,) = obj.__reduce__()
        made = _make_again, (file, _named_objects(obj, file))
        if not isinstance(obj, keras.Model) or not obj.compiled or type(obj).compile is not keras.Model.compile:
            return made
        return *made, dict(obj._compile_config.config), None, None, _compile
    return NotImplemented


def registered_by_the_script() -> dict[str, Any]:
    """Returns what the script itself has registered with Keras; modules register theirs when they are imported."""
    import keras

    registered = keras.saving.get_custom_objects()
    return {name: value for name, value in registered.items() if getattr(value, "__module__", None) == _SCRIPT}


def register(registered: Mapping[str, Any]) -> None:
    """Registers with Keras what another process had registered."""
    from keras.src.saving import object_registration

    object_registration.GLOBAL_CUSTOM_OBJECTS.update(registered)
    object_registration.GLOBAL_CUSTOM_NAMES.update({value: name for name, value in registered.items()})


def _make_again(file: io.BytesIO, named: Mapping[str, Any]) -> Any:
    import keras
    from keras.src.saving import saving_lib

    with keras.saving.custom_object_scope(named):
        return saving_lib._load_model_from_fileobj(file, custom_objects=None, compile=False, safe_mode=False)


def _fill(obj: Any, state: Mapping[str, Any]) -> None:
    import keras

    vars(obj).update(state)
    if isinstance(obj, keras.Metric):
        obj.reset_state()  # a trial starts without what it has counted in the script; Keras resets it too late


def _compile(model: Any, arguments: Mapping[str, Any]) -> None:
    model.compile(**arguments)


def _named_objects(obj: Any, file: io.BytesIO) -> dict[str, Any]:
    """Returns the classes and functions in an object's configuration that are not Keras's, by registered name."""
    import keras

    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
    parts = [obj, *(obj._flatten_layers() if isinstance(obj, keras.Layer) else [])]
    classes = {type(part).__name__: type(part) for part in parts}
    script = vars(sys.modules[_SCRIPT])
    found = {}
    for module, name, registered_name in _names(config):
        known = keras.saving.get_registered_object(registered_name)
        found[registered_name] = next(
            (
                value
                for value in (known, classes.get(name), getattr(sys.modules.get(module), name, None), script.get(name))
                if value is not None
            ),
            None,
        )
    return {name: value for name, value in found.items() if value is not None}


def _names(config: Any) -> Iterator[tuple[str, str, str]]:
    """Yields module, name and registered name of each class and function that is not Keras's."""
    if isinstance(config, Mapping):
        if "class_name" in config and "config" in config:
            is_function = config["class_name"] == "function"
            name = config["config"] if is_function else config["class_name"]
            module = config.get("module") or ""
            if isinstance(name, str) and module.partition(".")[0] != "keras":
                registered = config.get("registered_name")
                yield module, name, name if is_function or not registered else registered
        for value in config.values():
            yield from _names(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _names(value)
