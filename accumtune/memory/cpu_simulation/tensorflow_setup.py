"""Lays TensorFlow's allocator out on a CPU as on a GPU, and makes what is asked of it come in one order.

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
from pathlib import Path

import tensorflow as tf
from tensorflow.python.ops import control_flow_util_v2

from accumtune.accumulation.engines import engine_tensorflow
from accumtune.memory.cpu_simulation import operation_order
from accumtune.memory.cpu_simulation.allocator import MIB
from accumtune.memory.cpu_simulation.allocator_layout import (
    CONSTANTS,
    SHELF,
    constant_chunks,
    region_bytes,
    shelf_chunks,
)
from accumtune.memory.machine import machine_memory


def run_one_operation_at_a_time() -> None:
    """Makes TensorFlow run one operation after the other, as a GPU's stream does: no two hold memory at once by chance.

    An operation itself still computes on all cores. A loop is left a function that runs step after step; taken apart,
    as is TensorFlow's default, 32 of its steps may be under way at once. Graphs are run in the order of their tracing.

    Raises:
        RuntimeError: TensorFlow has run an operation before.
    """
    tf.config.threading.set_inter_op_parallelism_threads(1)
    control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE = True
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    engine_tensorflow.ordering = operation_order


def reserve_region(budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as it does on a GPU, instead of 2, 4, 8 ... MiB as needed."""
    total = machine_memory().total_bytes
    wanted = region_bytes(budget_bytes, total)
    if wanted > total or _is_overcommit_refused():
        return
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        _empty(wanted // MIB, MIB)  # no dimension may be 2**31


def cut_shelf(budget_bytes: int | None) -> list[tf.Tensor]:
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
