"""Measures the cost of a loss over the whole effective batch: time per sample and peak memory of its two passes.

    python experiments/benchmarks/engine/whole_batch_loss.py --backends tensorflow jax torch --workloads mlp cnn

Ways to train at the same effective batch, each in a process of its own, which take turns:

- two: `accumulate(model, m, whole_batch_loss=True)`;
- one: `accumulate(model, m, whole_batch_loss=False)`;
- full: plain Keras at the effective batch;
- floor: for each micro-batch a forward pass, then a forward and backward pass whose gradients are added to sums in
  place; one update; nothing else.

Freed memory stays with the process (`KEEP_MEMORY`), as the allocators of GPUs and TensorFlow's have it: zeroing new
pages would cost each way another part of its time.

The loss is the same everywhere, and couples no samples: what it takes itself would hide what the passes take. Times are
medians over the rounds, of the CPU (`--clock`), windows are the batches of one epoch, and ratios compare neighbours in
time. Peaks are counted as in `accumulation.py`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import MIB, Table, child_environment, keep, parser

WAYS = ("two", "one", "full", "floor")
BACKENDS = ("tensorflow", "jax", "torch")
WORKLOADS = ("mlp", "cnn", "transformer", "mobilenet", "lstm")
PEAK_WINDOWS = 3
# For glibc.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def run_child(way: str, workload: str, clock: str) -> None:
    """Reads numbers of windows, and answers with seconds per window and the peak in bytes."""
    import counted_memory
    import ways

    counting = counted_memory.counting() if clock == "none" else contextlib.nullcontext(lambda: 0)
    with counting as peak:
        train = (floor if way == "floor" else fit)(way, workload, ways.CLOCKS[clock])
        for line in sys.stdin:
            times = train(int(line))
            print(json.dumps([(times[-1] - times[0]) / max(len(times) - 1, 1), peak()]), flush=True)


def fit(way: str, workload: str, clock: Callable[[], float]) -> Callable[[int], list[float]]:
    import ways

    import accumtune

    micro, steps = ways.WORKLOADS[workload]
    model = made(workload)
    x, y = ways.data(model, micro * steps)
    if way != "full":
        accumtune.accumulate(model, micro_batch_size=micro, whole_batch_loss=way == "two")

    def train(windows: int) -> list[float]:
        ends = ways.WindowClock(1, clock)
        given = ways.source(x, y, micro * steps, "keras" if way == "full" else "ours", windows)
        model.fit(**given, shuffle=False, verbose=0, callbacks=[ends])
        return ends.times

    return train


def floor(way: str, workload: str, clock: Callable[[], float]) -> Callable[[int], list[float]]:
    import keras
    import ways

    micro, steps = ways.WORKLOADS[workload]
    model = made(workload)
    x, y = ways.data(model, micro)
    passes = {"tensorflow": tensorflow_floor, "jax": jax_floor, "torch": torch_floor}
    forward, backward, update = passes[keras.backend.backend()](model, x, y)

    def train(windows: int) -> list[float]:
        times = []
        for _ in range(windows):
            for _ in range(steps):
                forward()
            for step in range(steps):
                backward(step == 0)
            update()
            times.append(clock())
        return times

    return train


def made(workload: str) -> Any:
    import keras
    import ways

    keras.utils.set_random_seed(0)
    model = ways.build(workload)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=keras.backend.backend() == "jax")
    return model


# The floors: a forward pass; a forward and backward pass that adds to sums where they are; an update, waited for


def tensorflow_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    weights = model.trainable_weights
    model.optimizer.build(weights)
    sums = [tf.Variable(tf.zeros(weight.shape)) for weight in weights]

    def backward(is_first: bool) -> None:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        for total, gradient in zip(sums, tape.gradient(loss, weights), strict=True):
            (total.assign if is_first else total.assign_add)(tf.convert_to_tensor(gradient))

    def update() -> None:
        model.optimizer.apply_gradients(zip(sums, weights, strict=True))

    apply = tf.function(update)
    return (
        tf.function(lambda: model(x, training=True)),
        tf.function(backward),
        lambda: (apply(), model.optimizer.iterations.numpy()),
    )


def jax_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import jax

    model._symbolic_build(data_batch=(x, y, None))
    state = [variable.value for variable in model.non_trainable_variables]
    trainable, optimizer = ([v.value for v in part] for part in (model.trainable_variables, model.optimizer.variables))
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        variable._value = None
    values, sums = [trainable, optimizer], list[Any]()

    def loss(trainable: Any, state: Any, x: Any, y: Any) -> Any:
        prediction, state = model.stateless_call(trainable, state, x, training=True)
        return model._compile_loss(y, prediction), state

    def gradients(trainable: Any, state: Any, x: Any, y: Any) -> Any:
        return jax.grad(loss, has_aux=True)(trainable, state, x, y)[0]

    def added(sums: Any, trainable: Any, state: Any, x: Any, y: Any) -> Any:
        return [total + one for total, one in zip(sums, gradients(trainable, state, x, y), strict=True)]

    call = jax.jit(lambda trainable, state, x: model.stateless_call(trainable, state, x, training=True))
    first, further = jax.jit(gradients), jax.jit(added, donate_argnums=(0,))
    apply = jax.jit(
        lambda trainable, optimizer, sums: model.optimizer.stateless_apply(optimizer, sums, trainable),
        donate_argnums=(0, 1, 2),
    )

    def backward(is_first: bool) -> None:
        data = (values[0], state, x, y)
        sums[:] = jax.block_until_ready(first(*data) if is_first else further(sums, *data))

    def update() -> None:
        values[:] = jax.block_until_ready(apply(*values, sums))

    return lambda: jax.block_until_ready(call(values[0], state, x)), backward, update


def torch_floor(model: Any, x: Any, y: Any) -> tuple[Callable[..., Any], ...]:
    import keras
    import torch

    from accumtune.accumulation import optimizers
    from accumtune.accumulation.engines import grouped_update

    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    weights = model.trainable_weights
    model.optimizer.build(weights)

    def forward() -> Any:
        with torch.no_grad():
            return model(x, training=True)

    def backward(is_first: bool) -> None:
        if is_first:
            model.zero_grad()
        model.compute_loss(x, y, model(x, training=True)).backward()  # `.grad` is the sum

    def update() -> None:
        # As accumtune has it: Keras's update of all variables at once takes half as long again.
        with torch.no_grad(), grouped_update.updating_in_groups(optimizers.updating(model.optimizer)):
            model.optimizer.apply([weight.value.grad for weight in weights], weights)

    return forward, backward, update


class Child:
    """A process that trains in one way whenever it is asked to."""

    def __init__(self, backend: str, way: str, workload: str, clock: str) -> None:
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", way, workload, clock],
            env=child_environment(KERAS_BACKEND=backend, TF_CPU_ALLOCATOR_USE_BFC="true", **KEEP_MEMORY),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def train(self, windows: int) -> tuple[float, int]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{windows}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise SystemExit("".join(self.log.readlines()[-8:]))
        seconds, peak = json.loads(answer)
        return seconds, peak

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measured(backend: str, workload: str, rounds: int, windows: int, clock: str) -> dict[str, Any]:
    """One row of the table."""
    children = {way: Child(backend, way, workload, clock) for way in WAYS}
    try:
        for child in children.values():
            child.train(2)  # compiles
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                seconds[way].append(children[way].train(windows)[0])
    finally:
        for child in children.values():
            child.end()
    peaks = {}
    for way in WAYS[:3]:
        child = Child(backend, way, workload, "none")
        peaks[way] = child.train(PEAK_WINDOWS)[1]
        child.end()
    return {
        "backend": backend,
        "workload": workload,
        "seconds_per_window": {way: statistics.median(times) for way, times in seconds.items()},
        "time_to": {
            way: statistics.median(two / other for two, other in zip(seconds["two"], seconds[way], strict=True))
            for way in WAYS[1:]
        },
        "peak_bytes": peaks,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, str(Path(__file__).parent))
        run_child(*sys.argv[2:])
        return
    options = parser(__doc__)
    options.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    options.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--windows", type=int, default=4, help="windows per round; the first is not timed")
    options.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: seconds of all threads")
    arguments = options.parse_args()
    columns = {"backend": "<10", "workload": "<11"}
    columns |= {f"{way} ms": ">9.1f" for way in WAYS}
    columns |= {f"to {way}": ">8.2f" for way in WAYS[1:]}
    columns |= {f"{way} MiB": ">9.0f" for way in WAYS[:3]}
    table = Table(columns)
    table.print_header()
    rows = []
    for backend in arguments.backends:
        for workload in arguments.workloads:
            row = measured(backend, workload, arguments.rounds, arguments.windows, arguments.clock)
            rows.append(row)
            table.print_row(
                backend,
                workload,
                *(row["seconds_per_window"][way] * 1000 for way in WAYS),
                *(row["time_to"][way] for way in WAYS[1:]),
                *(row["peak_bytes"][way] / MIB for way in WAYS[:3]),
            )
    for way in WAYS[1:]:
        print(f"time of two passes to {way}, median: {statistics.median(row['time_to'][way] for row in rows):.2f}")
    keep(arguments.json, rows)


if __name__ == "__main__":
    main()
