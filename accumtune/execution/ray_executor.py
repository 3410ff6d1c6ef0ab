"""Runs tasks on Ray, one Ray task for each. Ray chooses the machine, and reports when it is lost."""

from __future__ import annotations

import functools
import itertools
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from accumtune.errors import SearchError, WorkerError
from accumtune.execution.placement import Place, current_place, threads_environment

_ACCELERATOR = "accelerator_type:"
_CONNECT_SECONDS = 10.0


class RayPool:
    """A Ray cluster with the interface of `concurrent.futures`.

    Args:
        address: of the cluster. None: the one that `RAY_ADDRESS` names, or one on this machine, or else a new one
            here.
        num_cpus: cores of each trial.
        num_gpus: GPUs of each trial; `0.5` if two share one. None: 1 if the cluster has GPUs.
        runtime_env: what Ray prepares on each machine, such as `{"pip": [...]}`.
        storage: where trials keep their checkpoints if the machines do not share the search's folder: a URL for fsspec,
            such as `"s3://bucket/searches"`. Without it, a trial whose machine is lost starts from the beginning.

    Raises:
        SearchError: Ray is not installed, or there is no cluster at this address.

    Example:

    >>> tuner = accumtune.RandomSearch(..., workers=6, executor=RayPool("auto", num_gpus=0.5))  # doctest: +SKIP
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        num_cpus: int = 1,
        num_gpus: float | None = None,
        runtime_env: dict[str, Any] | None = None,
        storage: str | None = None,
    ) -> None:
        self._ray = _import_ray()
        self.storage = storage
        self._address = address
        self._runtime_env = runtime_env
        self._is_ours = False
        self._num_cpus = num_cpus
        self._connect()
        self._num_gpus = num_gpus if num_gpus is not None else float(self._ray.cluster_resources().get("GPU", 0) > 0)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Runs a function on a machine of the cluster that has the `current_place()`'s type of device."""
        self._connect()
        kind = current_place().kind
        task = self._task(function).options(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            resources={_ACCELERATOR + kind: 0.001} if kind else None,
            # The search restarts lost trials itself, because each start is an attempt in its journal.
            max_retries=0,
        )
        reference = task.remote(*arguments)
        future: Future[Any] = reference.future()
        future.accumtune_reference = reference  # type: ignore[attr-defined]
        return future

    @functools.cache  # noqa: B019  Ray keeps a copy of each function anyway
    def _task(self, function: Callable[..., Any]) -> Any:
        return self._ray.remote(function)

    def share(self, value: Any) -> Any:
        """Puts a value into Ray's store, from which each machine fetches it once."""
        return self._ray.put(value)

    def kill(self, future: Any) -> None:
        """Ends the worker that runs a task, and with it the task's process."""
        self._ray.cancel(future.accumtune_reference, force=True)

    def is_loss(self, error: BaseException) -> bool:
        """Returns whether an error means a lost machine or worker, and not an error of the task."""
        exceptions = self._ray.exceptions
        return isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)

    def places(self, workers: int) -> list[Place]:
        """Returns a place per worker; in a cluster with several types of device, in proportion to their numbers."""
        kinds: list[str] = []
        for node in self._ray.nodes():
            resources = node["Resources"] if node["Alive"] else {}
            found = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
            kinds += found[:1] * max(1, int(resources.get("GPU", 0)))
        if len(set(kinds)) < 2 or not self._num_gpus:
            kinds = [""]
        threads = threads_environment(self._num_cpus)
        return [Place(kind, threads, _describe(kind)) for kind in itertools.islice(itertools.cycle(kinds), workers)]

    def close_connection(self) -> None:
        """Disconnects from the cluster if this object has connected; stops a cluster that it has started."""
        if self._is_ours and self._ray.is_initialized():
            self._ray.shutdown()
            self._is_ours = False

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        try:
            _check_answers(self._address)
            self._ray.init(
                address=self._address, log_to_driver=False, logging_level="warning", runtime_env=self._runtime_env
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SearchError(
                f"Received executor={self._address or 'ray'!r}, and Ray says: {error}",
                "the address of a running Ray cluster.",
                "start it (`ray start --head` on one machine, `ray start --address=...` on the others), then give "
                'executor="HOST:6379", or "auto" on one of its machines.',
            ) from error
        self._is_ours = True


def _check_answers(address: str | None) -> None:
    """Raises OSError if nothing listens at the address; Ray itself would retry for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()


def _describe(kind: str) -> str:
    return f"Ray, {kind}" if kind else "Ray"


@functools.cache
def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise WorkerError(
            'Received executor="ray", and Ray is not installed here.',
            "the package ray.",
            "pip install 'accumtune[ray]', on every machine.",
        ) from error
    return ray
