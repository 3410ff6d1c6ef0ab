"""What TensorFlow's allocator holds, and its limit; on a CPU that of its GPUs, laid out and asked as there.

The allocator (BFC) hands out a free chunk whole, and counts all of it, unless it is twice the size asked for. So the
peak of the same training differs from process to process, by the order in which memory is asked for and the layout that
comes of it. What makes it the same on a CPU, and smaller (MiB, two or three processes each; micro-batch × accumulation
steps):

                                                 CNN 48 × 1    CNN 48 × 2   LSTM 24 × 1     LSTM 24 × 2
    one region from the start, and a shelf       77.1 to 77.7  76.1, 83.2   101.0, 101.2    79.0, 86.1
    one thread for operations                    53.0 to 53.6  55.6, 56.1   71.3, 100.9     112.6, 112.8
    TensorFlow's single-threaded executor        52.1          55.6 to 59   53.6            59.3, 59.6
    one thread, loops not taken apart            53.02         55.57        52.43           60.4 to 60.7
    ... operations in one order                  43.12         43.18        51.99           58.4

The order (`cpu_simulation.operation_order`) is what a model with branches needs: a U-Net's 24 × 1 took 82 to 91 or 120
MiB, and takes 87.51 in every process. Small operations and validation count too: MobileNetV2's 20 × 2 took 152.2 to
154.2 MiB with only the large ones of training in order, and takes 152.52. Without it no setting helped, nor the single-
threaded executor (of a CNN, 82 × 1 took 67.7 or 73.6), PYTHONHASHSEED or addresses that are not randomized. The graph
is not rewritten (Grappler): what comes of that had another order in each process. That costs no speed: five models ran
0.98 to 1.09 times as fast as with it (pairs of processes that took turns, medians of 6); six ran 0.98 to 1.03 times as
fast in order as without (CPU seconds, medians of 7).

A thousand small tensors between a network's activations cost more than all of that: of EfficientNetB0, 29 × 1, × 2 and
× 4 took 263, 322 and 335 MiB while the shelf had 132 chunks, and take 261.7, 278.8 and 278.8 with 1,704 (MobileNetV2's
38 × 2 250.0 and 226.6).

What it costs on two cores, speed to TensorFlow's default in pairs of processes that took turns (medians of 4), measured
with the two designs beside it: one thread MLP 0.96, CNN 0.83, transformer 0.74, LSTM 0.77; the single-threaded executor
1.00, 0.87, 0.80, 0.77, and MobileNetV2 1.04.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util_v2

from accumtune.accumulation.engines import engine_tensorflow
from accumtune.errors import BudgetError
from accumtune.memory.cpu_simulation import operation_order
from accumtune.memory.cpu_simulation.allocator_layout import (
    CONSTANTS,
    SHELF,
    constant_chunks,
    region_bytes,
    shelf_chunks,
)
from accumtune.memory.device import (
    MIB,
    SMALLEST_TENSORFLOW_LIMIT_BYTES,
    Device,
    Recorder,
    check_limit,
    memory_limit_environment,
)
from accumtune.memory.machine import machine_memory


class TensorFlowDevice(Device):
    """A device whose memory TensorFlow's own allocator (BFC) hands out."""

    backend = "tensorflow"
    memory_source = "tensorflow allocator"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._key = name.split()[0]
        # XLA and cuDNN try algorithms out in memory of the GPU; on a CPU nothing is tried.
        self.compiles_in_its_memory = name.startswith("GPU")
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

    def recorder(self) -> Recorder | None:
        if not self.name.startswith("CPU"):
            return None  # the allocator is the same, but how its memory lies has not been looked at
        from accumtune.memory.cpu_simulation.trace_recorder import TraceRecorder

        return TraceRecorder()


def open_device(budget_bytes: int | None) -> Device:
    """The first GPU, else the CPU with the GPU's allocator."""
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        # The host is not what is measured: in the GPU's budget a data pipeline has no room.
        for variable in memory_limit_environment("tensorflow", SMALLEST_TENSORFLOW_LIMIT_BYTES):
            os.environ.pop(variable, None)
        _limit_gpu(gpus[0], budget_bytes)
        details = tf.config.experimental.get_device_details(gpus[0])
        name = " ".join(["GPU:0", details.get("device_name", "")]).strip()
        return TensorFlowDevice(name, budget_bytes)
    device = TensorFlowDevice("CPU:0", budget_bytes)
    _one_operation_at_a_time()
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


def _one_operation_at_a_time() -> None:
    """As on a GPU, whose stream runs one operation after the other: the memory of two is never held at once by chance.

    An operation itself still computes on all cores. A loop is left a function that runs step after step; taken apart,
    as is TensorFlow's default, 32 of its steps may be under way at once. Graphs are run in the order of their tracing.
    """
    try:
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # "cannot be modified after initialization"
        raise _too_late() from None
    control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE = True
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    engine_tensorflow.ordering = operation_order


def _reserve(budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as it does on a GPU, instead of 2, 4, 8 ... MiB as needed."""
    total = machine_memory().total_bytes
    wanted = region_bytes(budget_bytes, total)
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
    with tf.device("CPU:0"):  # made once: they take longer than what is to be cut
        shapes = {chunk_bytes: tf.constant([chunk_bytes]) for chunk_bytes in (1, *dict(SHELF))}
    # Many with one operation: one for each would take a second.
    whole = _empty(1, 2 * CONSTANTS)
    cut = [tf.unstack(whole, axis=1) for _ in range(constant_chunks(budget_bytes) // CONSTANTS)]
    kept: list[tf.Tensor] = [tensor for tensors in cut for tensor in tensors[1::2]]
    chunks = [whole, cut]  # given back together, at the end: else what keeps the next apart would lie in them
    with tf.device("CPU:0"):
        for chunk_bytes in shelf_chunks(budget_bytes):
            chunks.append(tf.raw_ops.Empty(shape=shapes[chunk_bytes], dtype=tf.uint8, init=False))
            kept.append(tf.raw_ops.Empty(shape=shapes[1], dtype=tf.uint8, init=False))
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
        tf.config.set_visible_devices([gpu], "GPU")  # growth must be the same on all that are visible
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
