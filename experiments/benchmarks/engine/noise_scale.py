"""Measures what it costs to measure the gradient noise scale while accumulating, as a share of the training.

    python experiments/benchmarks/engine/noise_scale.py [--backends tensorflow jax torch] [--json PATH]

Each backend has a process of its own, in which two copies of a model train alternately, one of them with the callback
`GradientNoiseScale`: a few windows of one, the same of the other, in random order in each round. The workloads are the
most expensive ones: many parameters for few samples, where a norm costs most relative to a pass, and a model so small
that the overhead of calls dominates. Times are CPU seconds of all threads, which depend less on other work; the cost is
the median ratio over the rounds, the spread its quartiles.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Table, child_environment, keep, parser

# name: units of each hidden layer, micro-batch size, accumulation steps
WORKLOADS = {
    "wide, 8 × 16": ((1024, 1024, 1024), 16, 8),
    "wide, 1 × 8": ((1024, 1024, 1024), 1, 8),
    "wide, 1 × 2": ((1024, 1024, 1024), 1, 2),
    "tiny, 8 × 8": ((16,), 8, 8),
    "tiny, 8 × 2": ((16,), 8, 2),
}
MICRO_STEPS_PER_ROUND = 192


def measure(name: str, rounds: int) -> dict[str, float]:
    import keras
    import numpy as np

    import accumtune

    units, micro, steps = WORKLOADS[name]
    windows = MICRO_STEPS_PER_ROUND // steps
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(windows * micro * steps, units[0])).astype("float32")
    y = x[:, :1]
    trainings = []
    for callbacks in ([], [accumtune.GradientNoiseScale()]):
        layers = [keras.layers.Dense(number, "relu") for number in units]
        model = keras.Sequential([keras.Input((units[0],)), *layers, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-6), "mse", jit_compile=keras.backend.backend() == "jax")
        trainings.append((accumtune.accumulate(model, micro), callbacks))

    def seconds(model, callbacks) -> float:
        started = time.process_time()
        model.fit(x, y, batch_size=micro * steps, verbose=0, callbacks=callbacks)
        return time.process_time() - started

    for training in trainings:  # compiles
        seconds(*training)
    ratios = []
    for _ in range(rounds):
        order = random.sample((0, 1), 2)
        taken = {index: seconds(*trainings[index]) for index in order}
        ratios.append(taken[1] / taken[0] - 1)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"cost": middle, "lower_quartile": low, "upper_quartile": high}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backends", nargs="*", default=["tensorflow"])
    options.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--one", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.rounds)))
        return
    rows = []
    table = Table({"backend": "<10", "workload": "<14", "cost": ">+7.1%", "quartile": ">+8.1%", "upper": ">+7.1%"})
    table.print_header()
    for backend in arguments.backends:
        for name in arguments.workloads:
            command = [sys.executable, __file__, "--one", name, "--rounds", str(arguments.rounds)]
            environment = child_environment(KERAS_BACKEND=backend)
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append({"backend": backend, "workload": name, **row})
            table.print_row(backend, name, row["cost"], row["lower_quartile"], row["upper_quartile"])
    keep(arguments.json, rows)


if __name__ == "__main__":
    main()
