"""Assigns devices and cores to trials that run at once, through the environment of their processes.

A `Place` is a share of the machine in which one trial at a time runs. A search with N workers has N places. The thread
that runs a trial leases one; all processes that it starts meanwhile, probes included, run there (`current_place`).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import queue
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accumtune.errors import BudgetError, SearchError
from accumtune.memory.budget import format_bytes
from accumtune.memory.machine import Gpu

MIB = 2**20
# What CUDA and its libraries take of a GPU in each process, outside of any allocator: 300 to 600 MB.
_CONTEXT_BYTES = 600 * MIB
_NO_GPU = "-1"  # the value of CUDA_VISIBLE_DEVICES that hides all GPUs


@dataclass(frozen=True)
class Place:
    """A share of a machine in which one trial at a time runs.

    Args:
        kind: the type of its device; places of one kind share measurements. "" if all places are alike.
        environment: variables of every process that runs there.
        description: for the user.
    """

    kind: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    description: str = ""


_place: contextvars.ContextVar[Place] = contextvars.ContextVar("accumtune_place", default=Place())  # noqa: B039


def current_place() -> Place:
    """Returns the place that this thread has leased; without one, a place without restrictions."""
    return _place.get()


@contextlib.contextmanager
def at_place(place: Place) -> Iterator[None]:
    """Makes a place the current one of this thread, until the context ends."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


class Places:
    """Leases places to trials, each to one at a time.

    Args:
        places: one for each trial at once.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Place]:
        """Waits for a free place and makes it the thread's current one."""
        place = self._free.get()
        try:
            with at_place(place):
                yield place
        finally:
            self._free.put(place)


def plan_places(
    workers: int,
    gpus: Sequence[Gpu],
    *,
    cores: int,
    memory_bytes: int | None = None,
    memory_budget_bytes: int | None = None,
    without_gpus: bool = False,
) -> list[Place]:
    """Divides devices and cores among workers.

    Args:
        workers: trials at once.
        gpus: those that trials may use; without any, they run on the CPU.
        cores: the cores of this machine that this process may use.
        memory_bytes: of this machine; None if unknown.
        memory_budget_bytes: of each trial.
        without_gpus: whether to hide the machine's GPUs.

    Returns:
        One place for each worker.

    Raises:
        BudgetError: several workers share a device that cannot hold their budgets.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": _NO_GPU, "JAX_PLATFORMS": "cpu"} if without_gpus else {}
    if not gpus:
        if workers == 1:
            return [Place(environment=hidden)]
        _check_sharing("this machine", workers, memory_bytes, memory_budget_bytes, overhead_bytes=0)
        share = _cores_each(cores, workers)
        return [Place("", {**hidden, **threads_environment(share)}, f"CPU, {_count(share, 'core')}")] * workers
    sharers = Counter(gpus[number % len(gpus)] for number in range(workers))
    for gpu, count in sharers.items():
        _check_sharing(f"GPU {gpu.index}", count, gpu.total_bytes, memory_budget_bytes, _CONTEXT_BYTES)
    threads = threads_environment(_cores_each(cores, workers)) if workers > 1 else {}
    return [_gpu_place(gpus[number % len(gpus)], sharers, threads) for number in range(workers)]


def _gpu_place(gpu: Gpu, sharers: Mapping[Gpu, int], threads: Mapping[str, str]) -> Place:
    # PCI_BUS_ID numbers GPUs as the driver does; CUDA's default order puts the fastest first.
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpu.index, **threads}
    shared = f" (shared by {sharers[gpu]})" if sharers[gpu] > 1 else ""
    return Place(gpu.name, environment, f"GPU {gpu.index} {gpu.name}".rstrip() + shared)


def _cores_each(cores: int, workers: int) -> int:
    return max(1, cores // workers)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def threads_environment(cores: int) -> dict[str, str]:
    """Returns variables that limit the threads with which TensorFlow, JAX and torch compute."""
    return {
        "TF_NUM_INTRAOP_THREADS": str(cores),
        "TF_NUM_INTEROP_THREADS": str(cores),
        "NPROC": str(cores),  # the size of the thread pools of XLA's CPU client
        "OMP_NUM_THREADS": str(cores),  # torch (see `apply_place`), oneDNN, NumPy's BLAS
    }


def _check_sharing(
    device: str, workers: int, memory_bytes: int | None, budget_bytes: int | None, overhead_bytes: int
) -> None:
    """Raises BudgetError if a device cannot hold the budgets of all trials that share it."""
    if workers == 1 or memory_bytes is None:
        return
    most = memory_bytes // workers - overhead_bytes
    if budget_bytes is None and overhead_bytes:
        raise BudgetError(
            f"Received {workers} workers for {device} without a memory_budget: each trial could take all of it.",
            "a memory budget if trials share a GPU, so that none runs out of memory because of another.",
            f'give memory_budget="{max(most, 0) // MIB}MiB" or less, or fewer workers.',
        )
    if budget_bytes is not None and budget_bytes > most:
        extra = f" and {format_bytes(overhead_bytes)} for each process" if overhead_bytes else ""
        raise BudgetError(
            f"Received {workers} workers with memory_budget={format_bytes(budget_bytes)} each on {device}, which has "
            f"{format_bytes(memory_bytes)}.",
            f"{workers} × memory_budget{extra} within the memory of the device: each trial has the whole budget.",
            f'give memory_budget="{max(most, 0) // MIB}MiB", or fewer workers.',
        )


def resolve_gpus(devices: str | Sequence[str | int | Gpu], visible: Sequence[Gpu]) -> list[Gpu]:
    """Returns the GPUs that `devices=` names.

    Args:
        devices: `"auto"` (all visible ones), `"cpu"`, or a list of indices or UUIDs.
        visible: the GPUs of this machine.

    Raises:
        SearchError: there is no such GPU.
    """
    if devices == "auto":
        return list(visible)
    if devices == "cpu":
        return []
    if isinstance(devices, str) or not devices:
        raise _unknown_devices(devices, visible)
    known = {gpu.index: gpu for gpu in visible}
    found = [item if isinstance(item, Gpu) else known.get(str(item)) for item in devices]
    if None in found:
        raise _unknown_devices(devices, visible)
    return [gpu for gpu in found if gpu is not None]


def _unknown_devices(devices: object, visible: Sequence[Gpu]) -> SearchError:
    listed = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in visible) or "none"
    return SearchError(
        f"Received devices={devices!r}; visible GPUs: {listed}.",
        '"auto", "cpu", or a list of GPUs such as devices=[0, 1].',
        'leave devices out: "auto" gives each worker a GPU of its own.',
    )


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def apply_place() -> None:
    """Applies the environment, in a forked child, to frameworks that have read it when they were imported."""
    threads, platforms = os.environ.get("OMP_NUM_THREADS", ""), os.environ.get("JAX_PLATFORMS")
    if "torch" in sys.modules and threads.isdigit():
        sys.modules["torch"].set_num_threads(int(threads))
    if "jax" in sys.modules and platforms:
        sys.modules["jax"].config.update("jax_platforms", platforms)
    torch_of_keras: Any = sys.modules.get("keras.src.backend.torch.core")
    if torch_of_keras is not None and os.environ.get("CUDA_VISIBLE_DEVICES") == _NO_GPU:
        torch_of_keras.DEFAULT_DEVICE = "cpu"  # Keras was imported while the GPUs were visible
