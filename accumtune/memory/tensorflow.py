"""What TensorFlow's allocator holds, and its limit; on a CPU that of its GPUs, in one region as there.

The allocator (BFC) hands out a free chunk whole, and counts all of it, unless it is twice the size asked for. So the
peak of the same training differs from process to process, by the order in which threads ask and the layout that
comes of it. Two things make that small on a CPU: one region from the start, and a shelf of small chunks.

    peaks of digits.py's model, width 32, in four or five processes,
    highest above lowest                                              micro-batch 32   128
    one region                                                        24 %             12 to 16 %
    one region, a single-threaded executor                             8 %             11 to 18 %
    one region and a shelf of small chunks                             1 %              0.4 %

(64 MiB; width 16 with micro-batch 16 in 8 MiB: 6.6 % before, 2.9 % with both, over eight whole trainings.)
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import tensorflow as tf

from accumtune.errors import BudgetError
from accumtune.memory.device import MIB, Device, check_limit
from accumtune.memory.machine import machine_memory

# Sizes in bytes, and how many of each; as many of them, the smallest first, as come to no more than this of a budget.
SHELF = ((256, 128), (1024, 64), (4096, 32), (16384, 16), (65536, 12), (262144, 8))
SHELF_SHARE = 1 / 8
# Of a process without a limit; what does not fit there gets further regions.
LARGEST_REGION_BYTES = 2048 * MIB
FIRST_REGION_BYTES = 2 * MIB


class TensorFlowDevice(Device):
    """A device whose memory TensorFlow's own allocator (BFC) hands out."""

    backend = "tensorflow"
    memory_source = "tensorflow allocator"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._key = name.split()[0]
        self._set_aside: list[tf.Tensor] = []
        self._set_aside_bytes = 0

    def set_aside(self, tensors: list[tf.Tensor]) -> None:
        """Holds tensors that are no part of any figure."""
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


def open_device(budget_bytes: int | None) -> Device:
    """The first GPU, else the CPU with the GPU's allocator."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _limit_gpu(gpus[0], budget_bytes)
        details = tf.config.experimental.get_device_details(gpus[0])
        name = " ".join(["GPU:0", details.get("device_name", "")]).strip()
        return TensorFlowDevice(name, budget_bytes)
    device = TensorFlowDevice("CPU:0", budget_bytes)
    _reserve(budget_bytes)
    trace = tf.zeros([3])
    # The variables are read once, at the first operation. BFC hands out multiples of 256 bytes, the plain allocator
    # counts bytes as they come.
    if device.current_memory_bytes() < 256:
        raise _too_late()
    del trace
    device.set_aside(_shelf(budget_bytes))
    device.reset_peak()
    return device


def _reserve(budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as it does on a GPU, instead of 2, 4, 8 ... MiB as needed.

    Pages that nobody touches take no memory. What asks for a region needs memory itself, hence TensorFlow's first one
    is there before; to ask for more than is left would be refused, after 10 s.
    """
    total = machine_memory().total_bytes
    # The allocator's own table takes a thirty-second of a region, in real memory.
    wanted = min(total // 2, LARGEST_REGION_BYTES) if budget_bytes is None else budget_bytes - FIRST_REGION_BYTES
    if wanted > total or _is_overcommit_refused():
        return
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        _empty(wanted // MIB, MIB)  # no dimension may be 2**31


def _shelf(budget_bytes: int | None) -> list[tf.Tensor]:
    """Cuts small chunks, kept apart by tensors of 256 bytes that stay, and frees them.

    A small tensor (a loss, a shape, what a thread packs for a product) finds a chunk of its size there. Without, it
    is cut from a large free chunk: that one no longer fits what it fitted an update ago, which takes a larger one.

    Returns:
        What keeps the chunks apart.
    """
    room = math.inf if budget_bytes is None else budget_bytes * SHELF_SHARE
    kept: list[tf.Tensor] = []
    chunks = []
    for chunk_bytes, count in SHELF:
        for _ in range(count):
            room -= chunk_bytes
            if room < 0:
                return kept
            chunks.append(_empty(chunk_bytes))
            kept.append(_empty(1))
    return kept


def _empty(*shape: int) -> tf.Tensor:
    """Memory that nobody writes to."""
    with tf.device("CPU:0"):
        return tf.raw_ops.Empty(shape=shape, dtype=tf.uint8, init=False)


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
