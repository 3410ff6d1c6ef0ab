"""What exact accumulation costs: throughput and peak memory beside Keras's own accumulation and two limits.

    python experiments/benchmarks/accumulation.py [--quick] [--backends tensorflow jax torch] [--json PATH]

Four ways to train at the same effective batch, each in a process of its own:

- ours: `accumulate(model, m)`, fit with the effective batch;
- keras: `gradient_accumulation_steps=k`, fit with batches of m;
- full: plain Keras, fit with the effective batch;
- limit: k forward and backward passes of one micro-batch and one update, without input pipeline and sums.

The processes of a configuration wait for each other and take turns, so that a ratio compares neighbours in time;
the table has medians over the rounds. Peak memory is the allocator's on TensorFlow (BFC on a CPU too) and on GPUs,
and the growth of the resident set for JAX and torch on a CPU. The floor is parameters + slots + one accumulator +
what the forward and backward pass of one micro-batch needs; the peak of `limit` (all gradients of one micro-batch
at once, no sums) is near it.

What designs gave on TensorFlow, CPU (throughput against Keras's own): a `tf.while_loop` over micro-batches 0.65
(CNN) and never ending with XLA; separate calls with zeroed accumulators and a divided copy at the update 0.99 (MLP),
1.12 of Keras's peak memory. Here: first and further micro-steps and the update compiled apart, sums in place; the
updates of the variables one after the other took the MLP's peak from 331 to 286 MiB (Keras's own: 301). Seconds of
all threads (`--clock cpu`), 2 busy cores; ours to Keras's own in speed and in peak memory:

    tensorflow      mlp 1.08 0.91, cnn 1.03 1.10, transformer 1.00 0.90, mobilenet 1.03 0.98, lstm 1.21 0.86
    tensorflow+xla  mlp 1.91 0.68, cnn 1.06 1.06
    jax             mlp 3.04 0.93, cnn 1.02 0.80
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAYS = ("ours", "keras", "full", "limit")
# name: micro-batch size, accumulation steps, windows per round
WORKLOADS = {
    "mlp": (32, 8, 4),
    "cnn": (32, 8, 3),
    "transformer": (8, 8, 4),
    "mobilenet": (8, 4, 3),
    "lstm": (16, 8, 4),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
QUICK = ("mlp", "cnn")


# In the child: models and their data


def build(workload: str):
    import keras
    from keras import layers

    if workload == "mlp":
        hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
        return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])
    if workload == "cnn":
        convolutions = []
        for width in (32, 64, 128, 256):
            convolutions += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        tail = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
        return keras.Sequential([keras.Input((32, 32, 3)), *convolutions, *tail])
    if workload == "transformer":
        inputs = keras.Input((128,), dtype="int32")
        x = layers.Embedding(8000, 256)(inputs)
        for _ in range(3):
            x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 64)(x, x))
            x = layers.LayerNormalization()(x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(x)))
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))
    if workload == "mobilenet":
        return keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10, classifier_activation=None)
    inputs = keras.Input((64,), dtype="int32")
    x = layers.LSTM(128)(layers.Embedding(8000, 128)(inputs))
    return keras.Model(inputs, layers.Dense(10)(x))


def data(model, samples: int):
    import numpy as np

    generator = np.random.default_rng(0)
    shape = (samples, *model.input_shape[1:])
    is_tokens = "int" in str(model.inputs[0].dtype)
    x = generator.integers(1, 8000, shape, "int32") if is_tokens else generator.normal(size=shape).astype("float32")
    return x, generator.integers(0, 10, samples, "int32")


def trainer(way: str, workload: str, jit: bool):
    """A function that trains `windows` windows, and how many samples a window has."""
    import keras

    import accumtune.accumulation as accumulation

    micro, steps, _ = WORKLOADS[workload]
    keras.utils.set_random_seed(0)
    model = build(workload)
    optimizer = keras.optimizers.Adam(1e-4, gradient_accumulation_steps=steps if way == "keras" else None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit)
    if way == "limit":
        return limit(model, *data(model, micro), steps, jit)
    if way == "ours":
        accumulation.accumulate(model, micro)
    size = micro if way == "keras" else micro * steps
    x, y = data(model, micro * steps)

    class Window(keras.utils.PyDataset):
        """The same window again and again, read from outside the device as a trial reads its memory maps."""

        def __len__(self) -> int:
            return self.batches

        def __getitem__(self, index: int):
            start = index * size % len(x)
            return x[start : start + size], y[start : start + size]

    def run(windows: int) -> None:
        dataset = Window()
        dataset.batches = windows * micro * steps // size
        model.fit(dataset, verbose=0, shuffle=False)

    return run


def limit(model, x, y, steps: int, jit: bool):
    import keras

    return {"tensorflow": tensorflow_limit, "jax": jax_limit, "torch": torch_limit}[keras.backend.backend()](
        model, x, y, steps, jit
    )


def tensorflow_limit(model, x, y, steps: int, jit: bool):
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    model.optimizer.build(model.trainable_variables)

    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        return [tf.convert_to_tensor(value) for value in tape.gradient(loss, model.trainable_weights)]

    def update(x, y):
        model.optimizer.apply_gradients(zip(gradients(x, y), model.trainable_weights, strict=True))

    gradients_only = tf.function(gradients, jit_compile=jit)
    update = tf.function(update, jit_compile=jit)

    def run(windows: int) -> None:
        for _ in range(windows):
            for _ in range(steps - 1):
                gradients_only(x, y)
            update(x, y)
        model.optimizer.iterations.numpy()

    return run


def jax_limit(model, x, y, steps: int, jit: bool):
    import jax

    model._symbolic_build(data_batch=(x, y, None))

    def loss(trainable, state, x, y):
        prediction, state = model.stateless_call(trainable, state, x, training=True)
        return model._compile_loss(y, prediction), state

    def gradients(trainable, state, x, y):
        return jax.value_and_grad(loss, has_aux=True)(trainable, state, x, y)[1]

    def update(trainable, optimizer, state, x, y):
        return model.optimizer.stateless_apply(optimizer, gradients(trainable, state, x, y), trainable)

    gradients_only, update = jax.jit(gradients), jax.jit(update, donate_argnums=(0, 1))
    values = [[v.value for v in part] for part in (model.trainable_variables, model.optimizer.variables)]
    state = [v.value for v in model.non_trainable_variables]
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        variable._value = None

    def run(windows: int) -> None:
        for _ in range(windows):
            for _ in range(steps - 1):
                jax.block_until_ready(gradients_only(values[0], state, x, y))
            values[:] = update(*values, state, x, y)
        jax.block_until_ready(values)

    return run


def torch_limit(model, x, y, steps: int, jit: bool):
    import keras
    import torch

    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    model.optimizer.build(model.trainable_variables)

    def run(windows: int) -> None:
        for _ in range(windows):
            for _ in range(steps):
                model.zero_grad()
                model.compute_loss(x, y, model(x, training=True)).backward()
            weights = model.trainable_weights
            with torch.no_grad():
                model.optimizer.apply([weight.value.grad for weight in weights], weights)

    return run


# In the child: memory, and taking turns


def peak_bytes(base: int) -> int:
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
        return tf.config.experimental.get_memory_info(device)["peak"]
    if backend == "jax":
        import jax

        measured = jax.local_devices()[0].memory_stats()  # None on a CPU
        if measured:
            return measured["peak_bytes_in_use"]
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - base


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def child(way: str, workload: str, jit: bool, clock: Callable[[], float]) -> None:
    """Reads the number of windows from each line, writes the seconds they took and the peak so far."""
    import keras  # noqa: F401 - so that the framework is not counted as memory

    base = resident("VmRSS")
    run = trainer(way, workload, jit)
    for line in sys.stdin:
        start = clock()
        run(int(line))
        print(json.dumps([clock() - start, peak_bytes(base)]), flush=True)


# In the parent


def measure(backend: str, jit: bool, workload: str, rounds: int, clock: str) -> dict:
    micro, steps, windows = WORKLOADS[workload]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "TF_CPU_ALLOCATOR_USE_BFC": "true",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    children = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--child", way, workload, str(int(jit)), "--clock", clock]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        children[way] = subprocess.Popen(command, env=environment, text=True, **pipes)

    def ask(way: str, number: int) -> tuple[float, int]:
        process = children[way]
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{way} on {workload} ({backend}) ended with {process.wait()}.")
        return tuple(json.loads(answer))

    try:
        for way in WAYS:
            ask(way, windows)  # compiles
        for _ in range(rounds):
            for way in WAYS:
                taken, peaks[way] = ask(way, windows)
                seconds[way].append(taken)
    finally:
        for process in children.values():
            process.kill()
            process.wait()
    ratio = {
        way: statistics.median(other / ours for ours, other in zip(seconds["ours"], seconds[way], strict=True))
        for way in WAYS
    }
    return {
        "backend": backend + ("+xla" if jit and backend == "tensorflow" else ""),
        "workload": f"{workload} {micro}x{steps}",
        "samples_per_second": {
            way: windows * micro * steps / statistics.median(times) for way, times in seconds.items()
        },
        "throughput_to": ratio,
        "peak_bytes": peaks,
    }


def print_row(row: dict) -> None:
    speed, ratio, peak = row["samples_per_second"], row["throughput_to"], row["peak_bytes"]
    speeds = " ".join(f"{speed[way]:8.0f}" for way in WAYS)
    peaks = " ".join(f"{peak[way] / 2**20:7.0f}" for way in WAYS)
    ratios = f"{ratio['keras']:6.2f} {ratio['limit']:6.2f} {peak['ours'] / max(peak['keras'], 1):6.2f}"
    print(f"{row['backend']:<15}{row['workload']:<17}{speeds}  {peaks}  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["tensorflow", "tensorflow+xla"])
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two workloads, two rounds")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of all threads, on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, workload, jit = arguments.child
        return child(way, workload, bool(int(jit)), CLOCKS[arguments.clock])
    workloads = arguments.workloads or (QUICK if arguments.quick else tuple(WORKLOADS))
    print(f"{'':32}{'samples per second':^35}  {'peak MiB':^31}  {'ours to keras':>13}")
    names = " ".join(f"{way:>8}" for way in WAYS) + "  " + " ".join(f"{way:>7}" for way in WAYS)
    print(f"{'backend':<15}{'workload':<17}{names}   speed  limit   peak")
    rows = []
    for name in arguments.backends:
        backend, _, xla = name.partition("+")
        for workload in workloads:
            rounds = 2 if arguments.quick else arguments.rounds
            rows.append(measure(backend, bool(xla) or backend == "jax", workload, rounds, arguments.clock))
            print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return None


if __name__ == "__main__":
    main()
