"""Measures the cost of ghost batches: a training step with them, compared with one with plain BatchNormalization.

    KERAS_BACKEND=tensorflow python experiments/benchmarks/engine/ghost_batch.py [--json PATH] [--peaks]
        [--models mobilenet resnet efficientnet unet] [--micro-batch 32] [--ghost-batch 8] [--image 64] [--rounds 7]
        [--jit auto|true|false] [--clock wall|cpu]

Three models that differ only in their ghost batch train alternately in one process, one window of two micro-batches
each, with the same micro-batch; a figure is the median ratio over the rounds. `one group` is a ghost batch as large as
the micro-batch. `--clock cpu` adds up the seconds of all threads, which depend less on other work. With `--peaks`, the
memory of each is measured in a process of its own, see `counted_memory.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Table, child_environment, keep, parser

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
WAYS = ("plain", "ghost", "one group")
MODELS = ("mobilenet", "resnet", "efficientnet", "unet")


def convolutions(x: Any, width: int) -> Any:
    import keras

    for _ in range(2):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return x


def unet(size: int) -> Any:
    import keras

    inputs = x = keras.Input((size, size, 3))
    skipped = []
    for width in (16, 32, 64):
        x = convolutions(x, width)
        skipped.append(x)
        x = keras.layers.MaxPooling2D()(x)
    x = convolutions(x, 128)
    for width, skip in zip((64, 32, 16), reversed(skipped), strict=True):
        x = keras.layers.Conv2DTranspose(width, 2, strides=2)(x)
        x = convolutions(keras.layers.Concatenate()([x, skip]), width)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(10, 1)(x)))


def build(name: str, size: int, jit: str) -> Any:
    import keras

    arguments = {"weights": None, "input_shape": (size, size, 3), "classes": 10, "classifier_activation": None}
    applications = {
        "mobilenet": keras.applications.MobileNetV2,
        "resnet": keras.applications.ResNet50,
        "efficientnet": keras.applications.EfficientNetB0,
    }
    keras.utils.set_random_seed(0)
    model = unet(size) if name == "unet" else applications[name](**arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile={"auto": "auto", "true": True, "false": False}[jit])
    return model


def window(options: argparse.Namespace) -> tuple[Any, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    shape = (2 * options.micro_batch, options.image, options.image, 3)
    return random.normal(size=shape).astype("float32"), random.integers(10, size=shape[0])


def accumulating(name: str, way: str, options: argparse.Namespace) -> Any:
    import accumtune

    ghost = {"plain": None, "ghost": options.ghost_batch, "one group": options.micro_batch}[way]
    model = build(name, options.image, options.jit)
    return accumtune.accumulate(model, micro_batch_size=options.micro_batch, ghost_batch_size=ghost)


def seconds(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a window, each round, by way."""
    x, y = window(options)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    models = {way: accumulating(name, way, options) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds + 2):
        for way, model in models.items():
            start = clock()
            float(model.train_on_batch(x, y))
            taken[way].append(clock() - start)
    return {way: values[2:] for way, values in taken.items()}  # without those that compile


def peak_of_this_process(name: str, way: str, options: argparse.Namespace) -> None:
    from counted_memory import counting

    x, y = window(options)
    with counting(is_ordered=True) as peak:
        model = accumulating(name, way, options)
        for _ in range(2):
            model.train_on_batch(x, y)
        print(f"peak {peak()}")


def peak(name: str, way: str) -> int:
    """Bytes, of a process that does nothing else."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, way]
    environment = child_environment(TF_CPU_ALLOCATOR_USE_BFC="true")
    output = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout
    return int(output.split("peak ")[-1])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    arguments.add_argument("--micro-batch", type=int, default=32)
    arguments.add_argument("--ghost-batch", type=int, default=8)
    arguments.add_argument("--image", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--jit", choices=("auto", "true", "false"), default="auto")
    arguments.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments.add_argument("--peaks", action="store_true")
    arguments.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.peak_of:
        return peak_of_this_process(*options.peak_of, options)

    import keras

    print(f"{keras.backend.backend()}, jit_compile={options.jit}")
    ratio = ">11.2f"
    columns = {"model": "<12", "plain s": ">7.3f", "ghost/plain": ratio, "one group": ratio, "peak": ">6.3f"}
    table, rows = Table(columns), []
    table.print_header()
    for name in options.models:
        taken = seconds(name, options)
        ratios = {way: [a / b for a, b in zip(taken[way], taken["plain"], strict=True)] for way in WAYS[1:]}
        peaks = {way: peak(name, way) for way in WAYS[:2]} if options.peaks else None
        rows.append({"model": name, "seconds": taken, "peak_bytes": peaks})
        medians = [statistics.median(values) for values in (taken["plain"], *ratios.values())]
        table.print_row(name, *medians, peaks["ghost"] / peaks["plain"] if peaks else None)
        keras.backend.clear_session()
    about = {name: value for name, value in vars(options).items() if name not in ("json", "peak_of")}
    keep(options.json, {"backend": keras.backend.backend(), "keras": keras.__version__, **about, "models": rows})


if __name__ == "__main__":
    main()
