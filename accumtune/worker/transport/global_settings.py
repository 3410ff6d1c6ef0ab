"""Reads the settings that a script makes at its top, and makes them again in a trial's process.

Mixed precision, the image data format, flags of the backend: a model that is built without them is another model.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_NO_GPU = "-1"


@dataclass(frozen=True)
class _Setting:
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def global_settings() -> dict[str, Any]:
    """The settings of this process, in plain types. No device is opened and no operation runs."""
    settings = {setting.name: setting.read() for setting in _settings()}
    if "jax" in sys.modules:
        settings["jax"] = _jax_values()
        settings["jax_environment"] = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    return settings


def apply_global_settings(settings: Mapping[str, Any]) -> None:
    """Makes the settings of another process those of this one; those that are the same already are left alone.

    What this process does not know is passed over: it may run on a machine with another version.
    """
    for setting in _settings():
        if setting.name in settings and setting.read() != settings[setting.name]:
            setting.write(settings[setting.name])
    if "jax" in sys.modules:
        here, environment = _jax_values(), settings.get("jax_environment", {})
        for name, value in settings.get("jax", {}).items():
            # What this machine's environment says, or that of a worker's place, is not the script's to decide.
            is_said_here = os.environ.get(name.upper()) != environment.get(name.upper())
            if name in here and here[name] != value and not is_said_here:
                sys.modules["jax"].config.update(name, value)


def gpus_of_tensorflow(settings: Mapping[str, Any]) -> dict[str, str]:
    """The environment in which TensorFlow sees the GPUs that `tf.config.set_visible_devices` has left to a script.

    Empty where the script has not chosen, or where the worker's place has chosen for it.
    """
    chosen = settings.get("tensorflow.visible_gpus")
    before, here = settings.get("cuda_visible_devices"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or before != here:
        return {}
    known = None if here is None else [item.strip() for item in here.split(",")]
    names = [str(number) if known is None else known[number] for number in chosen]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names) or _NO_GPU}


def _settings() -> Iterator[_Setting]:
    yield from _of_keras()
    if "tensorflow" in sys.modules:
        yield from _of_tensorflow(sys.modules["tensorflow"])
    if "torch" in sys.modules:
        yield from _of_torch(sys.modules["torch"])


def _of_keras() -> Iterator[_Setting]:
    import keras
    from keras.src.backend.common import global_state
    from keras.src.saving import serialization_lib

    config, policies = keras.config, keras.dtype_policies

    def chosen_policy() -> Any:
        """None where it is what Keras makes of floatx; asking Keras for it would fix it to today's floatx."""
        policy = global_state.get_global_attribute("dtype_policy")
        return None if policy is None or policy.name == config.floatx() else policies.serialize(policy)

    def choose_policy(value: Any) -> None:
        if value is None:
            global_state.set_global_attribute("dtype_policy", None)
        else:
            config.set_dtype_policy(policies.deserialize(value))

    def switch(name: str, is_on: Any) -> None:
        getattr(config, f"{'disable' if is_on is False else 'enable'}_{name}")()

    for name in ("floatx", "epsilon", "image_data_format", "max_epochs", "max_steps_per_epoch"):
        yield _Setting(name, getattr(config, name), getattr(config, f"set_{name}"))
    yield _Setting("dtype_policy", chosen_policy, choose_policy)
    for name in ("flash_attention", "traceback_filtering", "interactive_logging"):
        yield _Setting(name, getattr(config, f"is_{name}_enabled"), functools.partial(switch, name))
    yield _Setting(
        "is_deserialization_safe",
        lambda: serialization_lib.in_safe_mode() is not False,
        lambda is_safe: None if is_safe else config.enable_unsafe_deserialization(),
    )


def _of_tensorflow(tf: Any) -> Iterator[_Setting]:
    from tensorflow.python.eager import context
    from tensorflow.python.framework import config as private  # determinism is not read by any public name

    config, experimental = tf.config, tf.config.experimental

    def visible_gpus() -> list[int] | None:
        """Their numbers; None where the script has not chosen. Asking TensorFlow itself would open the GPUs."""
        chosen = context.context()._visible_device_list
        listed = context.context()._physical_devices
        if listed is None or chosen is None:
            return None
        gpus = [device for device in listed if device.device_type == "GPU"]
        seen = [int(device.name.rpartition(":")[2]) for device in gpus if device in chosen]
        return None if len(seen) == len(gpus) else seen

    yield _Setting("tensorflow.functions_eager", config.functions_run_eagerly, config.run_functions_eagerly)
    yield _Setting(
        "tensorflow.jit", lambda: config.optimizer.get_jit() or False, lambda value: config.optimizer.set_jit(value)
    )
    yield _Setting(
        "tensorflow.optimizer", lambda: dict(config.optimizer.get_experimental_options()),
        config.optimizer.set_experimental_options,
    )  # fmt: skip
    yield _Setting(
        "tensorflow.tensor_float_32", experimental.tensor_float_32_execution_enabled,
        experimental.enable_tensor_float_32_execution,
    )  # fmt: skip
    yield _Setting(
        "tensorflow.deterministic",
        lambda: bool(private.is_op_determinism_enabled()),
        lambda is_on: experimental.enable_op_determinism() if is_on else None,
    )
    yield _Setting("tensorflow.soft_placement", config.get_soft_device_placement, config.set_soft_device_placement)
    # Before the device is opened, through the environment: see `gpus_of_tensorflow`.
    yield _Setting("tensorflow.visible_gpus", visible_gpus, lambda value: None)
    yield _Setting("cuda_visible_devices", lambda: os.environ.get("CUDA_VISIBLE_DEVICES"), lambda value: None)


def _of_torch(torch: Any) -> Iterator[_Setting]:
    yield _Setting(
        "torch.dtype",
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda name: torch.set_default_dtype(getattr(torch, name)),
    )
    yield _Setting("torch.matmul_precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield _Setting(
        "torch.deterministic", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    )
    cudnn = torch.backends.cudnn
    for name in ("enabled", "benchmark", "deterministic"):
        yield _Setting(
            f"torch.cudnn.{name}",
            lambda name=name: getattr(cudnn, name),  # type: ignore[misc]
            lambda value, name=name: setattr(cudnn, name, value),  # type: ignore[misc]
        )
    # A number of threads is a machine's, and one that a worker's place has set is not the script's.
    machine = (platform.node(), os.environ.get("OMP_NUM_THREADS"))
    yield _Setting(
        "torch.threads",
        lambda: [*machine, torch.get_num_threads()],
        lambda value: torch.set_num_threads(value[2]) if tuple(value[:2]) == machine else None,
    )


def _jax_values() -> dict[str, Any]:
    values = sys.modules["jax"].config.values
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in values.items() if isinstance(value, plain)}
