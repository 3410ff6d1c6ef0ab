"""Measures on one CUDA device: predicted and measured peaks, the limit, and the cost of accumulation.

For each backend that sees the device and each workload:

- predicted, measured: the peak of a micro-batch that was not probed, two micro-steps per update, from a profile under
  the budget, and from a process of its own under the same budget;
- four times: the outcome of four times the largest micro-batch that fits: out of memory at the budget, or its peak
  (XLA seems to recompute activations if a program would not fit in its allocator's limit);
- ours, keras: samples per second inside `fit`, exact accumulation and Keras's own, alternating (`accumulation.py`).

    python experiments/benchmarks/engine/gpu.py [--backends jax torch tensorflow] [--memory-budget 2GiB] [--jobs 1]
        [--json PATH]

Memory is measured first, `--jobs` at once if the device has room for so many budgets; speed one after the other. The
script needs Keras, Keras Tuner, SciPy, cloudpickle and a backend; neither TensorFlow nor MLflow. Without a CUDA device
it prints a line and exits with 0. `--cpu` runs it on the CPU, to test the script; the figures then say nothing about
GPUs. Each figure is written to the JSON file at once, so an interrupted run loses little. If a measurement fails, its
reason is printed, the others continue, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import MIB, Table, child_environment, keep, parser

BACKENDS = ("jax", "torch", "tensorflow")
# A sample's shape; size of its vocabulary.
WORKLOADS = {"mlp": ((784,), 0), "cnn": ((32, 32, 3), 0), "transformer": ((128,), 8000)}
SIZES = (16, 64, 256, 1024)
ROUNDS, WINDOWS = 5, 8
# Two processes take turns on one device: neither may take all of it.
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def cuda_device() -> str | None:
    """The name and memory of the first CUDA device, asked of the driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def why_not(backend: str) -> str | None:
    """What keeps this backend from training on a GPU; asked in a process that ends and frees the device."""
    script = f"import keras; from accumtune.memory.device import open_device; print(open_device({backend!r}).name)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(backend), capture_output=True, text=True)
    if done.returncode:
        return f"does not start: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return None if done.stdout.strip().startswith("GPU") else "sees no GPU: its CUDA packages are missing"


def environment(backend: str) -> dict[str, str]:
    """Of a process that has this backend and shares the device."""
    return child_environment(KERAS_BACKEND=backend, TF_CPU_ALLOCATOR_USE_BFC="true", **SHARED_DEVICE)


def versions() -> dict[str, str]:
    found = {}
    for name in ("keras", "keras-tuner", "jax", "torch", "tensorflow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0]} | found


def build_model(workload: str) -> Any:
    import keras
    from keras import layers

    shape, vocabulary = WORKLOADS[workload]
    if workload == "mlp":
        hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
        model = keras.Sequential([keras.Input(shape), *hidden, layers.Dense(10)])
    elif workload == "cnn":
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

    def probed(size: int) -> Any:
        """What this size cost with most micro-steps; None where it ran out of memory."""
        points = accumtune.profile(
            build, x, y, micro_batch_sizes=[size], memory_budget=budget, confirm_largest=False, on_probe=say
        ).measurements
        ran = [point for point in points if point.micro_batch_size == size and point.is_feasible]
        return max(ran, key=lambda point: point.accumulation_steps, default=None)

    profile = accumtune.profile(build, x, y, micro_batch_sizes=SIZES, memory_budget=budget, on_probe=say)
    largest = profile.largest_micro_batch_size(budget, accumulation_steps=2)
    if largest is None:
        raise SystemExit(f"Not even micro-batch 1 of {workload} fits in {budget}: give a larger --memory-budget.")
    micro = max(1, 2 * largest // 3)
    measured = probed(micro)
    if measured is None:
        raise SystemExit(f"Micro-batch {micro} of {workload}, which was to fit in {budget}, ran out of memory.")
    beyond = probed(4 * largest)
    predicted = profile.predict_peak_memory(micro, measured.accumulation_steps)
    return {
        "device": profile.device,
        "memory_source": profile.memory_source,
        "largest_micro_batch_size": largest,
        "micro_batch_size": micro,
        "predicted_peak_memory_bytes": predicted,
        "measured_peak_memory_bytes": measured.peak_memory_bytes,
        "error": predicted / measured.peak_memory_bytes - 1,
        "four_times_peak_memory_bytes": None if beyond is None else beyond.peak_memory_bytes,
    }


def speed(backend: str, workload: str) -> dict[str, Any]:
    """Samples per second of the accumulation benchmark's workload, and the median of the ratios of neighbours."""
    from accumulation import children
    from ways import WORKLOADS as WINDOWS_OF

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


def say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def measured_in_process(part: str, backend: str, workload: str, budget: str) -> dict[str, Any] | None:
    """Memory or speed, in a process of its own: Keras has one backend per process. None where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", part, backend, workload]
        done = subprocess.run([*command, "--memory-budget", budget, "--json", str(path)], env=environment(backend))
        return json.loads(path.read_text()) if done.returncode == 0 else None


TABLE = Table({
    "backend": "<10", "workload": "<11", "largest": ">7", "micro": ">6", "predicted MiB": ">13,.0f",
    "measured MiB": ">12,.0f", "error": ">+7.1%", "four times": ">10", "ours/s": ">8,.0f", "keras/s": ">8,.0f",
    "ratio": ">5.2f",
})  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """What failed is "-"; its reason was printed when it did."""
    peaks = [row.get(f"{name}_peak_memory_bytes") for name in ("predicted", "measured")]
    beyond = row.get("four_times_peak_memory_bytes")
    four_times = None if "error" not in row else "out" if beyond is None else f"{beyond / MIB:,.0f} MiB"
    per_second = row.get("samples_per_second", {})
    TABLE.print_row(
        row["backend"], row["workload"], row.get("largest_micro_batch_size"), row.get("micro_batch_size"),
        *(peak and peak / MIB for peak in peaks), row.get("error"), four_times,
        per_second.get("ours"), per_second.get("keras"), row.get("speed_to_keras"),
    )  # fmt: skip


def usable(options: argparse.Namespace) -> list[str]:
    """The backends that can be measured; says of the others why not."""
    found = []
    for backend in options.backends:
        reason = "is not installed" if importlib.util.find_spec(backend) is None else None
        if reason is None and not options.cpu and (problem := why_not(backend)):
            reason = f"is installed, but {problem}"
        if reason is None:
            found.append(backend)
        else:
            print(f"{backend:<11}{reason}")
    return found


def measure(options: argparse.Namespace, told: dict[str, Any]) -> bool:
    """Measures, keeps and prints; False where something failed."""
    backends = usable(options)
    rows = [{"backend": backend, "workload": workload} for backend in backends for workload in options.workloads]
    told["rows"] = rows

    def run(part: str, row: dict[str, Any]) -> bool:
        found = measured_in_process(part, row["backend"], row["workload"], options.memory_budget)
        row |= found or {}
        keep(options.json, told)
        return found is not None

    with ThreadPoolExecutor(options.jobs) as pool:
        all_ran = all(list(pool.map(functools.partial(run, "memory"), rows)))
    TABLE.print_header()
    for row in rows:
        all_ran &= run("speed", row)
        print_row(row)
    return all_ran


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    made.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    made.add_argument("--memory-budget", default="2GiB")
    made.add_argument("--cpu", action="store_true", help="run without a CUDA device, to test the script")
    made.add_argument("--jobs", type=int, default=1, help="memory measurements at once")
    made.add_argument("--one", nargs=3, metavar=("PART", "BACKEND", "WORKLOAD"), help=argparse.SUPPRESS)
    options = made.parse_args()

    if options.one:
        part, backend, workload = options.one
        keep(options.json, memory(workload, options.memory_budget) if part == "memory" else speed(backend, workload))
        return 0
    device = cuda_device()
    told: dict[str, Any] = {"device": device, "versions": versions(), "memory_budget": options.memory_budget}
    told["rows"] = []
    keep(options.json, told)
    if device is None and not options.cpu:
        print("No CUDA device here (nvidia-smi found none): nothing was measured.")
        return 0
    print(f"{device or 'CPU, to test the script'}; budget {options.memory_budget}", flush=True)
    return 0 if measure(options, told) else 1


if __name__ == "__main__":
    sys.exit(main())
