"""Lays out TensorFlow's allocator on a CPU as on a GPU, and makes its requests come in one order.

The allocator (BFC) does not split a free chunk of less than twice the requested size, and counts all of it. So the peak
of the same training would differ from process to process, with the order of its requests. Hence one region from the
start, a shelf of small chunks, one operation at a time, and one order of operations (`operation_order`). Graphs are not
rewritten (Grappler), because rewritten graphs have another order in each process. `experiments/DECISIONS.md` has the
effect and the cost of each of these.
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
    """Makes TensorFlow run one operation after the other, as a GPU's stream does.

    An operation itself still computes on all cores. A loop stays a function that runs step after step; TensorFlow's
    default lowers it, and then runs up to 32 of its steps at once. Graphs run in the order of their tracing.

    Raises:
        RuntimeError: TensorFlow has run an operation before.
    """
    tf.config.threading.set_inter_op_parallelism_threads(1)
    control_flow_util_v2._DISABLE_LOWER_USING_SWITCH_MERGE = True
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    engine_tensorflow.ordering = operation_order


def reserve_region(budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as on a GPU, instead of 2, 4, 8 ... MiB as needed."""
    total = machine_memory().total_bytes
    wanted = region_bytes(budget_bytes, total)
    if wanted > total or _is_overcommit_refused():
        return
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        _empty(wanted // MIB, MIB)  # no dimension may be 2**31


def cut_shelf(budget_bytes: int | None) -> list[tf.Tensor]:
    """Allocates small chunks, separated by tensors of 256 bytes that stay, and frees them.

    A small tensor (a loss, a shape, a thread's buffer for a product) then finds a chunk of its size. Otherwise it would
    be cut from a large free chunk, which then no longer fits the activation that it held an update ago.

    Returns:
        The tensors between the chunks, to be kept.
    """
    with tf.device("CPU:0"):  # made once: they take longer than the chunks
        shapes = {chunk_bytes: tf.constant([chunk_bytes]) for chunk_bytes in (1, *dict(SHELF))}
    # Many by one operation: one operation for each would take a second.
    whole = _empty(1, 2 * CONSTANTS)
    cut = [tf.unstack(whole, axis=1) for _ in range(constant_chunks(budget_bytes) // CONSTANTS)]
    kept: list[tf.Tensor] = [tensor for tensors in cut for tensor in tensors[1::2]]
    chunks = [whole, cut]  # freed together, at the end: otherwise the next separators would lie in them
    with tf.device("CPU:0"):
        for chunk_bytes in shelf_chunks(budget_bytes):
            chunks.append(tf.raw_ops.Empty(shape=shapes[chunk_bytes], dtype=tf.uint8, init=False))
            kept.append(tf.raw_ops.Empty(shape=shapes[1], dtype=tf.uint8, init=False))
    return kept


def _empty(*shape: int) -> tf.Tensor:
    """Allocates memory without writing to it."""
    with tf.device("CPU:0"):
        return tf.raw_ops.Empty(shape=shape, dtype=tf.uint8, init=False)


def _is_overcommit_refused() -> bool:
    """Returns whether Linux counts address space as memory (proc_sys_vm(5): overcommit_memory is 2)."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False
