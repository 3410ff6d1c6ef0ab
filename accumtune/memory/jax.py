"""What JAX holds, and what XLA plans to hold."""

from __future__ import annotations

from typing import Any

import jax

from accumtune.errors import BudgetError
from accumtune.memory.device import Device

# The driver and CUDA do not call quite the same the whole of a device.
_LIMIT_TOLERANCE = 0.01


class JaxDevice(Device):
    """A device under JAX: what is held now, and on top of it what XLA planned for each compiled program.

    A program's arguments are held already; it adds its temporaries and those outputs that do not reuse an argument's
    memory.
    """

    backend = "jax"
    memory_source = "jax compile-time analysis"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._seen = self._executables()

    def peak_memory_bytes(self) -> int:
        added = 0
        for stats in self._plans():
            added = max(added, stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)
        return self.current_memory_bytes() + added

    def certain_peak_bytes(self) -> int:
        # In the middle of a step a program's outputs are held already.
        return self.current_memory_bytes() + max((stats.temp_size_in_bytes for stats in self._plans()), default=0)

    def reset_peak(self) -> None:
        """Forgets no program: one compiled earlier may run again, and cannot be told from one that will not."""

    def _plans(self) -> list[Any]:
        """Of each program compiled since the device was opened."""
        found = self._executables().items()
        return [executable.get_compiled_memory_stats() for key, executable in found if key not in self._seen]

    def _executables(self) -> dict[int, Any]:
        return {id(executable): executable for executable in jax.local_devices()[0].client.live_executables()}


class JaxGpu(JaxDevice):
    """A GPU under JAX.

    The most that its allocator has handed out is no figure of training: XLA tries convolutions out when it compiles
    them, in as much memory as it finds (700 MiB for a step of 50, H200, JAX 0.11), and that peak cannot be reset. It is
    an upper bound.

    Raises:
        BudgetError: the allocator was chosen in the environment, and is one that does not count.
    """

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        stats = self._stats()
        if "peak_bytes_in_use" not in stats:
            raise BudgetError(
                f"JAX's allocator on {name} does not count what it hands out.",
                "its default allocator.",
                "leave XLA_PYTHON_CLIENT_ALLOCATOR out of the environment.",
            )
        # JAX takes its limit from the environment, as a share of a device that the driver may not have named: then the
        # peak is compared with the budget.
        limit = stats.get("bytes_limit")
        if budget_bytes is not None:
            self.has_limits = limit is not None and limit <= budget_bytes * (1 + _LIMIT_TOLERANCE)

    def _stats(self) -> dict[str, int]:
        return jax.local_devices()[0].memory_stats() or {}

    def current_memory_bytes(self) -> int:
        return int(self._stats()["bytes_in_use"])

    def peak_memory_bytes(self) -> int:
        return min(super().peak_memory_bytes(), int(self._stats()["peak_bytes_in_use"]))


class JaxCpu(JaxDevice):
    """A CPU under JAX."""

    has_limits = False

    def current_memory_bytes(self) -> int:
        buffers = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if _is_plain(array)}
        return sum(buffers.values())


def _is_plain(array: Any) -> bool:
    return not array.is_deleted() and array.is_fully_addressable and len(array.devices()) == 1


def open_device(budget_bytes: int | None) -> Device:
    """The first device of this process."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return JaxCpu("CPU:0", budget_bytes)
    return JaxGpu(f"GPU:0 {device.device_kind}", budget_bytes)
