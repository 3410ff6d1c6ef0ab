"""Opens a device, measures the memory that a framework holds on it, and limits that memory.

The classes of each backend are in `device_tensorflow.py`, `device_jax.py` and `device_torch.py`; a framework is
imported when its device is opened. `memory_limit_environment` goes into the environment of a child process before its
framework runs anything; the child then calls `open_device`. Each measurement names its source
(`Device.memory_source`), because the sources count different things:

    tensorflow allocator         every tensor that TensorFlow holds on that device, exact; on a GPU without the CUDA
                                 context (300 to 600 MB)
    cuda allocator               the same for torch
    jax compile-time analysis    the arrays that are held, and what XLA plans to add in each function of training
    process high-water mark      the process's resident memory beyond what it had when the device was opened
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Protocol

from accumtune.errors import BudgetError
from accumtune.memory.budget import format_bytes
from accumtune.memory.cpu_simulation import Trace
from accumtune.memory.machine import gpu_total_bytes
from accumtune.memory.out_of_memory import died_of_memory, is_out_of_memory

__all__ = ["Device", "died_of_memory", "is_out_of_memory", "memory_limit_environment", "open_device"]

MIB = 2**20
# TensorFlow's allocator needs a first region of 2 MiB, and room for a second.
SMALLEST_TENSORFLOW_LIMIT_BYTES = 4 * MIB


def memory_limit_environment(backend: str, budget_bytes: int | None) -> dict[str, str]:
    """Returns the environment variables that a child process needs to measure its memory and to limit it.

    Args:
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        budget_bytes: what the process may hold on the device; `None` measures without a limit.

    Returns:
        Environment variables. TensorFlow reads them at its first operation, JAX at its first use of a device.

    Raises:
        BudgetError: the budget is less than TensorFlow's allocator needs, 4 MiB.
    """
    if backend == "tensorflow":
        environment = {"TF_CPU_ALLOCATOR_USE_BFC": "true"}
        if budget_bytes is not None:
            check_limit(budget_bytes)
            environment["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(budget_bytes // MIB)
        return environment
    if backend == "jax":
        # The only one of JAX's allocators that both counts and has a limit; it overrides the user's environment.
        environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "bfc", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        total = None if budget_bytes is None else gpu_total_bytes()
        if budget_bytes is None or total is None:
            return environment
        fraction = f"{min(budget_bytes / total, 1.0):.6f}"
        # JAX refuses the second name beside the first, unless it is empty.
        limit = {"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction, "XLA_CLIENT_MEM_FRACTION": ""}
        return environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"} | limit
    return {}


def check_limit(budget_bytes: int) -> None:
    """Raises BudgetError for a limit below what TensorFlow's allocator needs."""
    if budget_bytes < SMALLEST_TENSORFLOW_LIMIT_BYTES:
        raise BudgetError(
            f"Received a memory budget of {format_bytes(budget_bytes)}.",
            f"at least {format_bytes(SMALLEST_TENSORFLOW_LIMIT_BYTES)}, which TensorFlow's allocator needs",
            "raise memory_budget.",
        )


class Device(ABC):
    """The memory of one device.

    Attributes:
        name: `"CPU:0"`, or `"GPU:0 NVIDIA H100 80GB HBM3"`.
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        memory_source: what measures the bytes.
        budget_bytes: what the process may hold; `None` for no limit.
        has_limits: whether the framework can enforce a budget. If not (JAX and torch on a CPU),
            `accumtune.memory.memory_watch` compares the peak with the budget.
        compiles_in_its_memory: whether its peak includes what a framework needs only to compile or to choose
            algorithms (see `accumtune.memory.compilation`).
    """

    backend: str
    memory_source: str
    has_limits = True
    compiles_in_its_memory = False

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        self.name = name
        self.budget_bytes = budget_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, memory_source={self.memory_source!r})"

    @abstractmethod
    def current_memory_bytes(self) -> int:
        """Bytes held now."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """The most bytes held at once since the last `reset_peak`, or since the device was opened."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Starts the next peak from what is held now."""

    def recorder(self) -> Recorder | None:
        """Starts to record the requests to the allocator, before anything else runs; None if that is impossible."""
        return None


class Recorder(Protocol):
    """Records a process's requests to its device's allocator."""

    def phase(self, accumulation_steps: int) -> None:
        """Marks that the following requests belong to updates of so many micro-steps; 0: to no update."""

    def finished(self, micro_batch_size: int) -> Trace | None:
        """Ends the recording and returns it; None if it was lost."""


def open_device(backend: str | None = None, budget_bytes: int | None = None) -> Device:
    """Opens the device that this process trains on, and limits its memory to the budget if the framework can.

    Call it in the child process, with `memory_limit_environment` in its environment, before the framework runs
    anything.

    Args:
        backend: default: `keras.backend.backend()`.
        budget_bytes: the limit; `None` for none.

    Raises:
        BudgetError: the framework has run an operation already, so its memory can be neither measured nor limited.
    """
    if backend is None:
        import keras

        backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax", "torch"):
        raise BudgetError(
            f"Received backend={backend!r}.",
            '"tensorflow", "jax" or "torch"',
            "choose another Keras backend.",
        )
    device: Device = importlib.import_module(f"accumtune.memory.device_{backend}").open_device(budget_bytes)
    return device
