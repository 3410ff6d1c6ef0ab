"""The `workers`, `devices` and `executor` arguments of a search: which trials run where."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from accumtune.errors import SearchError
from accumtune.execution import placement as device_plans
from accumtune.execution.executors import Executor, LocalExecutor
from accumtune.execution.placement import Place
from accumtune.memory.machine import machine_memory, visible_gpus

_CHIEF_AND_WORKERS = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")


def plan(
    workers: int, devices: str | Sequence[str | int], executor: Any, memory_budget_bytes: int | None
) -> list[Place]:
    """A place for each worker.

    Raises:
        BudgetError: several workers share a device that cannot hold their budgets.
        SearchError: a device that is not there; or devices for an executor, which has its own.
    """
    if executor is not None:
        if devices != "auto":
            raise SearchError(
                f"Received devices={devices!r} with an executor.",
                "one of them: an executor's machines have devices of their own.",
                "leave devices out; how many GPUs a trial gets on Ray: executor=RayPool(num_gpus=1).",
            )
        return getattr(executor, "places", _alike)(workers)
    gpus = [] if devices == "cpu" else device_plans.resolve_gpus(devices, visible_gpus())
    if workers == 1 and devices == "auto":
        return [Place()]  # whatever the framework does by itself; it may use several GPUs
    return device_plans.plan_places(
        workers,
        gpus,
        cores=device_plans.usable_cores(),
        memory_bytes=machine_memory().total_bytes,
        memory_budget_bytes=memory_budget_bytes,
        without_gpus=devices == "cpu",
    )


def _alike(workers: int) -> list[Place]:
    return [Place()] * workers


def open_executor(executor: Any, backend: str) -> Executor:
    """What `executor=` means.

    Raises:
        SearchError: neither an address nor an object with `submit`, or Ray is not installed.
    """
    if executor is None:
        return LocalExecutor(backend)
    from accumtune.execution.pool_executor import PoolExecutor

    return PoolExecutor(executor, backend)


def resolve_pool(executor: Any) -> Any:
    """A pool for what `executor=` was given: an address becomes a connection to Ray.

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
    """Keras Tuner's own distributed mode would wait for a chief that is not there.

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


def command_to_resume() -> str:
    """What a person types to go on."""
    if "ipykernel" in sys.modules or not getattr(sys, "orig_argv", None):
        return "the same cells"
    return shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])
