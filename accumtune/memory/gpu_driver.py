"""The NVIDIA GPUs of this machine as their driver counts them (NVML). No framework is asked for it.

The library only answers questions: it makes no context on a GPU, so that a process may fork after it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accumtune.memory.units import format_bytes


class DriverIsSilent(Exception):
    """There is no driver, or it does not answer; the text says which."""


@dataclass(frozen=True)
class DriverGpu:
    """A GPU, or an instance of one that is divided (MIG).

    Args:
        index: what `CUDA_VISIBLE_DEVICES` calls it: a number, of an instance its UUID.
        uuid: another name for it there.
        name: its type, such as `"NVIDIA H100 80GB HBM3"`.
        total_bytes, free_bytes: of its memory; None where it has none of its own, or nobody could tell.
        others: one text per process on it: `"1234 python 2.00 GiB"`.
    """

    index: str
    uuid: str
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    others: tuple[str, ...] = ()


def visible_gpus() -> list[DriverGpu]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves to this process, in its order; none where there is no driver."""
    try:
        return asked_gpus()
    except DriverIsSilent:
        return []


def asked_gpus() -> list[DriverGpu]:
    """The same.

    Raises:
        DriverIsSilent: nobody answers.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and variable.split(",")[0].strip() in ("", "-1"):
        return []
    return among_visible(_all_gpus(), variable)


def among_visible(gpus: Sequence[Sequence[DriverGpu]], variable: str | None) -> list[DriverGpu]:
    """What `CUDA_VISIBLE_DEVICES` says, where it is set.

    Args:
        gpus: for each GPU itself, or the instances that it is divided into.
        variable: its value.
    """
    parts = [part for instances in gpus for part in instances]
    if variable is None:
        return parts
    by_number = {str(number): instances[0] for number, instances in enumerate(gpus) if instances}
    found = []
    for item in filter(None, (part.strip() for part in variable.split(","))):
        by_uuid = [part for part in parts if item.startswith(("GPU-", "MIG-")) and part.uuid.startswith(item)]
        matching = [by_number[item]] if item in by_number else by_uuid
        if not matching:  # as CUDA has it: what comes after an invalid one is not visible
            break
        found.append(_called(matching[0], item))
    return found


def _called(gpu: DriverGpu, item: str) -> DriverGpu:
    index = gpu.uuid if item.startswith(("GPU-", "MIG-")) else item
    return DriverGpu(index, gpu.uuid, gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.others)


def _all_gpus() -> list[list[DriverGpu]]:
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


def _parts(nvml: Any, handle: Any, index: str) -> list[DriverGpu]:
    mode = _answer(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if not mode:
        return [_described(nvml, handle, index)]
    return [_described(nvml, instance, None) for instance in _instances(nvml, handle)]


def _instances(nvml: Any, handle: Any) -> Iterator[Any]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        instance = _answer(nvml, functools.partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number))
        if instance is not None:  # fewer than there may be
            yield instance


def _described(nvml: Any, handle: Any, index: str | None) -> DriverGpu:
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    memory = _answer(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    processes = _answer(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return DriverGpu(
        index or uuid,
        uuid,
        _text(nvml.nvmlDeviceGetName(handle)),
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.free),
        tuple(_process(nvml, process) for process in processes if process.pid != os.getpid()),
    )


def _process(nvml: Any, process: Any) -> str:
    name = _text(_answer(nvml, lambda: nvml.nvmlSystemGetProcessName(process.pid)) or "?")  # of another container
    used = "" if process.usedGpuMemory is None else f" {format_bytes(process.usedGpuMemory)}"
    return f"{process.pid} {os.path.basename(name)}{used}"


def _answer(nvml: Any, question: Callable[[], Any]) -> Any:
    """None for what this GPU or its driver does not know."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
