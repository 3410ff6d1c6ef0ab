"""Lays out TensorFlow's allocator on a CPU as on a GPU, records its requests, and simulates it at any micro-batch size.

Other packages import from here and not from its modules, except for `tensorflow_setup` and `trace_recorder`, which
import TensorFlow.
"""

from accumtune.memory.cpu_simulation.allocation_trace import Trace
from accumtune.memory.cpu_simulation.rehearsal import ORDERS, Rehearsal, largest_before_failure

__all__ = ["ORDERS", "Rehearsal", "Trace", "largest_before_failure"]
