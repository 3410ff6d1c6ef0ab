"""Reads the memory of the machine (/proc, control groups) and of its NVIDIA GPUs (NVML), without any framework.

NVML creates no context on a GPU, so the process may still fork.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accumtune.errors import BudgetError
from accumtune.memory.units import format_bytes

# The files with a container's limit and use: version 2 of control groups, version 1.
_CGROUP_FILES = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")

# With one of these instruction sets TensorFlow enables oneDNN by default.
_ONEDNN_BY_DEFAULT = frozenset({"avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"})


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device, and the processes that use it.

    Args:
        name: `"CPU"`, or the GPU's name.
        total_bytes: of the device; on a CPU of the machine, or of the container that this process is in.
        free_bytes: what is not in use now.
        others: a text for each other process on a GPU: `"1234 python 2.00 GiB"`.
    """

    name: str
    total_bytes: int
    free_bytes: int
    others: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"

    def describe(self) -> str:
        """Returns lines for the user: the device, what a GPU's context takes, and other processes."""
        total, free = format_bytes(self.total_bytes), format_bytes(self.free_bytes)
        lines = [f"Device {self.name}: {total} in total, {free} free"]
        if self.is_gpu:
            lines.append("    each process's CUDA context takes 300 to 600 MB of it, beside its memory budget")
        return "\n".join([*lines, *(f"    in use by process {other}" for other in self.others)])


def device_memory() -> DeviceMemory:
    """Returns the memory of the first visible NVIDIA GPU, or else of the machine.

    `CUDA_VISIBLE_DEVICES=-1` hides GPUs.
    """
    return _gpu() or machine_memory()


def gpu_total_bytes() -> int | None:
    """Returns the memory of the first visible NVIDIA GPU in bytes; None without one."""
    gpu = _gpu()
    return None if gpu is None else gpu.total_bytes


def budget_hint(backend: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a sentence, to add to an advice, about a setting that saves memory on this machine; "" if there is none.

    On x86 CPUs without instructions for neural networks, TensorFlow does not enable oneDNN. The gradients of
    convolutions then take a workspace as large as the last cache, such as 32 MiB, whatever the batch.
    """
    if backend != "tensorflow" or _gpu() is not None:
        return ""
    if "TF_ENABLE_ONEDNN_OPTS" in os.environ or platform.machine() != "x86_64" or not cpuinfo.exists():
        return ""
    if not _ONEDNN_BY_DEFAULT.isdisjoint(cpuinfo.read_text().split()):
        return ""
    return (
        " If the model has convolutions, set TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow is imported: without it, they "
        "need a workspace as large as this CPU's cache."
    )


def _gpu() -> DeviceMemory | None:
    for gpu in visible_gpus()[:1]:
        if gpu.total_bytes is not None and gpu.free_bytes is not None:
            return DeviceMemory(gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.others)
    return None


def machine_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> DeviceMemory:
    """Returns the memory of the machine, or of the container that this process is in."""
    lines = (line.split(":") for line in meminfo.read_text().splitlines())
    known = {name: int(value.split()[0]) * 1024 for name, value in lines}
    total, free = known["MemTotal"], known["MemAvailable"]
    for limit_file, used_file in _CGROUP_FILES:
        try:
            limit = int((cgroups / limit_file).read_text())
            used = int((cgroups / used_file).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return DeviceMemory("CPU", total, free)


def available_memory_bytes(device_name: str) -> int:
    """Returns the free memory of a device, in bytes.

    Args:
        device_name: as in `Device.name`: "CPU:0", or "GPU:0 ...", the first GPU that this process sees.

    Raises:
        BudgetError: it is unknown, because the driver does not answer or it is another kind of device.
    """
    kind = device_name.partition(":")[0]
    if kind == "CPU":
        return machine_memory().free_bytes
    answer = "the GPU has no memory of its own"
    if kind != "GPU":
        answer = "accumtune can only ask NVIDIA's driver"
    else:
        try:
            gpus = asked_gpus()
        except DriverIsSilent as error:
            gpus, answer = [], str(error)
        if gpus and gpus[0].free_bytes is not None:
            return gpus[0].free_bytes
    raise BudgetError(
        f"The free memory of {device_name} is not known: {answer}.",
        "an NVIDIA GPU whose driver answers.",
        'give a budget instead: config.for_budget("8GiB", build_model, x, y).',
    )


class DriverIsSilent(Exception):
    """There is no driver, or it does not answer; the message says which."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of one that is partitioned (MIG).

    Args:
        index: its name in `CUDA_VISIBLE_DEVICES`: a number, or an instance's UUID.
        name: its type, such as `"NVIDIA H100 80GB HBM3"`.
        total_bytes, free_bytes: of its memory; None if it has none of its own, or the driver does not say.
        others: a text for each other process on it: `"1234 python 2.00 GiB"`.
        uuid: another name for it in `CUDA_VISIBLE_DEVICES`.
    """

    index: str
    name: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = field(default=None, compare=False)
    others: tuple[str, ...] = field(default=(), compare=False)
    uuid: str = field(default="", compare=False)


def visible_gpus() -> list[Gpu]:
    """Returns the GPUs that `CUDA_VISIBLE_DEVICES` leaves to this process, in its order; none without a driver."""
    try:
        return asked_gpus()
    except DriverIsSilent:
        return []


def asked_gpus() -> list[Gpu]:
    """Returns the same as `visible_gpus`.

    Raises:
        DriverIsSilent: there is no driver, or it does not answer.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and variable.split(",")[0].strip() in ("", "-1"):
        return []
    return _among_visible(_all_gpus(), variable)


def _among_visible(gpus: Sequence[Sequence[Gpu]], variable: str | None) -> list[Gpu]:
    """Returns the GPUs that `CUDA_VISIBLE_DEVICES` selects; all if it is not set.

    Args:
        gpus: a list for each GPU: itself, or the instances that it is partitioned into.
        variable: the value of `CUDA_VISIBLE_DEVICES`.
    """
    parts = [part for instances in gpus for part in instances]
    if variable is None:
        return parts
    by_number = {str(number): instances[0] for number, instances in enumerate(gpus) if instances}
    found = []
    for item in filter(None, (part.strip() for part in variable.split(","))):
        by_uuid = [part for part in parts if item.startswith(("GPU-", "MIG-")) and part.uuid.startswith(item)]
        matching = [by_number[item]] if item in by_number else by_uuid
        if not matching:  # CUDA ignores an invalid entry and all after it
            break
        found.append(_called(matching[0], item))
    return found


def _called(gpu: Gpu, item: str) -> Gpu:
    return replace(gpu, index=gpu.uuid if item.startswith(("GPU-", "MIG-")) else item)


def _all_gpus() -> list[list[Gpu]]:
    try:
        import pynvml
    except ImportError:
        raise DriverIsSilent("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DriverIsSilent(str(error)) from None
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [_parts(pynvml, pynvml.nvmlDeviceGetHandleByIndex(number), str(number)) for number in range(count)]
    except pynvml.NVMLError as error:
        raise DriverIsSilent(str(error)) from None
    finally:
        pynvml.nvmlShutdown()


def _parts(nvml: Any, handle: Any, index: str) -> list[Gpu]:
    mode = _answer(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if not mode:
        return [_described(nvml, handle, index)]
    return [_described(nvml, instance, None) for instance in _instances(nvml, handle)]


def _instances(nvml: Any, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        instance = _answer(nvml, functools.partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number))
        if instance is not None:  # there may be fewer than the largest number
            yield instance


def _described(nvml: Any, handle: Any, index: str | None) -> Gpu:
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    memory = _answer(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    processes = _answer(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return Gpu(
        index or uuid,
        _text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=None if memory is None else int(memory.total),
        free_bytes=None if memory is None else int(memory.free),
        others=tuple(_process(nvml, process) for process in processes if process.pid != os.getpid()),
        uuid=uuid,
    )


def _process(nvml: Any, process: Any) -> str:
    name = _text(_answer(nvml, lambda: nvml.nvmlSystemGetProcessName(process.pid)) or "?")
    used = "" if process.usedGpuMemory is None else f" {format_bytes(process.usedGpuMemory)}"
    return f"{process.pid} {os.path.basename(name)}{used}"


def _answer(nvml: Any, question: Callable[[], Any]) -> Any:
    """Returns the driver's answer; None if this GPU or its driver does not support the question."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
