"""The memory of the device as the operating system or its driver counts it. No framework is asked, none is started."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from accumtune.memory.gpu_driver import visible_gpus
from accumtune.memory.units import format_bytes

# Where a container's limit is written: version 2 of control groups, version 1.
_CGROUP_FILES = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")

# With one of these TensorFlow turns oneDNN on by itself.
_ONEDNN_BY_DEFAULT = frozenset({"avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"})


@dataclass(frozen=True)
class DeviceMemory:
    """What there is, and who else uses it.

    Args:
        name: `"CPU"`, or the GPU's name.
        total_bytes: of the device; on a CPU of the machine, or of the container that this process is in.
        free_bytes: what nobody uses now.
        others: one text per process on a GPU: `"1234 python 2.00 GiB"`.
    """

    name: str
    total_bytes: int
    free_bytes: int
    others: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU"

    def describe(self) -> str:
        """For people, a line each: the device, what a GPU's context takes, other processes."""
        total, free = format_bytes(self.total_bytes), format_bytes(self.free_bytes)
        lines = [f"Device {self.name}: {total} in total, {free} free"]
        if self.is_gpu:
            lines.append("    each process's CUDA context takes 300 to 600 MB of it, beside its memory budget")
        return "\n".join([*lines, *(f"    in use by process {other}" for other in self.others)])


def device_memory() -> DeviceMemory:
    """The first visible NVIDIA GPU; without one, the machine. `CUDA_VISIBLE_DEVICES=-1` hides GPUs."""
    return _gpu() or machine_memory()


def gpu_total_bytes() -> int | None:
    """The memory of the first visible NVIDIA GPU; None where there is none."""
    gpu = _gpu()
    return None if gpu is None else gpu.total_bytes


def budget_hint(backend: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What else may let a model fit, to go on after an advice; empty where there is nothing to say.

    Where TensorFlow's device is the CPU, it uses oneDNN if that has instructions for neural networks (x86); elsewhere
    the gradients of convolutions take a workspace as large as the last cache, such as 32 MiB, whatever the batch.
    """
    if backend != "tensorflow" or _gpu() is not None:
        return ""
    if "TF_ENABLE_ONEDNN_OPTS" in os.environ or platform.machine() != "x86_64" or not cpuinfo.exists():
        return ""
    if not _ONEDNN_BY_DEFAULT.isdisjoint(cpuinfo.read_text().split()):
        return ""
    return (
        " If the model has convolutions, set TF_ENABLE_ONEDNN_OPTS=1 before TensorFlow is imported: without, they take "
        "a workspace on this CPU as large as its cache."
    )


def _gpu() -> DeviceMemory | None:
    for gpu in visible_gpus()[:1]:
        if gpu.total_bytes is not None and gpu.free_bytes is not None:
            return DeviceMemory(gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.others)
    return None


def machine_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> DeviceMemory:
    """The machine's memory, or that of the container which this process is in."""
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
