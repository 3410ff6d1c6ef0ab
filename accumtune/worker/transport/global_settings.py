"""Reads the global settings of a script's process, and applies them in a trial's process.

Mixed precision, the image data format and flags of the backend change the model that a build function makes.
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
    """Returns the settings of this process, in plain types, without opening a device or running an operation."""
    settings = {setting.name: setting.read() for setting in _settings()}
    if "jax" in sys.modules:
        settings["jax"] = _jax_values()
        settings["jax_environment"] = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    return settings


def apply_global_settings(settings: Mapping[str, Any]) -> None:
    """Applies the settings of another process to this one, where they differ.

    Unknown settings are ignored: this machine may have another version of a framework.
    """
    for setting in _settings():
        if setting.name in settings and setting.read() != settings[setting.name]:
            setting.write(settings[setting.name])
    if "jax" in sys.modules:
        here, environment = _jax_values(), settings.get("jax_environment", {})
        for name, value in settings.get("jax", {}).items():
            # This machine's environment, or that of a worker's place, has precedence over the script.
            is_set_here = os.environ.get(name.upper()) != environment.get(name.upper())
            if name in here and here[name] != value and not is_set_here:
                sys.modules["jax"].config.update(name, value)


def gpus_of_tensorflow(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns environment variables for the GPUs that the script has chosen with `tf.config.set_visible_devices`.

    Empty if the script has not chosen any, or the worker's place has set them already.
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
        """Returns the policy; None for the default, which follows floatx until Keras's own getter is called."""
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
    from tensorflow.python.framework import config as private  # determinism has no public getter

    config, experimental = tf.config, tf.config.experimental

    def visible_gpus() -> list[int] | None:
        """Returns the GPUs' numbers; None if the script has not chosen. TensorFlow's getter would open the GPUs."""
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
    # Applied through the environment, before the device is opened: see `gpus_of_tensorflow`.
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
    # The number of threads belongs to a machine; the one that a worker's place has set is kept.
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
