"""Measures how busy `fit` keeps a device: samples per second of accumulating training to Keras's own `fit`.

    python experiments/benchmarks/engine/feeding.py [--backends tensorflow jax torch] [--rounds 5] [--json PATH]

Keras's own trains on batches of the micro-batch, without accumulation: what it reads and computes per sample is the
same, and it updates more often. So 1 is the limit for what feeding a window may cost.

Data, 64 samples per micro-batch, 4 micro-batches per update, shuffled:

- arrays: NumPy arrays given to `fit`;
- PyDataset: a `keras.utils.PyDataset`, whose items are effective batches for accumtune and micro-batches for Keras;
- tf.data: a `tf.data.Dataset`, likewise, that gathers rows and reads one batch ahead.

Models:

- pictures: 224 x 224 x 3 floats, and a network that computes less than reading them takes;
- convolutions: 32 x 32 x 3 floats, and a network that computes much more;
- waiting: the pictures, and a step that waits `--wait` seconds and computes nothing, as a host sees a device that
  computes so long: it shows whether rows are read meanwhile, whatever else the CPUs do.

Each backend runs in a process of its own, with one thread for each operation, so that a CPU is left for reading. Both
ways train alternately in it, one epoch each per round. Time is taken by the wall clock inside `fit`, from the end of
the first update to the end of the last one, with its logs on the host; the table has medians, and the least and the
most of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Table, child_environment, keep, parser

BACKENDS = ("tensorflow", "jax", "torch")
KINDS = ("arrays", "PyDataset", "tf.data")
MODELS = ("pictures", "convolutions", "waiting")
MICRO, STEPS = 64, 4
ONE_THREAD = {
    "TF_NUM_INTRAOP_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
TABLE = Table({
    "backend": "<10", "model": "<12", "data": "<9", "ours/s": ">9,.0f", "Keras/s": ">9,.0f",
    "speed": ">6.2f", "least": ">6.2f", "most": ">6.2f",
})  # fmt: skip


def waiting_layer(seconds: float) -> Any:
    """A layer that waits, as a device would, and adds nothing to its input."""
    import keras
    import numpy as np

    backend = keras.backend.backend()

    def waited(x: Any) -> Any:
        time.sleep(seconds)
        return np.zeros(x.shape, "float32")

    class Waiting(keras.layers.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            if not training:
                return x
            if backend == "tensorflow":
                import tensorflow as tf

                zeros = tf.numpy_function(waited, [x], tf.float32)
                zeros.set_shape(x.shape)
                return x + zeros
            if backend == "jax":
                import jax

                return x + jax.pure_callback(waited, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
            time.sleep(seconds)
            return x

    return Waiting()


def built(name: str, wait: float) -> Any:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    if name == "convolutions":
        body = []
        for width in (32, 64, 128):
            body += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        model = keras.Sequential([keras.Input((32, 32, 3)), *body, layers.Flatten(), layers.Dense(10)])
    else:
        body = [layers.AveragePooling2D(56), layers.Flatten()]
        if name == "waiting":
            body = [layers.Cropping2D(((0, 223), (0, 223))), layers.Flatten(), waiting_layer(wait)]
        model = keras.Sequential([keras.Input((224, 224, 3)), *body, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=keras.backend.backend() == "jax")
    return model


@functools.cache
def arrays(model: str) -> tuple[Any, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    shape, windows = ((32, 32, 3), 4) if model == "convolutions" else ((224, 224, 3), 4)
    samples = MICRO * STEPS * windows
    return random.random((samples, *shape), "float32"), random.integers(0, 10, samples)


def data(model: str, kind: str, size: int) -> dict[str, Any]:
    """Arguments of `fit`."""
    import keras
    import numpy as np

    x, y = arrays(model)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": size}
    order = np.random.default_rng(1).permutation(len(x))
    if kind == "PyDataset":

        class Gathered(keras.utils.PyDataset):
            def __len__(self) -> int:
                return len(x) // size

            def __getitem__(self, index: int) -> tuple[Any, Any]:
                rows = order[index * size : (index + 1) * size]
                return x[rows], y[rows]

        return {"x": Gathered()}
    import tensorflow as tf

    def gathered(rows: Any) -> tuple[Any, Any]:
        taken, labels = tf.numpy_function(lambda rows: (x[rows], y[rows]), [rows], [tf.float32, tf.int64])
        return tf.ensure_shape(taken, (size, *x.shape[1:])), tf.ensure_shape(labels, (size,))

    rows = tf.data.Dataset.from_tensor_slices(order).batch(size, drop_remainder=True)
    return {"x": rows.map(gathered).prefetch(1)}


def fit(model: Any, given: dict[str, Any], updates_apart: int) -> float:
    """Trains an epoch; returns the seconds of all windows but the first."""
    import keras

    ends: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch + 1 in (updates_apart, self.params["steps"]):
                float(logs["loss"])
                ends.append(time.perf_counter())

    model.fit(**given, epochs=1, verbose=0, callbacks=[Clock()])
    return ends[-1] - ends[0]


def measure(name: str, kind: str, rounds: int, wait: float) -> dict[str, Any]:
    import accumtune

    ours = accumtune.accumulate(built(name, wait), micro_batch_size=MICRO)
    trainings = [(ours, data(name, kind, MICRO * STEPS), 1), (built(name, wait), data(name, kind, MICRO), STEPS)]
    for training in trainings:  # compiles
        fit(*training)
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        for index in (0, 1) if turn % 2 else (1, 0):
            seconds[index].append(fit(*trainings[index]))
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
    samples = len(arrays(name)[0]) - MICRO * STEPS
    per_second = [samples / statistics.median(times) for times in seconds]
    return {"per_second": per_second, "speed": statistics.median(ratios), "ratios": ratios}


def measure_in_process(backend: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--one", backend, "--rounds", str(arguments.rounds), "--wait"]
    command += [str(arguments.wait), "--models", *arguments.models, "--kinds", *arguments.kinds]
    environment = child_environment(KERAS_BACKEND=backend, **ONE_THREAD)
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            rows.append({"backend": backend, **row})
            ratios = row["ratios"]
            figures = (*row["per_second"], row["speed"], min(ratios), max(ratios))
            TABLE.print_row(backend, row["model"], row["kind"], *figures)
    if process.returncode:
        raise SystemExit(f"The process of {backend} ended with {process.returncode}.")
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--wait", type=float, default=0.05, metavar="SECONDS")
    options.add_argument("--one", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        for model in arguments.models:
            for kind in arguments.kinds:
                row = measure(model, kind, arguments.rounds, arguments.wait)
                print(json.dumps({"model": model, "kind": kind, **row}), flush=True)
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs; a waiting step takes {arguments.wait * 1e3:.0f} ms")
    TABLE.print_header()
    rows = [row for backend in arguments.backends for row in measure_in_process(backend, arguments)]
    keep(arguments.json, {"load": os.getloadavg(), "wait_seconds": arguments.wait, "rows": rows})


if __name__ == "__main__":
    main()
