"""How close is predicted to measured peak memory, and does what is promised to fit really run?

For each architecture a budget is drawn up, and a few micro-batch sizes are probed under it, as
`accumtune.profile(...)` does. From these probes alone:

- the peak at other sizes is predicted, and then measured in a process of its own, with as many micro-steps or more;
- the largest micro-batch that fits is picked, for 1 and for 4 accumulation steps, and then trained under an
  allocator limit of the budget;
- a ninth more than the pick is tried: when it does not run, the pick is at least 0.9 of the true largest (of the
  sizes 1 to 256).

Every probe and every check is a child process of its own. Published anchors: 1.6 % to 3 % (LLMem, IJCAI 2024),
about 16 % (DNNMem, 2020).

    python experiments/benchmarks/memory_prediction.py [--quick] [--only NAME ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from accumtune.memory.device import died_of_memory, memory_limit_environment, open_device
from accumtune.memory.profile import Measurement, Profile

MIB = 2**20
SIZES = range(1, 257)
PROBED_STEPS = (1, 2, 4)
CHECK_UPDATES = 4


@dataclass(frozen=True)
class Architecture:
    """What is trained, on samples of what shape, under which budget."""

    build: Callable[[], Any]
    sample_shape: tuple[int, ...]
    vocabulary: int  # 0: float inputs
    budget_mib: int


def convolutions() -> Any:
    import keras
    from keras import layers

    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def perceptron() -> Any:
    import keras
    from keras import layers

    hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
    return keras.Sequential([layers.Input((784,)), *hidden, layers.Dense(10, activation="softmax")])


def transformer(length: int = 128, width: int = 64, blocks: int = 4) -> Any:
    import keras
    from keras import layers

    inputs = layers.Input((length,), dtype="int32")
    hidden = layers.Embedding(1000, width)(inputs)
    for _ in range(blocks):
        attended = layers.MultiHeadAttention(4, width // 4)(hidden, hidden)
        hidden = layers.LayerNormalization()(layers.Add()([hidden, attended]))
        widened = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(hidden))
        hidden = layers.LayerNormalization()(layers.Add()([hidden, widened]))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling1D()(hidden)))


def long_attention() -> Any:
    return transformer(length=512, width=32, blocks=2)


def recurrent(layer: str) -> Any:
    import keras
    from keras import layers

    first, second = (getattr(layers, layer)(256, return_sequences=again) for again in (True, False))
    return keras.Sequential(
        [layers.Input((64,), dtype="int32"), layers.Embedding(5000, 128), first, second,
         layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def u_net() -> Any:
    import keras
    from keras import layers

    def convolve(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    inputs = layers.Input((64, 64, 3))
    hidden, skipped = inputs, []
    for filters in (16, 32, 64):
        hidden = convolve(hidden, filters)
        skipped.append(hidden)
        hidden = layers.MaxPooling2D()(hidden)
    hidden = convolve(hidden, 128)
    for filters, kept in zip((64, 32, 16), reversed(skipped), strict=True):
        hidden = layers.Conv2DTranspose(filters, 2, strides=2)(hidden)
        hidden = convolve(layers.Concatenate()([hidden, kept]), filters)
    outputs = layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(hidden))
    return keras.Model(inputs, outputs)


def autoencoder() -> Any:
    import keras
    from keras import layers

    same = {"strides": 2, "padding": "same", "activation": "relu"}
    return keras.Sequential(
        [layers.Input((64, 64, 3)), layers.Conv2D(32, 3, **same), layers.Conv2D(64, 3, **same), layers.Flatten(),
         layers.Dense(64), layers.Dense(16 * 16 * 64, activation="relu"), layers.Reshape((16, 16, 64)),
         layers.Conv2DTranspose(32, 3, **same), layers.Conv2DTranspose(3, 3, **same),
         layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def embedding() -> Any:
    import keras
    from keras import layers

    return keras.Sequential(
        [layers.Input((64,), dtype="int32"), layers.Embedding(50000, 64), layers.Dense(512, activation="gelu"),
         layers.GlobalAveragePooling1D(), layers.Dense(10, activation="softmax")]
    )  # fmt: skip


def application(name: str) -> Any:
    import keras

    return getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)


IMAGE = (64, 64, 3)
ARCHITECTURES = {
    "CNN": Architecture(convolutions, (32, 32, 3), 0, 160),
    "MLP, 14 M": Architecture(perceptron, (784,), 0, 360),
    "transformer": Architecture(transformer, (128,), 1000, 400),
    "attention over 512": Architecture(long_attention, (512,), 1000, 500),
    "LSTM": Architecture(lambda: recurrent("LSTM"), (64,), 5000, 160),
    "GRU": Architecture(lambda: recurrent("GRU"), (64,), 5000, 160),
    "U-Net": Architecture(u_net, IMAGE, 0, 300),
    "autoencoder": Architecture(autoencoder, IMAGE, 0, 150),
    "embedding": Architecture(embedding, (64,), 50000, 160),
    "MobileNetV2": Architecture(lambda: application("MobileNetV2"), IMAGE, 0, 400),
    "EfficientNetB0": Architecture(lambda: application("EfficientNetB0"), IMAGE, 0, 400),
    "ResNet50": Architecture(lambda: application("ResNet50"), IMAGE, 0, 750),
    "DenseNet121": Architecture(lambda: application("DenseNet121"), IMAGE, 0, 500),
}
QUICK = ("CNN", "MLP, 14 M", "transformer")


def measure(name: str, size: int, steps: tuple[int, ...], budget_bytes: int | None, updates: int) -> list[Measurement]:
    """One probe in a child process. A fork, because TensorFlow is imported by now and nothing has run on it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(_probe(name, size, steps, budget_bytes, updates)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and died_of_memory(os.WTERMSIG(status), is_limited=budget_bytes is not None):
        return [Measurement(size, steps[0], None, None, "out of memory", budget_bytes)]
    if status != 0:
        raise RuntimeError(f"Probing {name} at {size} failed; its traceback is above.")
    return [Measurement.from_dict(values) for values in json.loads(report)]


def _probe(name: str, size: int, steps: tuple[int, ...], budget_bytes: int | None, updates: int) -> list[Any]:
    os.environ.update(memory_limit_environment("tensorflow", budget_bytes))
    device = open_device("tensorflow", budget_bytes)

    import keras
    import numpy as np

    from accumtune.memory.probe import probe

    keras.utils.set_random_seed(0)
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    generator = np.random.default_rng(0)

    def batches(count: int) -> tuple[Any, Any, None]:
        shape = (count, *architecture.sample_shape)
        if architecture.vocabulary:
            x = generator.integers(0, architecture.vocabulary, shape, dtype="int32")
        else:
            x = generator.random(shape, dtype="float32")
        return x, generator.integers(0, 10, count), None

    measurements = probe(
        model, batches, micro_batch_size=size, accumulation_steps=steps, updates=updates, device=device
    )
    return [measurement.to_dict() for measurement in measurements]


def profiled(name: str, budget_bytes: int) -> tuple[Profile, float]:
    """Probes until enough is known. Returns the profile and the seconds that took."""
    architecture = ARCHITECTURES[name]
    sample_bytes = 4
    for extent in architecture.sample_shape:
        sample_bytes *= extent
    profile = Profile(
        (), "CPU:0", "tensorflow allocator", memory_budget_bytes=budget_bytes, sample_bytes=sample_bytes + 8
    )
    started = time.monotonic()
    while (size := profile.next_probe_size(budget_bytes, SIZES)) is not None:
        for measurement in measure(name, size, PROBED_STEPS, budget_bytes, updates=3):
            profile = profile.with_measurement(measurement)
    return profile, time.monotonic() - started


def held_out_sizes(profile: Profile) -> list[int]:
    """Sizes that were not probed: between the two largest probes, and beyond them up to twice."""
    probed = sorted({m.micro_batch_size for m in profile.measurements if m.is_feasible})
    wanted = {probed[-1] * 2, round(probed[-1] * 1.4)}
    if len(probed) > 1:
        wanted.add((probed[-1] + probed[-2]) // 2)
    return sorted(size for size in wanted if size not in probed and size <= SIZES[-1])


def examine(name: str, is_quick: bool) -> dict[str, Any]:
    """All there is to know about one architecture."""
    budget_bytes = ARCHITECTURES[name].budget_mib * MIB
    profile, seconds = profiled(name, budget_bytes)
    points = []
    for size in held_out_sizes(profile)[-2 if is_quick else -3 :]:
        for measurement in measure(name, size, (1, 4), None, CHECK_UPDATES):
            assert measurement.peak_memory_bytes is not None
            predicted = profile.predict_peak_memory(size, measurement.accumulation_steps)
            error = predicted / measurement.peak_memory_bytes - 1
            points.append(
                {"micro_batch_size": size, "accumulation_steps": measurement.accumulation_steps,
                 "predicted_bytes": predicted, "measured_bytes": measurement.peak_memory_bytes,
                 "relative_error": error}
            )  # fmt: skip
    picks = [check_pick(name, profile, steps, budget_bytes) for steps in ((1,) if is_quick else (1, 4))]
    probes: dict[int, Any] = {}
    for m in profile.measurements:
        probes.setdefault(m.micro_batch_size, {})[m.accumulation_steps] = m.peak_memory_bytes
    return {
        "name": name, "budget_mib": budget_bytes // MIB, "probes": probes, "probe_seconds": seconds,
        "points": points, "picks": picks,
    }  # fmt: skip


def check_pick(name: str, profile: Profile, steps: int, budget_bytes: int) -> dict[str, Any]:
    """Trains the pick under the limit, and a ninth more than the pick."""
    picked = profile.largest_micro_batch_size(budget_bytes, steps)
    if picked is None:
        return {"accumulation_steps": steps, "picked": None, "runs": None, "is_at_least_090": None}
    picked = min(picked, SIZES[-1])
    (run,) = measure(name, picked, (steps,), budget_bytes, CHECK_UPDATES)
    more = picked * 10 // 9 + 1
    # Nothing is larger than the largest size of this benchmark.
    is_large = more > SIZES[-1] or not measure(name, more, (steps,), budget_bytes, CHECK_UPDATES)[0].is_feasible
    return {
        "accumulation_steps": steps, "picked": picked, "runs": run.is_feasible,
        "peak_bytes": run.peak_memory_bytes, "is_at_least_090": is_large,
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """One architecture as a few lines."""
    probes = ", ".join(
        f"{size}: {'out of memory' if peaks.get(1) is None else f'{peaks[1] / MIB:.0f}'}"
        for size, peaks in result["probes"].items()
    )
    seconds = f"{result['probe_seconds']:.0f} s"
    lines = [f"{result['name']} under {result['budget_mib']} MiB; probed {probes} MiB ({seconds})"]
    for point in result["points"]:
        lines.append(
            f"    {point['micro_batch_size']:>4} x {point['accumulation_steps']}   predicted "
            f"{point['predicted_bytes'] / MIB:8.1f}   measured {point['measured_bytes'] / MIB:8.1f} MiB   "
            f"{point['relative_error']:+7.1%}"
        )
    for pick in result["picks"]:
        runs = {None: "nothing fits", True: "runs", False: "RAN OUT OF MEMORY"}[pick["runs"]]
        enough = {None: "", True: ", at least 0.9 of the largest", False: ", LESS than 0.9 of the largest"}
        text = enough[pick["is_at_least_090"]]
        lines.append(f"    pick {pick['picked']} x {pick['accumulation_steps']}: {runs}{text}")
    return "\n".join(lines)


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures the goals are about."""
    errors = [abs(point["relative_error"]) for result in results for point in result["points"]]
    picks = [pick for result in results for pick in result["picks"] if pick["picked"] is not None]
    return {
        "architectures": len(results), "points": len(errors), "median_absolute_error": statistics.median(errors),
        "maximum_absolute_error": max(errors), "picks": len(picks),
        "picks_out_of_memory": sum(not pick["runs"] for pick in picks),
        "picks_at_least_090": sum(pick["is_at_least_090"] for pick in picks),
        "median_probe_seconds": statistics.median(result["probe_seconds"] for result in results),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three architectures, fewer checks")
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), help="these architectures")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    names = arguments.only or (QUICK if arguments.quick else list(ARCHITECTURES))

    import tensorflow  # noqa: F401  (each child then has it at once)

    import accumtune.memory.probe  # noqa: F401

    results = []
    for name in names:
        results.append(examine(name, arguments.quick))
        print(describe(results[-1]), flush=True)
        summary = summarize(results)
        if arguments.json:
            arguments.json.write_text(json.dumps({"summary": summary, "results": results}, indent=2))
    print(
        f"{summary['architectures']} architectures, {summary['points']} predictions: median absolute error "
        f"{summary['median_absolute_error']:.1%} (goal 2 %), maximum {summary['maximum_absolute_error']:.1%} "
        f"(goal 8 %)\n{summary['picks']} picks: {summary['picks_out_of_memory']} ran out of memory (goal 0), "
        f"{summary['picks_at_least_090']} at least 0.9 of the true largest"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
