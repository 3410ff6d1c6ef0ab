"""Measures what JAX holds on a device, with what XLA plans to hold."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from keras.src.backend.jax import trainer

from accumtune.accumulation.engines import engine_jax
from accumtune.errors import BudgetError
from accumtune.memory.device import Device

# The driver and CUDA report slightly different sizes of a device's memory.
_LIMIT_TOLERANCE = 0.01
# The share of time that may be spent on adding up all that JAX holds.
_LOOKING = 0.01


class JaxDevice(Device):
    """A device under JAX: its peak is the most that it held while a compiled function of training ran.

    These are the functions of the engine and of Keras's trainer (validation, prediction). Other compiled functions,
    such as a weight's initializer, run before training and free their memory.
    """

    backend = "jax"
    memory_source = "jax compile-time analysis"

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._peak = 0
        self.resets = 0
        engine_jax.compiled = trainer.jit = self._compiled

    def peak_memory_bytes(self) -> int:
        return max(self._peak, self.current_memory_bytes())

    def reset_peak(self) -> None:
        self._peak = 0
        self.resets += 1

    def note(self, held_bytes: int) -> None:
        """Records what is held while a function runs."""
        self._peak = max(self._peak, held_bytes)

    def _compiled(self, function: Any, **options: Any) -> WatchedFunction:
        return WatchedFunction(jax.jit(function, **options), self)


class WatchedFunction:
    """A compiled function that reports to a device what is held while it runs.

    This is all that is held when it is called, with arguments that are still on the host, and what XLA plans in
    addition: the function's temporaries, and those of its outputs that do not reuse an argument's memory.
    """

    def __init__(self, compiled: Any, device: JaxDevice) -> None:
        self._compiled = compiled
        self._device = device
        self._added: int | None = None
        self._held = 0
        self._resets = -1
        self._look_at = 0.0

    def __call__(self, *args: Any) -> Any:
        known = self._compiled._cache_size()
        self._look(args)
        result = self._compiled(*args)
        if self._added is None or self._compiled._cache_size() != known:
            # JAX finds the compiled function in its cache and does not compile again.
            stats = self._compiled.lower(*args).compile().memory_analysis()
            added = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
            self._added = max(self._added or 0, added)
        self._device.note(self._held + self._added)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def _look(self, args: Any) -> None:
        start = time.monotonic()
        if self._resets == self._device.resets and start < self._look_at:
            return
        self._resets = self._device.resets
        self._held = self._device.current_memory_bytes()
        self._held += sum(leaf.nbytes for leaf in jax.tree.leaves(args) if isinstance(leaf, np.ndarray))
        now = time.monotonic()
        self._look_at = now + (now - start) / _LOOKING


class JaxGpu(JaxDevice):
    """A GPU under JAX.

    The allocator's own peak is only an upper bound of the training's: when XLA compiles convolutions, it tries them out
    in as much memory as there is (700 MiB for a step of 50, H200, JAX 0.11), and that peak cannot be reset.

    Raises:
        BudgetError: the environment has chosen an allocator that does not count.
    """

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        stats = self._stats()
        if "peak_bytes_in_use" not in stats:
            raise BudgetError(
                f"JAX's allocator on {name} does not count the memory that it hands out.",
                "JAX's default allocator.",
                "remove XLA_PYTHON_CLIENT_ALLOCATOR from the environment.",
            )
        # JAX's limit is a share of the device, given in the environment. If the device's size was unknown, there is
        # none, and the peak is compared with the budget.
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
        buffers: dict[int, int] = {}
        for array in jax.live_arrays():
            if not array.is_deleted():
                own = array if len(array.devices()) == 1 else array.addressable_data(0)
                buffers[own.unsafe_buffer_pointer()] = own.nbytes
        return sum(buffers.values())


def open_device(budget_bytes: int | None) -> Device:
    """Opens the first device of this process: a CPU, a GPU, or another kind under its own name, such as TPU:0."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return JaxCpu("CPU:0", budget_bytes)
    kind = "GPU" if device.platform in ("gpu", "cuda", "rocm") else device.platform.upper()
    return JaxGpu(f"{kind}:0 {device.device_kind}", budget_bytes)
