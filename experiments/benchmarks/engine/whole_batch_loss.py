"""Measures the cost of a loss over the whole effective batch: time per sample and peak memory of its two passes.

    python experiments/benchmarks/engine/whole_batch_loss.py --results FOLDER
    python experiments/benchmarks/engine/whole_batch_loss.py --markdown      # the published table, from records/

With `--results`, each configuration (a backend and a workload) writes a JSON file there and is not measured again while
that file exists.

Ways to train at the same effective batch, each in a process of its own (`whole_batch_ways.py`):

- two: `accumulate(model, m, whole_batch_loss=True)`;
- one: `accumulate(model, m, whole_batch_loss=False)`;
- full: plain Keras at the effective batch;
- floor: for each micro-batch a forward pass, then a forward and backward pass whose gradients are added to sums in
  place; one update; nothing else.

The loss is the same everywhere, and couples no samples: what it takes itself would hide what the passes take.

The processes take turns, a few windows each, in this order and in reverse. A ratio compares times of one round; the
table has medians over the rounds. With `--clock cpu` a process makes as many threads as it would on one core: threads
that wait for others spin, and that is time of the CPU too, more of it on a busier machine. Freed memory stays with the
process (`KEEP_MEMORY`), as the allocators of GPUs and TensorFlow's have it: zeroing new pages would cost each way
another part of its time. Peaks are counted in processes of their own, see `counted_memory.py`; TensorFlow runs in one
order of operations there, as where a search measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from accumulation import NAMES, PEAK_WINDOWS, WORKLOADS, children, train_together
from common import MIB, Table, keep, parser

RECORDS = Path(__file__).with_name("records") / "whole_batch_loss"
WAYS = ("two", "one", "full", "floor")
BACKENDS = ("tensorflow", "jax", "torch")
SCRIPT = "whole_batch_ways.py"
# For glibc.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def measured_times(backend: str, workload: str, rounds: int, windows: int, clock: str) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with children(backend, WAYS, workload, backend == "jax", clock, SCRIPT, **KEEP_MEMORY) as processes:
        train_together(processes, 2)  # compiles
        for number in range(rounds):
            for way in WAYS[:: -1 if number % 2 else 1]:
                seconds[way].append(processes[way].train(windows)[0])
    ratios = {way: [two / one for two, one in zip(seconds["two"], seconds[way], strict=True)] for way in WAYS[1:]}
    return {
        "seconds_per_window": {way: statistics.median(times) for way, times in seconds.items()},
        "time_to": {way: statistics.median(of_rounds) for way, of_rounds in ratios.items()},
        "time_to_in_each_round": ratios,
    }


def measured_peaks(backend: str, workload: str) -> dict[str, Any]:
    with children(backend, WAYS[:3], workload, backend == "jax", "none", SCRIPT) as processes:
        peaks = train_together(processes, PEAK_WINDOWS[backend])
    return {"peak_bytes": peaks, "peak_to": {way: peaks["two"] / peaks[way] for way in WAYS[1:3]}}


def found_or_measured(backend: str, workload: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a configuration; what its file has is not measured again."""
    file = arguments.results and arguments.results / f"{backend}-{workload}.json"
    row = json.loads(file.read_text()) if file and file.exists() else {"backend": backend, "workload": workload}
    if "time_to" not in row:
        row |= measured_times(backend, workload, arguments.rounds, arguments.windows, arguments.clock)
        keep(file, row)
    if "peak_to" not in row:
        row |= measured_peaks(backend, workload)
        keep(file, row)
    return row


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The medians over all configurations."""
    figures = {f"time to {way}": [row["time_to"][way] for row in rows] for way in ("one", "floor", "full")}
    figures["peak to one"] = [row["peak_to"]["one"] for row in rows]
    return {label: statistics.median(values) for label, values in figures.items()}


def markdown(folder: Path) -> str:
    """The published table."""
    files = [folder / f"{backend}-{workload}.json" for backend in BACKENDS for workload in WORKLOADS]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    rows = [row for row in rows if "time_to" in row and "peak_to" in row]
    lines = ["| | time to one pass | to the floor | to plain Keras | peak to one pass |", "|---|---|---|---|---|"]
    named = [(f"{NAMES[row['backend']]}, {NAMES[row['workload']]}", medians([row])) for row in rows]
    for label, figures in [*named, (f"median of these {len(rows)}", medians(rows))]:
        lines.append(" | ".join([f"| {label}", *(f"{figure:.2f}" for figure in figures.values())]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, RECORDS)
    options.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS))
    options.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--windows", type=int, default=4, help="windows per turn; the first is not timed")
    options.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="cpu: seconds of all threads")
    options.add_argument("--markdown", action="store_true", help="prints the recorded table, and measures nothing")
    arguments = options.parse_args()
    if arguments.markdown:
        print(markdown(arguments.results))
        return
    columns = {"backend": "<10", "workload": "<11"}
    columns |= {f"{way} ms": ">9.1f" for way in WAYS}
    columns |= {f"to {way}": ">8.2f" for way in WAYS[1:]}
    columns |= {f"{way} MiB": ">9.1f" for way in WAYS[:3]}
    table = Table(columns)
    table.print_header()
    rows = []
    for backend in arguments.backends:
        for workload in arguments.workloads:
            row = found_or_measured(backend, workload, arguments)
            rows.append(row)
            table.print_row(
                backend,
                workload,
                *(row["seconds_per_window"][way] * 1000 for way in WAYS),
                *(row["time_to"][way] for way in WAYS[1:]),
                *(row["peak_bytes"][way] / MIB for way in WAYS[:3]),
            )
    for label, value in medians(rows).items():
        print(f"{label}, median: {value:.2f}")
    keep(arguments.json, rows)


if __name__ == "__main__":
    main()
