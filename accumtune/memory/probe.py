"""Runs a few real updates of an accumulating model and measures them, inside a child process of its own."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from accumtune.accumulation.data.array_datasets import (
    batch_source,
    takes_batch_source,
    training_arguments,
    validation_source,
)
from accumtune.accumulation.own_step.own_train_step import can_be_evaluated
from accumtune.memory.compilation import PeakWithoutCompiling
from accumtune.memory.cpu_simulation import Trace
from accumtune.memory.device import Device, Recorder, is_out_of_memory
from accumtune.memory.memory_watch import watched
from accumtune.memory.prediction.measurement import Measurement

Batches = Callable[[int], tuple[Any, Any, Any]]

# The peak of an update varies by a few percent from one update to the next, with the order of operations and the gaps
# that the allocator finds. The largest of about this many micro-steps is steady.
STEADY_MICRO_STEPS = 8
# Once this much time has passed, no more updates run than were asked for.
PATIENCE_SECONDS = 3.0
# Updates without an accumulator and with one: a trace needs both to predict other sizes.
TRACED_STEPS = frozenset({1, 2})
# How far a trace's peak may be from the measured one: it lacks the little that was held before the recording.
TRACE_TOLERANCE = 0.02


def probe(
    model: Any,
    batches: Batches,
    *,
    micro_batch_size: int,
    accumulation_steps: Sequence[int] = (1, 2, 4),
    ghost_batch_size: int | None = None,
    updates: int = 3,
    is_pipeline: bool = False,
    validation_batch_size: int | None = None,
    device: Device,
    on_out_of_memory: Callable[[list[Measurement]], None] | None = None,
    recorder: Recorder | None = None,
) -> list[Measurement]:
    """Trains and validates a few updates at one micro-batch size, and measures each number of accumulation steps.

    The model ends up trained on these few batches: build another one for training.

    Args:
        model: a compiled Keras model.
        batches: gives `count` samples as `(x, y, sample_weight)`, arrays or structures of them.
        micro_batch_size: samples per micro-step.
        accumulation_steps: micro-steps per update; each number is measured on its own, in rising order.
        ghost_batch_size: as training will have it; a micro-batch that would divide it is measured without.
        updates: how many updates are timed at least. One more runs before them, for tracing and compilation.
        is_pipeline: whether training will get its data as batches, all of a window at once, or as arrays.
        validation_batch_size: the samples of a batch of validation; None: those of a micro-batch.
        device: the opened device, limited or not.
        on_out_of_memory: called with the measurements so far, as soon as TensorFlow waits for memory (instead of after
            its 10 s), or a backend without limits exceeds the budget. It is called in another thread and must end the
            process.
        recorder: recording since the device was opened. Then as many updates are made as are asked for, so that the
            traces of all sizes are alike.

    Returns:
        One measurement per number of accumulation steps. When memory runs out, that measurement has no peak and
        is the last.
    """
    from accumtune.accumulation import accumulate

    def measure(
        steps: int, peak_memory_bytes: int | None, seconds: float | None, compile_peak_bytes: int | None = None
    ) -> Measurement:
        return Measurement(
            micro_batch_size,
            steps,
            peak_memory_bytes,
            seconds,
            device.memory_source,
            device.budget_bytes,
            compile_peak_bytes,
        )

    ghost = None if ghost_batch_size is None or micro_batch_size % ghost_batch_size else ghost_batch_size
    model = accumulate(model, micro_batch_size=micro_batch_size, ghost_batch_size=ghost)
    measurements: list[Measurement] = []
    for steps in sorted(set(accumulation_steps)):
        device.reset_peak()
        peak_of_steps = PeakWithoutCompiling(device)
        mark = functools.partial(recorder.phase, steps) if recorder is not None else None
        end = None
        if on_out_of_memory is not None:
            end = functools.partial(on_out_of_memory, [*measurements, measure(steps, None, None)])
        try:
            seconds = _train(
                model, batches, micro_batch_size, steps, updates, is_pipeline,
                validation_batch_size or micro_batch_size, mark, peak_of_steps.callbacks(),
                contextlib.nullcontext() if end is None else watched(device, end, may_wait=False),
            )  # fmt: skip
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            measurements.append(measure(steps, None, None))
            break
        peak = peak_of_steps.peak_bytes()
        if recorder is not None:
            recorder.phase(0)
        if device.budget_bytes is not None and peak > device.budget_bytes:  # a backend without limits
            measurements.append(measure(steps, None, None))
            break
        measurements.append(measure(steps, peak, seconds, peak_of_steps.compile_peak_bytes))
        gc.collect()
    return measurements


def trace_of(recorder: Recorder | None, measurements: Sequence[Measurement]) -> Trace | None:
    """Ends a probe's recording and returns it, if the simulated allocator gives the measured peaks for it."""
    if recorder is None:
        return None
    trace = recorder.finished(measurements[0].micro_batch_size)
    if trace is None or not trace.events:  # this TensorFlow's profiler does not record allocations
        return None
    peaks = trace.peaks(trace.requests, measurements[0].memory_limit_bytes)
    if peaks is None or not TRACED_STEPS <= peaks.keys():
        return None
    for measurement in measurements:
        measured, played = measurement.peak_memory_bytes, peaks.get(measurement.accumulation_steps)
        if measured is None or played is None or abs(played - measured) > TRACE_TOLERANCE * measured:
            return None
    return trace


def _train(
    model: Any,
    batches: Batches,
    micro_batch_size: int,
    steps: int,
    updates: int,
    is_pipeline: bool,
    validation_batch_size: int,
    mark: Callable[[], None] | None,
    others: Sequence[Any],
    watch: AbstractContextManager[None],
) -> float:
    """Trains one update per epoch, all on the same window of data. Returns the median seconds per update."""
    if mark is not None:
        mark()
    window_size = micro_batch_size * steps
    window = batches(window_size)
    clock = _update_clock(updates, mark)
    is_pipeline = is_pipeline and takes_batch_source(model)
    data = (
        {"x": batch_source(*window, batch_size=window_size), "shuffle": False}
        if is_pipeline
        else training_arguments(model, *window, batch_size=window_size)
    )
    validation = None
    if can_be_evaluated(model):  # as trials do, while the training data stay in memory
        held_out = batches(validation_batch_size)
        validation = (
            batch_source(*held_out, batch_size=validation_batch_size)
            if is_pipeline
            else validation_source(model, *held_out, batch_size=validation_batch_size)
        )
    with watch:
        model.fit(
            **data,
            epochs=1 + (max(updates, -(-STEADY_MICRO_STEPS // steps)) if mark is None else updates),
            validation_data=validation,
            validation_freq=[1, 2] if others else [1],  # the first validation compiles
            callbacks=[clock, *others],
            verbose=0,
        )
    timed: list[float] = sorted(clock.seconds[1:])
    return timed[len(timed) // 2]


def _update_clock(updates: int, mark: Callable[[], None] | None) -> Any:
    import keras

    class UpdateClock(keras.callbacks.Callback):
        """Times each update, and marks its begin and end. Keras waits for an update's logs before it ends one."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []
            self._started = 0.0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if mark is not None:
                mark()
            self._started = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seconds.append(time.perf_counter() - self._started)
            if mark is not None:
                mark()
            timed = self.seconds[1:]
            if len(timed) >= updates and sum(timed) > PATIENCE_SECONDS:
                self.model.stop_training = True

    return UpdateClock()
