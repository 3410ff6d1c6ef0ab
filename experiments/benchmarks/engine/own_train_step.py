"""Measures the cost of a model's own `train_step`: one that does the same as Keras's, compared with Keras's.

    python experiments/benchmarks/engine/own_train_step.py [--json PATH] [--peaks] [--clock wall|cpu]
        [--backends tensorflow jax torch] [--models mlp cnn tiny] [--rounds 7] [--jit auto|true|false]

Two copies of a model train alternately in one process, an epoch of a few windows each: one with Keras's step, one whose
class overrides it with the same computation. A figure is the median ratio over the rounds, with its quartiles;
`certificate` is the time of the test before the first update, in seconds. `--clock cpu` adds up the seconds of all
threads, which depend less on other work. With `--peaks`, the memory of each is measured in a process of its own,
without that test, see `counted_memory.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Table, child_environment, keep, parser

# Shape of a sample, micro-batch, accumulation steps, windows of an epoch.
MODELS = {"mlp": ((1024,), 16, 8, 12), "cnn": ((32, 32, 3), 16, 4, 3), "tiny": ((16,), 8, 8, 24)}
WAYS = ("stock", "own")


def build(name: str, way: str, jit: str) -> Any:
    import keras

    class OwnStep(keras.Sequential):
        def train_step(self, *arguments: Any) -> Any:
            return super().train_step(*arguments)

    shape = MODELS[name][0]
    conv = keras.layers.Conv2D
    layers = {
        "mlp": [keras.layers.Dense(1024, "relu") for _ in range(3)],
        "cnn": [conv(32, 3, activation="relu"), conv(32, 3, 2, activation="relu"), keras.layers.Flatten()],
        "tiny": [keras.layers.Dense(16, "relu")],
    }[name]
    keras.utils.set_random_seed(0)
    model = (OwnStep if way == "own" else keras.Sequential)([keras.Input(shape), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse", jit_compile={"auto": "auto", "true": True, "false": False}[jit])
    return model


def data(name: str) -> tuple[Any, Any]:
    import numpy as np

    shape, micro, steps, windows = MODELS[name]
    x = np.random.default_rng(0).normal(size=(windows * micro * steps, *shape)).astype("float32")
    return x, x.reshape(len(x), -1)[:, :1]


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    import keras

    import accumtune
    from accumtune.accumulation.own_step.own_train_step import certify

    keras.config.disable_interactive_logging()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    _, micro, steps, _ = MODELS[name]
    x, y = data(name)
    models = {way: build(name, way, options.jit) for way in WAYS}
    started = clock()
    certify(models["own"], x[:16], y[:16])
    certificate = clock() - started

    def seconds(way: str) -> float:
        started = clock()
        models[way].fit(x, y, batch_size=micro * steps, verbose=0)
        return clock() - started

    for way, model in models.items():  # compiles
        accumtune.accumulate(model, micro)
        seconds(way)
    ratios, stock = [], []
    for _ in range(options.rounds):
        taken = {way: seconds(way) for way in random.sample(WAYS, 2)}
        ratios.append(taken["own"] / taken["stock"])
        stock.append(taken["stock"])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "stock_seconds": statistics.median(stock), "ratio": middle, "lower_quartile": low, "upper_quartile": high,
        "certificate_seconds": certificate,
    }  # fmt: skip


def peak_of(name: str, way: str, options: argparse.Namespace) -> dict[str, int]:
    """Bytes, of a process that does nothing else; the certificate is there already."""
    import keras
    from counted_memory import counting

    import accumtune
    from accumtune.accumulation.own_step import certificate
    from accumtune.accumulation.own_step.own_train_step import Certificate

    keras.config.disable_interactive_logging()
    _, micro, steps, _ = MODELS[name]
    x, y = data(name)
    with counting(is_ordered=True) as peak:
        model = build(name, way, options.jit)
        known = Certificate("mean", ("mean",), ("last",), (True,) * len(model.trainable_variables), True)
        certificate.certify = lambda *arguments: known
        accumtune.accumulate(model, micro)
        for _ in range(2):
            model.train_on_batch(x[: micro * steps], y[: micro * steps])
        return {"peak_bytes": peak()}


def in_a_process(backend: str, *arguments: str) -> Any:
    """What this script prints as JSON on a backend."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    environment = child_environment(KERAS_BACKEND=backend, TF_CPU_ALLOCATOR_USE_BFC="true")
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--jit", choices=("auto", "true", "false"), default="auto")
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments.add_argument("--peaks", action="store_true")
    arguments.add_argument("--time-of", help=argparse.SUPPRESS)
    arguments.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.time_of:
        return print(json.dumps(measure(options.time_of, options)))
    if options.peak_of:
        return print(json.dumps(peak_of(*options.peak_of, options)))

    columns = {"backend": "<10", "model": "<5", "stock s": ">8.3f", "own/stock": ">9.3f", "quartile": ">8.3f"}
    table = Table({**columns, "upper": ">6.3f", "certificate s": ">13.2f", "peak": ">6.3f", "bytes more": ">10d"})
    table.print_header()
    rows = []
    for backend in options.backends:
        for name in options.models:
            row = in_a_process(backend, "--time-of", name)
            ratio = more = None
            if options.peaks:
                stock, own = (in_a_process(backend, "--peak-of", name, way)["peak_bytes"] for way in WAYS)
                row, ratio, more = {**row, "peak_bytes": {"stock": stock, "own": own}}, own / stock, own - stock
            rows.append({"backend": backend, "model": name, **row})
            figures = [row[key] for key in ("stock_seconds", "ratio", "lower_quartile", "upper_quartile")]
            table.print_row(backend, name, *figures, row["certificate_seconds"], ratio, more)
    about = {name: value for name, value in vars(options).items() if name not in ("json", "time_of", "peak_of")}
    keep(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
