"""What exact accumulation costs: throughput and peak memory beside Keras's own accumulation and two limits.

    python experiments/benchmarks/accumulation.py [--quick] [--backends tensorflow tensorflow+xla jax torch]
        [--workloads mlp cnn transformer mobilenet lstm] [--clock wall|cpu] [--results FOLDER]

With `--results`, each configuration (a backend and a workload) leaves a JSON file there, is not measured again while
that file exists: a long table can be made in pieces. `accumulation_records/` is such a folder.

Ways to train at the same effective batch, each in a process of its own (`accumulation_ways.py`):

- ours: `accumulate(model, m)`, fit with the effective batch;
- keras: `gradient_accumulation_steps=k`, fit with batches of m;
- full: plain Keras, fit with the effective batch;
- limit: k forward and backward passes of one micro-batch and one update, without input, metrics and sums;
- floor (memory alone): parameters, slots, one accumulator and the passes of one micro-batch, whose gradients are used
  up as they appear.

The processes of a configuration take turns, a few windows each, ours between Keras's own and the limit, so that a
ratio compares neighbours in time; the table has medians of the ratios over the rounds. A window is timed inside `fit`,
from the end of the first to the end of the last one, its logs on the host. Peak memory is the allocator's on TensorFlow
(BFC on a CPU too) and on GPUs. For JAX and torch on a CPU it is the resident set's: its peak, less what is resident
between windows once everything is compiled, plus the arrays that are alive then (parameters and slots). Peaks are those
of processes of their own, on all cores, in which freed memory goes back to the system.

What designs gave on TensorFlow, CPU:

    design                                                               workload     to Keras's own (speed, peak)
    a tf.while_loop over micro-batches                                   cnn          0.65; with XLA it never ended
    separate calls, zeroed accumulators, a divided copy at the update    mlp          0.99, 1.12
    first, further micro-steps and update compiled apart, sums in place  mlp          not noted, 1.10 (331 of 301 MiB)
    the updates of the variables one after the other                     mlp          not noted, 0.95 (286 of 301 MiB)
    arrays fed by row numbers, a micro-batch at a time                   mlp          1.02, 0.93
    the first gradients copied into accumulators that stay in place      mlp          1.04, 0.84 (258 of 307 MiB)

(An input pipeline costs 3 to 5 ms per window and up to 25 ms for the first, and holds two windows.) What the moments
of MobileNetV2's 52 normalizations cost, CPU time of a window in one process, median of 6 rounds of 3, each ± 5 %:

    moments of each layer as three vectors, Keras's assignment times 0   437 ms
    the same, Keras's assignment left out of the graph (as it is now)    446 ms
    no moments at all (moving statistics as Keras has them)              431 ms
    Keras's own accumulation                                             457 ms
    the limit                                                            432 ms

Where the time goes on TensorFlow: three ways in one process, taking turns of 5 windows (the first of which is not
timed), CPU time of a window, medians of 9 rounds (XLA: 7); the last two columns are medians of the rounds' ratios. Of a
CNN's or an LSTM's window nine tenths are inside its compiled functions.

    workload     ours      Keras's own   limit     our speed to Keras's own, to the limit
    cnn          244 ms    261 ms        249 ms    1.00, 1.01
    lstm         181 ms    198 ms        177 ms    1.09, 0.99
    lstm, XLA    188 ms    193 ms        186 ms    1.01, 0.95
    mlp, XLA     368 ms    710 ms        335 ms    1.92, 0.91

Processes of their own, on a machine with ten others, do not share its load evenly: of the CNN and the LSTM without XLA
they showed 0.88 and 0.78 of the limit, then 0.95 and 0.96, then 0.94 and 0.88. The MLP pays for its sums: seven times
54 MiB a window, read and written.

Where memory peaks on TensorFlow, MiB of the allocator, least and most over windows (it gives out pieces up to twice as
large as asked for), before the sums stayed in place:

    workload       first micro-step   further ones   update
    mlp            254 to 263         254 to 273     269 to 273
    cnn            24                 23 to 28       12
    transformer    172 to 176         168 to 177     92 to 97
    mobilenet      142 to 143         143 to 147     41
    lstm           32 to 36           24 to 35       26
    cnn, XLA       74                 74             10
    lstm, XLA      82                 82             18

But for the MLP it is the activations of one micro-batch, which Keras's own has too: with XLA, where they are most of
it, Keras's own is at 1.04 to 1.05 of the floor for CNN, transformer and LSTM: 0.9 of that is below the floor.
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

WAYS = ("ours", "keras", "full", "limit")
BACKENDS = ("tensorflow", "tensorflow+xla", "jax", "torch")
WORKLOADS = ("mlp", "cnn", "transformer", "mobilenet", "lstm")
QUICK = ("mlp", "cnn")
PEAK_ROUNDS = 3  # what several threads hold at once differs from window to window: a tenth in a CNN on JAX
TURNS = ("keras", "ours", "limit", "full")
MIB = 2**20
# Freed memory goes back to the system at once: slow, hence not while anything is timed.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


class Child:
    """A process that trains in one way whenever it is asked to."""

    def __init__(self, backend: str, way: str, workload: str, jit: bool, clock: str, **environment: str) -> None:
        self.name = f"{way} on {workload} ({backend})"
        script = Path(__file__).with_name("accumulation_ways.py")
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, script, way, workload, str(int(jit)), clock],
            env=os.environ
            | {
                "KERAS_BACKEND": backend,
                "TF_CPU_ALLOCATOR_USE_BFC": "true",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            }
            | environment,
            preexec_fn=on_one_core if clock == "cpu" else None,
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
        """Seconds per window, and the peak so far in bytes."""
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


def measure(backend: str, jit: bool, workload: str, rounds: int, windows: int, clock: str) -> dict:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    with children(backend, WAYS, workload, jit, clock) as processes:
        train_together(processes, 2)  # compiles
        for _ in range(rounds):
            for way in TURNS:
                taken, peaks[way] = processes[way].train(windows)
                seconds[way].append(taken)
    # On all cores: what is alive at once depends on the number of threads.
    with children(backend, (*WAYS[:3], "floor"), workload, jit, "wall", **FREED_AT_ONCE) as processes:
        train_together(processes, 2)
        for _ in range(PEAK_ROUNDS):
            peaks |= train_together(processes, 2)
    speed_to = {
        way: statistics.median(other / ours for ours, other in zip(seconds["ours"], seconds[way], strict=True))
        for way in WAYS
    }
    return {
        "backend": backend + ("+xla" if jit and backend == "tensorflow" else ""),
        "workload": workload,
        "seconds_per_window": {way: statistics.median(times) for way, times in seconds.items()},
        "speed_to": speed_to,
        "peak_bytes": peaks,
        "peak_to": {way: peaks["ours"] / max(peak, 1) for way, peak in peaks.items()},
    }


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
    """Over all configurations: what the project promises."""
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


def found_or_measured(name: str, workload: str, arguments: argparse.Namespace) -> dict:
    """The row of a configuration, from its file where there is one."""
    file = arguments.results and arguments.results / f"{name}-{workload}.json"
    if file and file.exists():
        return json.loads(file.read_text())
    backend, _, xla = name.partition("+")
    jit = bool(xla) or backend == "jax"
    rounds = 2 if arguments.quick else arguments.rounds
    row = measure(backend, jit, workload, rounds, arguments.windows, arguments.clock)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=2) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=["tensorflow", "tensorflow+xla"])
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=5, help="windows per round; the first is not timed")
    parser.add_argument("--quick", action="store_true", help="two workloads, two rounds")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of all threads, on a busy machine"
    )
    parser.add_argument("--results", type=Path, help="a folder of JSON files, one per configuration")
    arguments = parser.parse_args()
    workloads = arguments.workloads or (QUICK if arguments.quick else WORKLOADS)
    print(header())
    rows = []
    for name in arguments.backends:
        for workload in workloads:
            rows.append(found_or_measured(name, workload, arguments))
            print(printed(rows[-1]), flush=True)
    for label, value in summary(rows).items():
        print(f"{label:<40}{value:5.2f}")


if __name__ == "__main__":
    main()
