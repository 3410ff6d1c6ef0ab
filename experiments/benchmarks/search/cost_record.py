"""Trains the exhaustive grid of a task of `search_cost.py`, once, and writes its results.

    KERAS_HOME=... python experiments/benchmarks/search/cost_record.py fashion text

The grid's losses are those of plain Keras at the effective batch, which both ways of accumulation compute (one model
per batch and width, its weights restored between learning rates). Each micro-batch is then measured on both sides in a
process of its own, with TensorFlow's allocator limited: the peak, and CPU seconds of all threads, which depend less on
other work. The time of a trial beside its training, and of one that runs out of memory, is measured too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

from common import MIB
from cost_tasks import OURS, STOCK, TRAINED, Cost, Record, Trained

from accumtune.execution.executors import LocalExecutor, Outcome
from accumtune.memory.device import memory_limit_environment
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

TIMED_UPDATES = 6
# The largest model fits with this micro-batch, and just so.
FITTING_MICRO_BATCH = 32


def grid(task: Trained) -> dict[tuple[int, float, int], tuple[float, ...]]:
    import keras

    x, y, x_val, y_val = task.load()
    losses = {}
    for width, effective in itertools.product(task.space.widths, task.space.effective_batch_sizes):
        keras.utils.set_random_seed(0)
        model = task.build(task.space.learning_rates[0], width, None)
        weights = model.get_weights()
        for rate in task.space.learning_rates:
            keras.utils.set_random_seed(0)
            model.set_weights(weights)
            for variable in model.optimizer.variables:
                variable.assign(keras.ops.zeros_like(variable))
            model.optimizer.learning_rate = rate
            history = model.fit(
                x, y, batch_size=effective, epochs=task.epochs, validation_data=(x_val, y_val),
                validation_batch_size=256, verbose=0,
            )  # fmt: skip
            losses[effective, rate, width] = tuple(
                loss if math.isfinite(loss) else 1e9 for loss in history.history["val_loss"]
            )
        print(f"{task.name}: width {width}, effective batch {effective}", flush=True)
    return losses


def trained_briefly(name: str, side: str, width: int, micro: int, steps: int) -> dict[str, Any]:
    """In a process of its own: a few updates. Peak bytes, seconds per micro-step, and until the first had ended."""
    import keras

    from accumtune import accumulate
    from accumtune.memory.device import open_device

    device = open_device()
    task = TRAINED[name]
    x, y, *_ = task.load()
    began = time.process_time()
    model = task.build(1e-3, width, steps if side == STOCK and steps > 1 else None)
    size = micro * steps if side == OURS else micro
    if side == OURS:
        accumulate(model, micro)
    passes = max(TIMED_UPDATES * steps, 24)
    times: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])
            times.append(time.process_time())
            self.model.stop_training = len(times) * size >= passes * micro

    device.reset_peak()
    epochs = math.ceil(passes * micro / len(x))
    model.fit(x, y, batch_size=size, epochs=epochs, verbose=0, callbacks=[Clock()])
    ends = times if side == OURS else times[steps - 1 :: steps]
    per_update = (ends[-1] - ends[1]) / (len(ends) - 2)
    return {
        "peak_bytes": device.peak_memory_bytes(),
        "seconds": per_update / steps,
        "first_seconds": ends[0] - began,
    }


class Children:
    """Functions in processes of their own, forked from one that has TensorFlow."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.executor, self.number = folder, LocalExecutor("tensorflow"), 0

    def call(self, function: Any, *arguments: Any, limit_bytes: int | None = None) -> tuple[Outcome, float]:
        self.number += 1
        directory = TaskDirectory(self.folder / str(self.number))
        dump_payload({"function": function, "arguments": arguments}, directory.path / "data" / "payload.pkl")
        directory.write_task("call", {"payload": str(directory.path / "data" / "payload.pkl")})
        started = time.monotonic()
        outcome = self.executor.submit(
            directory, memory_limit_environment("tensorflow", limit_bytes), is_memory_limited=limit_bytes is not None
        ).result()
        return outcome, time.monotonic() - started


def costs(task: Trained, children: Children) -> tuple[dict[tuple[str, int, int], Cost], dict[str, float]]:
    found: dict[tuple[str, int, int], Cost] = {}
    first: dict[str, list[float]] = {OURS: [], STOCK: []}
    for width, micro, side in itertools.product(task.space.widths, task.space.micro_batch_sizes, (OURS, STOCK)):
        results = {}
        for steps in (1, 4):
            outcome, _ = children.call(trained_briefly, task.name, side, width, micro, steps)
            if not outcome.is_completed:
                raise SystemExit(f"{side}, {width}, {micro}, {steps}: {outcome.reason}\n{outcome.traceback}")
            results[steps] = outcome.result["value"]
            first[side].append(results[steps]["first_seconds"])
        seconds = tuple(results[steps]["seconds"] for steps in (1, 4))
        found[side, width, micro] = Cost(tuple(results[steps]["peak_bytes"] for steps in (1, 4)), seconds)
        print(f"{task.name}: {side}, width {width}, micro-batch {micro}: {found[side, width, micro]}", flush=True)
    return found, {side: sorted(values)[len(values) // 2] for side, values in first.items()}


def own_processes(task: Trained, budget: int, folder: Path) -> tuple[float, float]:
    """Seconds that accumtune's own processes take: to inspect a model, and to see that a size does not fit.

    The least of several: the machine is not ours alone.
    """
    width, micro = max(task.space.widths), max(task.space.micro_batch_sizes)
    builder = ModelBuilder(lambda hp: task.build(1e-3, width, None))
    x, y, *_ = task.load()
    payload = folder / "own" / "payload.pkl"
    dump_payload({"hypermodel": builder, "fit_args": (), "fit_kwargs": {"x": x, "y": y}}, payload)
    model = {"payload": str(payload), "hyperparameters": {"space": [], "values": {}}}
    probe = {"memory_budget_bytes": budget, "micro_batch_size": micro, "accumulation_steps": [1, 2]}

    def run(name: str, arguments: dict[str, Any], limit_bytes: int | None = None) -> tuple[Outcome, float]:
        directory = TaskDirectory(folder / f"{name}_{time.monotonic_ns()}")
        directory.write_task(name, model | arguments)
        started = time.monotonic()
        environment = memory_limit_environment("tensorflow", limit_bytes)
        outcome = executor.submit(directory, environment, is_memory_limited=limit_bytes is not None).result()
        if not outcome.is_completed:
            raise SystemExit(f"{task.name}: {name}: {outcome.reason}\n{outcome.traceback}")
        return outcome, time.monotonic() - started

    with LocalExecutor("tensorflow") as executor:
        run("inspect", {})  # the first starts the server that forks the others
        inspect_seconds = min(run("inspect", {})[1] for _ in range(5))
        probes = [run("probe", probe, budget) for _ in range(3)]
    if any(outcome.result["measurements"][0]["peak_memory_bytes"] is not None for outcome, _ in probes):
        raise SystemExit(f"{task.name}: micro-batch {micro} was to run out of memory")
    return inspect_seconds, min(seconds for _, seconds in probes)


def record(task: Trained) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        children = Children(Path(folder))
        try:
            found, starts = costs(task, children)
            largest = found[STOCK, max(task.space.widths), FITTING_MICRO_BATCH].peaks_bytes
            budget = math.ceil(max(largest) * 1.15 / MIB) * MIB
            outcome, seconds = children.call(
                trained_briefly, task.name, STOCK, max(task.space.widths), max(task.space.micro_batch_sizes), 4,
                limit_bytes=budget,
            )  # fmt: skip
            print(f"{task.name}: budget {budget / MIB:.0f} MiB, out of memory after {seconds:.1f} s: {outcome.status}")
            _, empty = children.call(str)
            inspect_seconds, probe_seconds = own_processes(task, budget, Path(folder))
        finally:
            children.executor.close()
    starts[OURS] += empty  # the process itself
    x, *_ = task.load()
    return Record(
        task.name, task.space, len(x), task.epochs, task.max_trials, budget, grid(task), found, starts, seconds,
        probe_seconds, inspect_seconds,
    )  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tasks", nargs="*", default=list(TRAINED), help=f"of {', '.join(TRAINED)}; default: all")
    for name in options.parse_args().tasks:
        record(TRAINED[name]).write()


if __name__ == "__main__":
    main()
