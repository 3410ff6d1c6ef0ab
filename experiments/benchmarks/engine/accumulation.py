"""Measures the cost of exact accumulation: throughput and peak memory, compared with Keras's own and two limits.

    python experiments/benchmarks/engine/accumulation.py --clock cpu --rounds 3 --windows 3 --results FOLDER \\
        --backends tensorflow tensorflow+xla jax torch
    python experiments/benchmarks/engine/accumulation.py --markdown      # the published table, from records/

With `--results`, each configuration (a backend and a workload) writes a JSON file there and is not measured again while
that file exists: a long table can be measured in parts.

Ways to train at the same effective batch, each in a process of its own (`ways.py`):

- ours: `accumulate(model, m)`, fit with the effective batch;
- keras: `gradient_accumulation_steps=k`, fit with batches of m;
- full: plain Keras, fit with the effective batch;
- limit: k forward and backward passes of one micro-batch and one update, without input, metrics and sums;
- floor (memory only): parameters, slots, one accumulator and the passes of one micro-batch, whose gradients are added
  up at once.

The processes of a configuration alternate, a few windows each, ours between Keras's own and the limit, so that a ratio
compares times close to each other; the table has medians of the ratios over the rounds. Windows are timed inside `fit`,
from the end of the first to the end of the last one, with its logs on the host. Peaks are measured in processes of
their own, see `counted_memory.py`. `records/README.md` has the results of earlier designs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import MIB, child_environment, keep, parser

RECORDS = Path(__file__).with_name("records")
WAYS = ("ours", "keras", "full", "limit")
BACKENDS = ("tensorflow", "tensorflow+xla", "jax", "torch")
WORKLOADS = ("mlp", "cnn", "transformer", "mobilenet", "lstm")
QUICK = ("mlp", "cnn")
# What several threads hold at once differs from window to window; XLA's plans and torch's calls do not.
PEAK_WINDOWS = {"tensorflow": 6, "jax": 2, "torch": 2}
TURNS = ("keras", "ours", "limit", "full")


class Child:
    """A process that trains in one way whenever it is asked to.

    Args:
        script: the file beside this one that has the way.
    """

    def __init__(
        self, backend: str, way: str, workload: str, jit: bool, clock: str, script: str = "ways.py", **environment: str
    ) -> None:
        self.name = f"{way} on {workload} ({backend})"
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), way, workload, str(int(jit)), clock],
            env=child_environment(KERAS_BACKEND=backend, TF_CPU_ALLOCATOR_USE_BFC="true", **environment),
            # torch's threads wait for each other by spinning: on a busy machine that takes minutes.
            preexec_fn=on_one_core if clock == "cpu" or (clock, backend) == ("none", "torch") else None,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def begin(self, windows: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{windows}\n")
        self.process.stdin.flush()

    def end(self) -> tuple[float, int]:
        """Seconds per window, and the peak in bytes where it is counted."""
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.log.seek(0)
            last_words = "".join(self.log.readlines()[-5:])
            raise SystemExit(f"{self.name} ended with {code}:\n{last_words}")
        seconds, peak = json.loads(answer)
        return seconds, peak

    def train(self, windows: int) -> tuple[float, int]:
        self.begin(windows)
        return self.end()


def train_together(processes: dict[str, Child], windows: int) -> dict[str, int]:
    """All at once, where nothing is timed: compiling, and peaks. Gives the peaks."""
    for child in processes.values():
        child.begin(windows)
    return {way: child.end()[1] for way, child in processes.items()}


def on_one_core() -> None:
    """Frameworks make as many threads as they find cores; those that wait for others spin, which is time of the CPU."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


@contextlib.contextmanager
def children(backend: str, ways: tuple[str, ...], *options, **environment: str) -> Iterator[dict[str, Child]]:
    started: dict[str, Child] = {}
    try:
        for way in ways:
            started[way] = Child(backend, way, *options, **environment)
        yield started
    finally:
        for child in started.values():
            child.process.kill()
            child.process.wait()


def measured_speed(backend: str, jit: bool, workload: str, rounds: int, windows: int, clock: str) -> dict:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with children(backend, WAYS, workload, jit, clock) as processes:
        train_together(processes, 2)  # compiles
        for _ in range(rounds):
            for way in TURNS:
                seconds[way].append(processes[way].train(windows)[0])
    speed_to = {
        way: statistics.median(other / ours for ours, other in zip(seconds["ours"], seconds[way], strict=True))
        for way in WAYS
    }
    return {
        "seconds_per_window": {way: statistics.median(times) for way, times in seconds.items()},
        "speed_to": speed_to,
    }


def measured_peaks(backend: str, jit: bool, workload: str) -> dict:
    with children(backend, (*WAYS[:3], "floor"), workload, jit, "none") as processes:
        peaks = train_together(processes, PEAK_WINDOWS[backend])
    return {"peak_bytes": peaks, "peak_to": {way: peaks["ours"] / peak for way, peak in peaks.items()}}


def header() -> str:
    lines = (
        f"{'':27}{'ms per window':^31}  {'peak MiB':^31}  {'our speed to':^13}  {'our peak to':^13}",
        f"{'backend':<15}{'workload':<12}{'ours':>7} {'keras':>7} {'full':>7} {'limit':>7}  "
        f"{'ours':>7} {'keras':>7} {'full':>7} {'floor':>7}  {'keras':>6} {'limit':>6}  {'keras':>6} {'floor':>6}",
    )
    return "\n".join(lines)


def printed(row: dict) -> str:
    times = " ".join(f"{row['seconds_per_window'][way] * 1000:7.1f}" for way in WAYS)
    peaks = " ".join(f"{row['peak_bytes'][way] / MIB:7.0f}" for way in (*WAYS[:3], "floor"))
    speed = f"{row['speed_to']['keras']:6.2f} {row['speed_to']['limit']:6.2f}"
    peak = f"{row['peak_to']['keras']:6.2f} {row['peak_to']['floor']:6.2f}"
    return f"{row['backend']:<15}{row['workload']:<12}{times}  {peaks}  {speed}  {peak}"


def summary(rows: list[dict]) -> dict[str, float]:
    """Returns the summary over all configurations, which the documentation publishes."""
    to_keras = [row["speed_to"]["keras"] for row in rows]
    peak_to_keras = [row["peak_to"]["keras"] for row in rows]
    return {
        "speed to the limit, median": statistics.median(row["speed_to"]["limit"] for row in rows),
        "speed to Keras's own, geometric mean": math.prod(to_keras) ** (1 / len(rows)),
        "speed to Keras's own, least": min(to_keras),
        "peak to Keras's own, median": statistics.median(peak_to_keras),
        "peak to Keras's own, most": max(peak_to_keras),
        "peak to the floor, median": statistics.median(row["peak_to"]["floor"] for row in rows),
    }


# As the documentation calls them.
NAMES = {"tensorflow": "TensorFlow", "tensorflow+xla": "TensorFlow, XLA", "jax": "JAX", "torch": "torch"}
NAMES |= {"mlp": "MLP", "cnn": "CNN", "transformer": "transformer", "mobilenet": "MobileNetV2", "lstm": "LSTM"}


def recorded(folder: Path) -> list[dict]:
    """The rows that a folder has all of, in the order of the table."""
    files = [folder / f"{backend}-{workload}.json" for backend in BACKENDS for workload in WORKLOADS]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    return [row for row in rows if "speed_to" in row and "peak_to" in row]


def markdown(rows: list[dict]) -> str:
    """The published tables."""
    lines = ["| | speed to Keras's own | to the limit | peak to Keras's own |", "|---|---|---|---|"]
    for row in rows:
        figures = (row["speed_to"]["keras"], row["speed_to"]["limit"], row["peak_to"]["keras"])
        label = f"{NAMES[row['backend']]}, {NAMES[row['workload']]}{row.get('mark', '')}"
        lines.append(" | ".join([f"| {label}", *(f"{figure:.2f}" for figure in figures)]) + " |")
    lines += ["", f"| over these {len(rows)} | |", "|---|---|"]
    return "\n".join(lines + [f"| {label} | {value:.2f} |" for label, value in summary(rows).items()])


def found_or_measured(name: str, workload: str, arguments: argparse.Namespace) -> dict:
    """The row of a configuration; what its file has is not measured again."""
    file = arguments.results and arguments.results / f"{name}-{workload}.json"
    row = json.loads(file.read_text()) if file and file.exists() else {"backend": name, "workload": workload}
    backend, _, xla = name.partition("+")
    configuration = (backend, bool(xla) or backend == "jax", workload)
    rounds = 2 if arguments.quick else arguments.rounds
    if "speed_to" not in row:
        row |= measured_speed(*configuration, rounds, arguments.windows, arguments.clock)
        keep(file, row)
    if "peak_to" not in row:
        row |= measured_peaks(*configuration)
        keep(file, row)
    return row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backends", nargs="*", choices=BACKENDS, default=["tensorflow", "tensorflow+xla"])
    options.add_argument("--workloads", nargs="*", choices=WORKLOADS)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--windows", type=int, default=5, help="windows per round; the first is not timed")
    options.add_argument("--quick", action="store_true", help="two workloads, two rounds")
    options.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of all threads, for a busy machine"
    )
    options.add_argument("--results", type=Path, help="a folder of JSON files, one per configuration")
    options.add_argument("--markdown", action="store_true", help="prints the recorded table, and measures nothing")
    arguments = options.parse_args()
    if arguments.markdown:
        print(markdown(recorded(arguments.results or RECORDS)))
        return
    workloads = arguments.workloads or (QUICK if arguments.quick else WORKLOADS)
    print(header())
    rows = []
    for name in arguments.backends:
        for workload in workloads:
            rows.append(found_or_measured(name, workload, arguments))
            print(printed(rows[-1]), flush=True)
    for label, value in summary(rows).items():
        print(f"{label:<40}{value:5.2f}")
    keep(arguments.json, rows)


if __name__ == "__main__":
    main()
