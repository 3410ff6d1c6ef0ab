"""Measures and limits what TensorFlow's allocator (BFC) holds. A CPU gets the allocator of a GPU.

`cpu_simulation.tensorflow_setup` lays out that allocator.
"""

from __future__ import annotations

import os
from typing import Any

import tensorflow as tf

from accumtune.errors import BudgetError
from accumtune.memory.cpu_simulation import tensorflow_setup
from accumtune.memory.device import (
    MIB,
    SMALLEST_TENSORFLOW_LIMIT_BYTES,
    Device,
    Recorder,
    check_limit,
    memory_limit_environment,
)


class TensorFlowDevice(Device):
    """A device whose memory is managed by TensorFlow's allocator (BFC)."""

    backend = "tensorflow"
    memory_source = "tensorflow allocator"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._key = name.split()[0]
        # XLA and cuDNN try algorithms out in the GPU's memory; on a CPU there is no such trial.
        self.compiles_in_its_memory = name.startswith("GPU")
        self._set_aside: list[tf.Tensor] = []
        self._set_aside_bytes = 0

    def set_aside(self, tensors: list[tf.Tensor]) -> None:
        """Keeps tensors alive without counting them."""
        self._set_aside = tensors
        self._set_aside_bytes = self.current_memory_bytes() if tensors else 0

    def _bytes(self, which: str) -> int:
        return int(tf.config.experimental.get_memory_info(self._key)[which]) - self._set_aside_bytes

    def current_memory_bytes(self) -> int:
        return self._bytes("current")

    def peak_memory_bytes(self) -> int:
        return self._bytes("peak")

    def reset_peak(self) -> None:
        tf.config.experimental.reset_memory_stats(self._key)

    def recorder(self) -> Recorder | None:
        if not self.name.startswith("CPU"):
            return None  # the allocator is the same, but its layout on a GPU is not simulated
        from accumtune.memory.cpu_simulation import trace_recorder

        return trace_recorder.TraceRecorder()


def open_device(budget_bytes: int | None) -> Device:
    """Opens the first GPU, or else the CPU with a GPU's allocator."""
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        # The limit is the GPU's alone: on the host, a data pipeline may need more than the GPU's budget.
        for variable in memory_limit_environment("tensorflow", SMALLEST_TENSORFLOW_LIMIT_BYTES):
            os.environ.pop(variable, None)
        _limit_gpu(gpus[0], budget_bytes)
        details = tf.config.experimental.get_device_details(gpus[0])
        name = " ".join(["GPU:0", details.get("device_name", "")]).strip()
        return TensorFlowDevice(name, budget_bytes)
    device = TensorFlowDevice("CPU:0", budget_bytes)
    try:
        tensorflow_setup.run_one_operation_at_a_time()
    except RuntimeError:  # "cannot be modified after initialization"
        raise _too_late() from None
    tensorflow_setup.reserve_region(budget_bytes)
    trace = tf.zeros([3])
    # TensorFlow reads the environment once, at its first operation. BFC hands out multiples of 256 bytes; less than
    # that means another allocator.
    if device.current_memory_bytes() < 256:
        raise _too_late()
    del trace
    device.set_aside(tensorflow_setup.cut_shelf(budget_bytes))
    device.reset_peak()
    return device


def _limit_gpu(gpu: Any, budget_bytes: int | None) -> None:
    try:
        tf.config.set_visible_devices([gpu], "GPU")  # memory growth must be the same on all visible ones
        if budget_bytes is None:
            tf.config.experimental.set_memory_growth(gpu, True)
        else:
            check_limit(budget_bytes)
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=budget_bytes // MIB)
            tf.config.set_logical_device_configuration(gpu, [limit])
    except RuntimeError:  # "Virtual devices cannot be modified after being initialized"
        raise _too_late() from None


def _too_late() -> BudgetError:
    return BudgetError(
        "TensorFlow has run an operation in this process before its memory was set up.",
        "a process in which TensorFlow has run nothing yet.",
        "put memory_limit_environment(...) into the environment and call open_device before any operation.",
    )
