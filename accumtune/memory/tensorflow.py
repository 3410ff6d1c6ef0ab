"""What TensorFlow's allocator holds, and its limit; on a CPU that of its GPUs, in one region as there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import tensorflow as tf

from accumtune.errors import BudgetError
from accumtune.memory.device import MIB, Device, check_limit
from accumtune.memory.machine import machine_memory


class TensorFlowDevice(Device):
    """A device whose memory TensorFlow's own allocator (BFC) hands out."""

    backend = "tensorflow"
    memory_source = "tensorflow allocator"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._key = name.split()[0]

    def _info(self) -> dict[str, int]:
        return dict(tf.config.experimental.get_memory_info(self._key))

    def current_memory_bytes(self) -> int:
        return int(self._info()["current"])

    def peak_memory_bytes(self) -> int:
        return int(self._info()["peak"])

    def reset_peak(self) -> None:
        tf.config.experimental.reset_memory_stats(self._key)


def open_device(budget_bytes: int | None) -> Device:
    """The first GPU, else the CPU with the GPU's allocator."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _limit_gpu(gpus[0], budget_bytes)
        details = tf.config.experimental.get_device_details(gpus[0])
        name = " ".join(["GPU:0", details.get("device_name", "")]).strip()
        return TensorFlowDevice(name, budget_bytes)
    device = TensorFlowDevice("CPU:0", budget_bytes)
    trace = tf.zeros([3])
    # The variables are read once, at the first operation. BFC hands out multiples of 256 bytes, the plain allocator
    # counts bytes as they come.
    if device.current_memory_bytes() < 256:
        raise _too_late()
    del trace
    _reserve(budget_bytes)
    device.reset_peak()
    return device


def _reserve(budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as it does on a GPU, instead of 2, 4, 8 ... MiB as needed.

    BFC hands out a free chunk whole, and counts all of it, unless it is twice the size asked for. From one large
    region chunks are split to size: the same step's peak then differed by 0.2 to 4 % from process to process, where
    scattered regions made that 0.5 to 16 % (a CNN and a transformer). Pages that nobody touches take no memory.
    """
    total = machine_memory().total_bytes
    # Without a limit the region is the next power of two, which must not be more than the machine has.
    wanted = total // 2 if budget_bytes is None else budget_bytes - 4 * MIB
    if wanted < 8 * MIB or (budget_bytes or 0) > total or _is_overcommit_refused():
        return
    with contextlib.suppress(tf.errors.ResourceExhaustedError), tf.device("CPU:0"):
        tf.raw_ops.Empty(shape=[wanted // MIB, MIB], dtype=tf.uint8, init=False)


def _is_overcommit_refused() -> bool:
    """Whether Linux counts address space as memory (proc_sys_vm(5): overcommit_memory is 2)."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _limit_gpu(gpu: Any, budget_bytes: int | None) -> None:
    try:
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
        "a process in which TensorFlow is imported at most.",
        "put memory_limit_environment(...) into the environment and call open_device before any operation.",
    )
