"""What a device holds, what it may hold, and how it says that it cannot hold more: one small class per backend.

Nothing here imports a framework until a device is opened. `memory_limit_environment` goes into the environment of
a child process before its framework runs anything, `open_device` does the rest from inside. Where the figure
comes from is part of the figure (`Device.memory_source`), because the sources do not count the same things:

    tensorflow allocator         every tensor TensorFlow holds on that device, exact; on a GPU without the CUDA
                                 context (300 to 600 MB)
    jax allocator, cuda allocator    the same for the two others' GPUs
    jax compile-time analysis    live arrays, and what XLA's plan of each compiled program adds to them
    process high-water mark      the process's resident memory above what it had when the device was opened
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from accumtune.errors import BudgetError
from accumtune.memory.budget import format_bytes
from accumtune.memory.exhaustion import died_of_memory, is_out_of_memory
from accumtune.memory.machine import device_memory, gpu_total_bytes

__all__ = ["Device", "died_of_memory", "is_out_of_memory", "memory_limit_environment", "open_device"]

MIB = 2**20
# Below this TensorFlow's allocator cannot even take its first region (2 MiB) and leave room for a second.
SMALLEST_TENSORFLOW_LIMIT_BYTES = 4 * MIB


def memory_limit_environment(backend: str, budget_bytes: int | None) -> dict[str, str]:
    """What a child process sets before its framework first runs: measurement on, and the limit where that is one.

    Args:
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        budget_bytes: what the process may hold on the device; `None` measures without a limit.

    Returns:
        Environment variables. TensorFlow's are read at its first operation, JAX's at its first use of a device.

    Raises:
        BudgetError: TensorFlow's allocator counts in whole MiB and needs a few of them.
    """
    if backend == "tensorflow":
        environment = {"TF_CPU_ALLOCATOR_USE_BFC": "true"}
        if budget_bytes is not None:
            _check_tensorflow_budget(budget_bytes)
            environment["TF_CPU_BFC_MEM_LIMIT_IN_MB"] = str(budget_bytes // MIB)
        return environment
    if backend == "jax":
        if budget_bytes is None:
            return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # A fraction of the whole device, or of what is not there when there is no GPU (then it is ignored).
        total = gpu_total_bytes()
        if total is None:
            return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{min(budget_bytes / total, 1.0):.6f}",
        }
    return {}


def _check_tensorflow_budget(budget_bytes: int) -> None:
    if budget_bytes < SMALLEST_TENSORFLOW_LIMIT_BYTES:
        raise BudgetError(
            f"Received a memory budget of {format_bytes(budget_bytes)}.",
            f"at least {format_bytes(SMALLEST_TENSORFLOW_LIMIT_BYTES)}, the least TensorFlow's allocator works with",
            "raise memory_budget.",
        )


class Device(ABC):
    """One device, as far as its memory goes.

    Attributes:
        name: `"CPU:0"`, or `"GPU:0 NVIDIA H100 80GB HBM3"`.
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        memory_source: who counts the bytes.
        budget_bytes: what the process may hold; `None` for no limit.
        has_limits: whether the framework can enforce a budget. Where it cannot (JAX and torch on a CPU), compare
            `peak_memory_bytes` with the budget, and see `accumtune.memory.watching`.
    """

    backend: str
    memory_source: str
    has_limits = True

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        self.name = name
        self.budget_bytes = budget_bytes

    @property
    def limit_bytes(self) -> int | None:
        """The limit that the framework enforces; `None` where there is none."""
        return self.budget_bytes if self.has_limits else None

    @property
    def is_limit_enforced(self) -> bool:
        """Whether going over the budget fails inside the framework."""
        return self.limit_bytes is not None

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


def open_device(backend: str | None = None, budget_bytes: int | None = None) -> Device:
    """Opens the device that this process trains on, and limits it to the budget where the framework can.

    Call it in the child, after `memory_limit_environment` went into the environment and before anything else runs
    on the framework.

    Args:
        backend: as in `keras.backend.backend()`, which is the default.
        budget_bytes: the limit; `None` for none.

    Raises:
        BudgetError: the framework ran an operation before, so that it can be neither measured nor limited.
    """
    if backend is None:
        import keras

        backend = keras.backend.backend()
    if backend == "tensorflow":
        return _open_tensorflow(budget_bytes)
    if backend == "jax":
        return _open_jax(budget_bytes)
    if backend == "torch":
        return _open_torch(budget_bytes)
    raise BudgetError(
        f"Received backend={backend!r}.",
        '"tensorflow", "jax" or "torch"',
        "choose another Keras backend.",
    )


class TensorFlowDevice(Device):
    """A device whose memory TensorFlow's own allocator (BFC) hands out."""

    backend = "tensorflow"
    memory_source = "tensorflow allocator"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._key = name.split()[0]

    def _info(self) -> dict[str, int]:
        import tensorflow as tf

        return tf.config.experimental.get_memory_info(self._key)

    def current_memory_bytes(self) -> int:
        return int(self._info()["current"])

    def peak_memory_bytes(self) -> int:
        return int(self._info()["peak"])

    def reset_peak(self) -> None:
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats(self._key)


def _open_tensorflow(budget_bytes: int | None) -> Device:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _limit_tensorflow_gpu(tf, gpus[0], budget_bytes)
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
    _reserve(tf, budget_bytes)
    device.reset_peak()
    return device


def _reserve(tf: Any, budget_bytes: int | None) -> None:
    """Makes the allocator take its memory as one region, as it does on a GPU, instead of 2, 4, 8 ... MiB as needed.

    BFC hands out a free chunk whole, and counts all of it, unless it is twice the size asked for. From one large
    region chunks are split to size: a step's peak is then within 2 % of the bytes asked for and of itself in other
    processes, where scattered regions made that 4 to 10 %. Pages that nobody touches take no memory.
    """
    total = device_memory().total_bytes
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


def _limit_tensorflow_gpu(tf: Any, gpu: Any, budget_bytes: int | None) -> None:
    try:
        if budget_bytes is None:
            tf.config.experimental.set_memory_growth(gpu, True)
        else:
            _check_tensorflow_budget(budget_bytes)
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=budget_bytes // MIB)
            tf.config.set_logical_device_configuration(gpu, [limit])
    except RuntimeError:  # "Virtual devices cannot be modified after being initialized"
        raise _too_late() from None


class JaxGpu(Device):
    """A GPU under JAX. Its peak cannot be reset, so one process makes one measurement."""

    backend = "jax"
    memory_source = "jax allocator"

    def _stats(self) -> dict[str, int]:
        import jax

        return jax.local_devices()[0].memory_stats() or {}

    def current_memory_bytes(self) -> int:
        return int(self._stats()["bytes_in_use"])

    def peak_memory_bytes(self) -> int:
        return int(self._stats()["peak_bytes_in_use"])

    def reset_peak(self) -> None:
        """Does nothing: XLA's allocator cannot."""


class JaxCpu(Device):
    """A CPU under JAX: what XLA planned for each compiled program, on top of the arrays that are alive.

    A program's arguments are among the live arrays; it adds its temporaries and those outputs that do not reuse
    an argument's memory.
    """

    backend = "jax"
    memory_source = "jax compile-time analysis"
    has_limits = False

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._seen = self._executables()

    def current_memory_bytes(self) -> int:
        import jax

        buffers = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if _is_plain(array)}
        return sum(buffers.values())

    def peak_memory_bytes(self) -> int:
        added = 0
        for key, executable in self._executables().items():
            if key not in self._seen:
                stats = executable.get_compiled_memory_stats()
                extra = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
                added = max(added, extra)
        return self.current_memory_bytes() + added

    def reset_peak(self) -> None:
        """Forgets no program: one compiled earlier may run again, and cannot be told from one that will not."""

    def _executables(self) -> dict[int, Any]:
        import jax

        return {id(executable): executable for executable in jax.local_devices()[0].client.live_executables()}


def _is_plain(array: Any) -> bool:
    return not array.is_deleted() and array.is_fully_addressable and len(array.devices()) == 1


def _open_jax(budget_bytes: int | None) -> Device:
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return JaxCpu("CPU:0", budget_bytes)
    return JaxGpu(f"GPU:0 {device.device_kind}", budget_bytes)


class TorchCuda(Device):
    """A GPU under torch."""

    backend = "torch"
    memory_source = "cuda allocator"

    def current_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated())

    def peak_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()


class TorchCpu(Device):
    """A CPU under torch, which keeps no count of its own: the process's resident memory stands in for it."""

    backend = "torch"
    memory_source = "process high-water mark"
    has_limits = False

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._before = _process_status_bytes("VmRSS")
        self.reset_peak()

    def current_memory_bytes(self) -> int:
        return max(_process_status_bytes("VmRSS") - self._before, 0)

    def peak_memory_bytes(self) -> int:
        return max(_process_status_bytes("VmHWM") - self._before, 0)

    def reset_peak(self) -> None:
        # proc_pid_clear_refs(5): writing 5 resets the peak resident set size to the current one.
        Path("/proc/self/clear_refs").write_text("5")


def _process_status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _open_torch(budget_bytes: int | None) -> Device:
    import torch

    if not torch.cuda.is_available():
        return TorchCpu("CPU:0", budget_bytes)
    if budget_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0))
    return TorchCuda(f"GPU:0 {torch.cuda.get_device_name(0)}", budget_bytes)


def _too_late() -> BudgetError:
    return BudgetError(
        "TensorFlow has run an operation in this process before its memory was set up.",
        "a process in which TensorFlow is imported at most.",
        "put memory_limit_environment(...) into the environment and call open_device before any operation.",
    )
