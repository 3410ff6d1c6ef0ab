"""Decides where trials run, from the `workers`, `devices` and `executor` arguments of a search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accumtune.errors import SearchError
from accumtune.execution.executors import Executor, LocalExecutor
from accumtune.execution.placement import Place, plan_places, resolve_gpus, usable_cores
from accumtune.memory.machine import machine_memory, visible_gpus

_CHIEF_AND_WORKERS = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")


def places_for_workers(
    workers: int, devices: str | Sequence[str | int], executor: Any, memory_budget_bytes: int | None
) -> list[Place]:
    """Returns a place for each worker.

    Raises:
        BudgetError: several workers share a device that cannot hold their budgets.
        SearchError: there is no such device, or devices are given with an executor, which has its own.
    """
    if executor is not None:
        if devices != "auto":
            raise SearchError(
                f"Received devices={devices!r} with an executor.",
                "one of the two: an executor's machines have their own devices.",
                "leave devices out. On Ray, executor=RayPool(num_gpus=1) sets the GPUs of a trial.",
            )
        return getattr(executor, "places", _alike)(workers)
    gpus = [] if devices == "cpu" else resolve_gpus(devices, visible_gpus())
    if workers == 1 and devices == "auto":
        return [Place()]  # the framework's default, which may use several GPUs
    return plan_places(
        workers,
        gpus,
        cores=usable_cores(),
        memory_bytes=machine_memory().total_bytes,
        memory_budget_bytes=memory_budget_bytes,
        without_gpus=devices == "cpu",
    )


def _alike(workers: int) -> list[Place]:
    return [Place()] * workers


def open_executor(executor: Any, backend: str) -> Executor:
    """Opens the executor for a resolved `executor=`.

    Raises:
        SearchError: neither an address nor an object with `submit`, or Ray is not installed.
    """
    if executor is None:
        return LocalExecutor(backend)
    from accumtune.execution.pool_executor import PoolExecutor

    return PoolExecutor(executor, backend)


def resolve_pool(executor: Any) -> Any:
    """Returns the pool for `executor=`: an address becomes a connection to Ray.

    Raises:
        SearchError: neither an address nor an object with `submit`, or Ray is not installed.
    """
    if isinstance(executor, str):
        from accumtune.execution.ray_executor import RayPool

        return RayPool(None if executor == "ray" else executor)
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise SearchError(
            f"Received executor of type {type(executor).__name__}.",
            '"ray", the address of a Ray cluster, or an object with submit(function, *arguments) -> Future.',
            "for Dask: executor=client.get_executor().",
        )
    return executor


def refuse_chief_and_workers() -> None:
    """Refuses Keras Tuner's own distributed mode, which would wait for a chief that is not there.

    Raises:
        SearchError: its environment variables are set.
    """
    found = [name for name in _CHIEF_AND_WORKERS if name in os.environ]
    if found:
        raise SearchError(
            f"Received the environment variables {', '.join(found)} of Keras Tuner's chief and workers.",
            "one search process, which sends its trials to an executor.",
            f"unset {' '.join(found)} and start one script with workers=8 (this machine) or "
            'workers=8, executor="ray" (a cluster).',
        )
