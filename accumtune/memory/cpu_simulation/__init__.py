"""TensorFlow's allocator on a CPU: laid out as on a GPU, recorded, and played through at any micro-batch size.

What is used outside is here; nobody else imports its parts. `tensorflow_setup` and `trace_recorder` are modules that
import TensorFlow, and so are imported where it is used.
"""

from accumtune.memory.cpu_simulation.allocation_trace import Trace
from accumtune.memory.cpu_simulation.rehearsal import ORDERS, Rehearsal, largest_before_failure

__all__ = ["ORDERS", "Rehearsal", "Trace", "largest_before_failure"]
