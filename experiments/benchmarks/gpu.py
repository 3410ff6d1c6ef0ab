"""On one CUDA device: is the predicted peak the measured one, does the limit hold, and what does accumulation cost?

For each backend that sees the device and each workload:

- predicted, measured: the peak of a micro-batch that was not probed, two micro-steps per update, from a profile under
  the budget, and from a process of its own without a limit;
- limit: whether four times the largest micro-batch that fits is stopped by the allocator at the budget;
- ours, keras: samples per second inside `fit`, exact accumulation and Keras's own, taking turns (`accumulation.py`).

    python experiments/benchmarks/gpu.py [--backends jax torch tensorflow] [--memory-budget 2GiB] [--json PATH]

Without a CUDA device it says so and ends with 0. `--cpu` runs it on the CPU all the same, to try the script out; the
figures then say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BACKENDS = ("jax", "torch", "tensorflow")
WORKLOADS = {"cnn": ((32, 32, 3), 0), "transformer": ((128,), 8000)}  # a sample's shape; size of its vocabulary
SIZES = (1, 4, 16, 64, 256, 1024)
ROUNDS, WINDOWS = 5, 5
# Two processes take turns on one device: neither may take all of it.
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def cuda_device() -> str | None:
    """The name and memory of the first CUDA device, asked of the driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def sees_gpu(backend: str) -> bool:
    """Whether this backend, as installed, trains on a GPU; asked in a process that ends and frees the device."""
    script = f"from accumtune.memory.device import open_device; print(open_device({backend!r}).name)"
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPU_ALLOCATOR_USE_BFC": "true"} | SHARED_DEVICE
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip().startswith("GPU")


def build_model(workload: str) -> Any:
    import keras
    from keras import layers

    shape, vocabulary = WORKLOADS[workload]
    if workload == "cnn":
        convolutions: list[Any] = []
        for width in (64, 128, 256, 512):
            convolutions += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        model = keras.Sequential([keras.Input(shape), *convolutions, layers.Flatten(), layers.Dense(10)])
    else:
        inputs = keras.Input(shape, dtype="int32")
        x = layers.Embedding(vocabulary, 256)(inputs)
        for _ in range(6):
            x = layers.LayerNormalization()(x + layers.MultiHeadAttention(8, 32)(x, x))
            x = layers.LayerNormalization()(x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(x)))
        model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def memory(workload: str, budget: str) -> dict[str, Any]:
    """Predicted and measured peak of a size that was not probed, and whether the limit holds."""
    import numpy as np

    import accumtune

    shape, vocabulary = WORKLOADS[workload]
    random = np.random.default_rng(0)
    size = (512, *shape)
    x = random.integers(1, vocabulary, size, "int32") if vocabulary else random.normal(size=size).astype("float32")
    y = random.integers(0, 10, len(x), "int32")

    def build(hp: Any) -> Any:
        return build_model(workload)

    def probed(size: int, limit: str | None) -> Any:
        """What this size cost with most micro-steps; None where it ran out of memory."""
        points = accumtune.profile(build, x, y, micro_batch_sizes=[size], memory_budget=limit).measurements
        ran = [point for point in points if point.micro_batch_size == size and point.is_feasible]
        return max(ran, key=lambda point: point.accumulation_steps, default=None)

    profile = accumtune.profile(build, x, y, micro_batch_sizes=SIZES, memory_budget=budget)
    largest = profile.largest_micro_batch_size(budget, accumulation_steps=2)
    if largest is None:
        raise SystemExit(f"Not even micro-batch 1 of {workload} fits in {budget}: give a larger --memory-budget.")
    micro = max(1, 2 * largest // 3)
    measured = probed(micro, None)
    predicted = profile.predict_peak_memory(micro, measured.accumulation_steps)
    return {
        "device": profile.device,
        "memory_source": profile.memory_source,
        "largest_micro_batch_size": largest,
        "micro_batch_size": micro,
        "predicted_peak_memory_bytes": predicted,
        "measured_peak_memory_bytes": measured.peak_memory_bytes,
        "error": predicted / measured.peak_memory_bytes - 1,
        "is_limit_enforced": probed(4 * largest, budget) is None,
    }


def speed(backend: str, workload: str) -> dict[str, Any]:
    """Samples per second of the accumulation benchmark's workload, and the median of the ratios of neighbours."""
    from accumulation import children
    from accumulation_ways import WORKLOADS as WINDOWS_OF

    micro, steps = WINDOWS_OF[workload]
    seconds: dict[str, list[float]] = {"ours": [], "keras": []}
    with children(backend, tuple(seconds), workload, backend == "jax", "wall", **SHARED_DEVICE) as processes:
        for child in processes.values():
            child.train(2)  # compiles
        for _ in range(ROUNDS):
            for way, child in processes.items():
                seconds[way].append(child.train(WINDOWS)[0])
    ratios = [keras / ours for ours, keras in zip(seconds["ours"], seconds["keras"], strict=True)]
    per_second = {way: micro * steps / statistics.median(times) for way, times in seconds.items()}
    return {"samples_per_second": per_second, "speed_to_keras": statistics.median(ratios)}


def measure(backend: str, budget: str, workloads: list[str]) -> list[dict[str, Any]]:
    """The rows of one backend; this process must have it as Keras's."""
    rows = []
    for workload in workloads:
        row = {"backend": backend, "workload": workload, "memory_budget": budget}
        rows.append(row | memory(workload, budget) | speed(backend, workload))
        print(printed(rows[-1]), flush=True)
    return rows


def measured_in_process(backend: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same in a process of its own: Keras has one backend per process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--one", backend, "--memory-budget", options.memory_budget]
        command += ["--workloads", *options.workloads, "--json", str(path)]
        done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": backend})
        if done.returncode:
            print(f"{backend:<11}ended with {done.returncode}")
        return json.loads(path.read_text())["rows"] if path.exists() else []


def header() -> str:
    return (
        f"{'backend':<11}{'workload':<12}{'largest':>8}{'micro':>7}{'predicted':>11}{'measured':>10}{'error':>8}"
        f"{'limit':>10}{'ours/s':>9}{'keras/s':>9}{'ratio':>7}"
    )


def printed(row: dict[str, Any]) -> str:
    mib = {name: row[f"{name}_peak_memory_bytes"] / 2**20 for name in ("predicted", "measured")}
    per_second = row["samples_per_second"]
    return (
        f"{row['backend']:<11}{row['workload']:<12}{row['largest_micro_batch_size']:>8}{row['micro_batch_size']:>7}"
        f"{mib['predicted']:>7,.0f} MiB{mib['measured']:>6,.0f} MiB{row['error']:>+8.1%}"
        f"{'enforced' if row['is_limit_enforced'] else 'NOT':>10}"
        f"{per_second['ours']:>9,.0f}{per_second['keras']:>9,.0f}{row['speed_to_keras']:>7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--memory-budget", default="2GiB")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--cpu", action="store_true", help="run without a CUDA device, to try the script out")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    device = cuda_device()
    if options.one:
        rows = measure(options.one, options.memory_budget, options.workloads)
    elif device is None and not options.cpu:
        print("No CUDA device here (nvidia-smi found none): nothing was measured.")
        rows = []
    else:
        print(f"{device or 'CPU, to try the script out'}; budget {options.memory_budget}")
        print(header(), flush=True)
        rows = []
        for backend in options.backends:
            if importlib.util.find_spec(backend) is None:
                print(f"{backend:<11}is not installed")
            elif not options.cpu and not sees_gpu(backend):
                print(f"{backend:<11}is installed, but sees no GPU: its CUDA packages are missing")
            else:
                rows += measured_in_process(backend, options)
    if options.json:
        options.json.write_text(json.dumps({"device": device, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
