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

import os
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accumtune.errors import BudgetError
from accumtune.memory.budget import format_bytes

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
        total = _gpu_total_bytes()
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


def _gpu_total_bytes() -> int | None:
    """The memory of the first visible NVIDIA GPU, asked of the driver so that no framework takes the device."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if visible == "-1":
        return None
    if visible:
        query.append(f"--id={visible}")
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    lines = done.stdout.split()
    return int(lines[0]) * MIB if done.returncode == 0 and lines else None


class Device(ABC):
    """One device, as far as its memory goes.

    Attributes:
        name: `"CPU:0"`, or `"GPU:0 NVIDIA H100 80GB HBM3"`.
        backend: `"tensorflow"`, `"jax"` or `"torch"`.
        memory_source: who counts the bytes.
        limit_bytes: the limit that the framework enforces; `None` where there is none, or where the framework
            has no means to (then compare `peak_memory_bytes` with the budget).
    """

    backend: str
    memory_source: str

    def __init__(self, name: str, limit_bytes: int | None = None) -> None:
        self.name = name
        self.limit_bytes = limit_bytes

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

    def __init__(self, name: str, limit_bytes: int | None = None) -> None:
        super().__init__(name, limit_bytes)
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
    # As on a GPU, the allocator owns all of its memory from the start. Left to itself on a CPU it grows by regions
    # of 2, 4, 8 ... MiB whose rests are lost, which makes peaks jump from size to size by up to 15 %.
    region_mib = _half_of_memory_mib() if budget_bytes is None else budget_bytes // MIB
    try:
        reserved = tf.raw_ops.Empty(shape=_uncounted_shape(tf, region_mib), dtype=tf.uint8, init=False)
    except tf.errors.ResourceExhaustedError:
        return device  # the host does not give that much at once: it grows, then
    del reserved
    before = device.current_memory_bytes()
    trace = tf.zeros([3])
    # The variables are read once, at the first operation. BFC hands out multiples of 256 bytes, the plain allocator
    # counts bytes as they come.
    if device.current_memory_bytes() - before < 256:
        raise _TooLateError
    del trace
    device.reset_peak()
    return device


def _half_of_memory_mib() -> int:
    """Address space only: pages nobody writes to cost nothing. TensorFlow's own default limit is 64 GiB."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 2**36) // MIB


def _uncounted_shape(tf: Any, mebibytes: int) -> Any:
    """The shape of so many MiB, in memory that TensorFlow takes over from NumPy because it is aligned.

    Were it allocated, the first region would have been opened for it, and would be missing from the second.
    """
    import numpy as np

    buffer = np.zeros(64, np.int32)
    start = -buffer.ctypes.data % 64 // buffer.itemsize
    shape = buffer[start : start + 2]
    shape[:] = mebibytes, MIB
    return tf.constant(shape)


def _limit_tensorflow_gpu(tf: Any, gpu: Any, budget_bytes: int | None) -> None:
    try:
        if budget_bytes is None:
            tf.config.experimental.set_memory_growth(gpu, True)
        else:
            _check_tensorflow_budget(budget_bytes)
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=budget_bytes // MIB)
            tf.config.set_logical_device_configuration(gpu, [limit])
    except RuntimeError:  # "Virtual devices cannot be modified after being initialized"
        raise _TooLateError from None


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

    def __init__(self, name: str) -> None:
        super().__init__(name)
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
        return JaxCpu("CPU:0")
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

    def __init__(self, name: str) -> None:
        super().__init__(name)
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
        return TorchCpu("CPU:0")
    if budget_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0))
    return TorchCuda(f"GPU:0 {torch.cuda.get_device_name(0)}", budget_bytes)


_TooLateError = BudgetError(
    "TensorFlow has run an operation in this process before its memory was set up.",
    "a process in which TensorFlow is imported at most",
    "put memory_limit_environment(...) into the environment and call open_device before any operation.",
)

# What out-of-memory looks like, framework by framework. TensorFlow uses ResourceExhausted for full queues, message
# sizes and open files too, so that its name alone says nothing.
_MEMORY_ERROR_NAMES = {"MemoryError", "OutOfMemoryError", "_ArrayMemoryError"}
_MEMORY_TEXT = re.compile(
    r"\bOOM\b|out of memory|out-of-memory|not enough memory|can(?:'|no)t allocate memory|unable to allocate"
    r"|fail(?:ed|ure) to allocate|ran out of (?:device |GPU )?memory|CUDA_ERROR_OUT_OF_MEMORY|_ALLOC_FAILED"
    r"|memory exhausted|exceeds? (?:the )?(?:available )?memory|MemoryError",
    re.IGNORECASE,
)
# An error type that may speak of memory, and when its text is believed. Errors of the user's own code are not
# among them: a ValueError that mentions memory is about something else.
_SPEAKS_OF_MEMORY = {
    "ResourceExhaustedError", "InternalError", "UnknownError", "AbortedError",  # tf.errors
    "XlaRuntimeError", "JaxRuntimeError", "RuntimeError", "AcceleratorError",  # jax, torch
    "OSError",
}  # fmt: skip


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception, or what caused it, is a device or a host that ran out of memory.

    Example:

    >>> is_out_of_memory(MemoryError())
    True
    """
    return any(_is_memory_error(one) for one in _chain(exception))


def died_of_memory(exit_signal: int, log: str = "", *, is_limited: bool = False) -> bool:
    """Whether a process that was ended by a signal most likely ran out of memory.

    TensorFlow's oneDNN kernels go on without the buffer that they did not get: with a limited allocator running
    out of memory can end in a segmentation fault instead of an exception (seen on TensorFlow 2.21, Conv2D).

    Args:
        exit_signal: the number of the signal.
        log: what the process wrote to its standard error.
        is_limited: whether its allocator was limited.
    """
    if exit_signal == signal.SIGKILL or _MEMORY_TEXT.search(log):
        return True
    return is_limited and exit_signal in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


def _is_memory_error(exception: BaseException) -> bool:
    names = {cls.__name__ for cls in type(exception).__mro__}
    if names & _MEMORY_ERROR_NAMES:
        return True
    text = str(exception)
    if "InternalError" in names and "Dst tensor is not initialized" in text:
        return True  # TensorFlow's words for a copy to a GPU that has no room left
    return bool(names & _SPEAKS_OF_MEMORY) and _MEMORY_TEXT.search(text) is not None


def _chain(exception: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from or while handling, and the members of groups."""
    waiting, seen = [exception], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        elif one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)
        if isinstance(one, BaseExceptionGroup):
            waiting.extend(one.exceptions)
