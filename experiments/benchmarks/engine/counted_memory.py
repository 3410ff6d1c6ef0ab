"""Counts the peak memory of a process that trains, in requested bytes: the resident set has much more.

- TensorFlow, and any GPU: the peak that the allocator counts. On a CPU, TensorFlow's order of operations differs from
  process to process, and with it the peak; with `is_ordered` it has one order, as where a search measures.
- JAX on a CPU, whose allocator counts nothing: XLA plans the memory of a compiled function before it runs. At each
  call: the arrays that are alive and, by the plan, temporary values and results that do not reuse an argument's memory;
  the maximum over all calls.
- torch on a CPU: its profiler records every allocation and release; the highest sum.

None of these includes short-lived buffers of libraries (a convolution's packed operands).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np


def counting(is_ordered: bool = False) -> contextlib.AbstractContextManager[Callable[[], int]]:
    """While open, memory is counted; a call of what it gives is the peak so far, and ends the count.

    Args:
        is_ordered: whether TensorFlow runs its operations in one order; it must not have run any before.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow" and is_ordered:
        from accumtune.memory.device_tensorflow import open_device

        return contextlib.nullcontext(open_device(None).peak_memory_bytes)
    if backend == "tensorflow":
        return contextlib.nullcontext(_tensorflow_allocator)
    if backend == "jax":
        import jax

        counts = jax.local_devices()[0].memory_stats() is not None
        return contextlib.nullcontext(_jax_allocator) if counts else _planned_by_xla()
    import torch

    return contextlib.nullcontext(torch.cuda.max_memory_allocated) if torch.cuda.is_available() else _profiled_torch()


def _tensorflow_allocator() -> int:
    import tensorflow as tf

    device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    return tf.config.experimental.get_memory_info(device)["peak"]


def _jax_allocator() -> int:
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


@contextlib.contextmanager
def _planned_by_xla() -> Iterator[Callable[[], int]]:
    """Notes the memory of every function that is jitted inside the `with` block."""
    import jax
    from keras.src.backend.jax import trainer

    peaks = [0]
    own = jax.jit
    for module in (jax, trainer):  # Keras took it when it was imported
        module.jit = lambda function, **options: _Jitted(own(function, **options), peaks)
    try:
        yield lambda: max(peaks)
    finally:
        jax.jit = trainer.jit = own


class _Jitted:
    """A jitted function that notes the memory of each of its calls.

    Args:
        function: what `jax.jit` gave.
        peaks: where a call's bytes are put.
    """

    def __init__(self, function: Any, peaks: list[int]) -> None:
        self._function, self._peaks = function, peaks
        self._compiled: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __call__(self, *args: Any) -> Any:
        import jax

        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):  # a part of another function
            return self._function(*args)
        kinds = tuple((getattr(leaf, "shape", ()), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
        if (structure, kinds) not in self._compiled:
            self._compiled[structure, kinds] = self._function.lower(*args).compile()
        compiled = self._compiled[structure, kinds]
        plan = compiled.memory_analysis()
        new = plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
        fed = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, np.ndarray))
        self._peaks.append(alive_arrays() + fed + new)
        return jax.block_until_ready(compiled(*args))


def alive_arrays() -> int:
    """The bytes of JAX's arrays."""
    import jax

    alive = [array for array in jax.live_arrays() if not array.is_deleted()]
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in alive}.values())


@contextlib.contextmanager
def _profiled_torch() -> Iterator[Callable[[], int]]:
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    profiler.start()

    def peak() -> int:
        profiler.stop()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    yield peak
