"""Measures how close predicted and measured peak memory are, and whether sizes that are predicted to fit do run.

Each architecture has a budget and is profiled by `accumtune.profile(...)`, as a user would. From that profile alone:

- the peak at sizes that did not run is predicted, and then measured in a process of its own, with 1 and 4 micro-steps
  per update, without a limit (near a limit the allocator counts more than was requested, which the chosen sizes test);
- the largest micro-batch that fits is chosen, and trained with 1 and 4 accumulation steps under an allocator limit of
  the budget;
- a ninth more than the chosen size is run: if it does not fit, the chosen size is at least 0.9 of the true largest (of
  the sizes 1 to 256).

Published anchors: 1.6 % to 3 % (LLMem, IJCAI 2024), about 16 % (DNNMem, 2020).

    python experiments/benchmarks/memory/prediction.py [--only NAME ...] [--results FOLDER] [--table]

Each architecture writes a file in the folder and does not run again while that exists, so the benchmark can be stopped
and resumed, and divided among processes by `--only`. `--table` runs nothing and prints the existing results.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # the same kernels on every CPU

from architectures import ARCHITECTURES, build_model, data
from common import MIB, keep, parser

from accumtune.memory.device import died_of_memory, memory_limit_environment, open_device
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.memory.probe import STEADY_MICRO_STEPS

LARGEST_SIZE = 256
LISTED_SIZES = (1, 4, 16, 64)  # accumtune.profile looks up to four times beyond the last one
CHECKED_STEPS = (1, 4)
CHECK_UPDATES = 3
RESULTS = Path("mlruns/benchmarks/memory_prediction")


def measure(name: str, size: int, budget_bytes: int | None) -> dict[int, int | None]:
    """Peaks by accumulation steps, `None` where memory ran out, from one child process.

    A fork, because TensorFlow is imported by now and nothing has run on it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            _report(writer, _probe(name, size, budget_bytes, functools.partial(_report_and_end, writer)))
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
        return dict.fromkeys(CHECKED_STEPS)
    if status != 0:
        raise RuntimeError(f"Training {name} at {size} failed; its traceback is above.")
    peaks = {int(steps): peak for steps, peak in json.loads(report).items()}
    return {steps: peaks.get(steps) for steps in CHECKED_STEPS}


def _report(writer: int, measurements: Sequence[Measurement]) -> None:
    os.write(writer, json.dumps({m.accumulation_steps: m.peak_memory_bytes for m in measurements}).encode())


def _report_and_end(writer: int, measurements: Sequence[Measurement]) -> None:
    _report(writer, measurements)
    os._exit(0)


def _probe(name: str, size: int, budget_bytes: int | None, on_out_of_memory: Any) -> list[Measurement]:
    os.environ.update(memory_limit_environment("tensorflow", budget_bytes))
    device = open_device("tensorflow", budget_bytes)

    import keras

    from accumtune.memory.probe import probe

    keras.utils.set_random_seed(0)
    return probe(
        build_model(name), lambda count: (*data(name, count), None), micro_batch_size=size,
        accumulation_steps=CHECKED_STEPS, updates=CHECK_UPDATES, device=device, on_out_of_memory=on_out_of_memory,
    )  # fmt: skip


def held_out_sizes(profile: Profile, picked: int) -> list[int]:
    """Sizes that did not run: two below the pick, and one beyond everything that was measured."""
    ran = {m.micro_batch_size for m in profile.measurements if m.is_feasible}
    wanted = [round(0.6 * picked), round(0.85 * picked), round(1.4 * max(ran))]
    sizes = {next(size for size in range(want, 2 * LARGEST_SIZE) if size not in ran) for want in wanted if want}
    return sorted(size for size in sizes if size <= LARGEST_SIZE)


def examine(name: str) -> dict[str, Any]:
    """All there is to know about one architecture."""
    import accumtune

    budget_bytes = ARCHITECTURES[name].budget_mib * MIB
    started = time.monotonic()
    profile = accumtune.profile(
        functools.partial(build_model, name), *data(name, 64), micro_batch_sizes=LISTED_SIZES,
        memory_budget=budget_bytes, on_probe=lambda line: print(f"    {name}: {line}", flush=True),
    )  # fmt: skip
    seconds = time.monotonic() - started
    largest = profile.largest_micro_batch_size(budget_bytes, CHECKED_STEPS[-1])
    if largest is None:
        raise RuntimeError(f"Nothing of {name} fits; give it a larger budget.")
    picked = min(largest, LARGEST_SIZE)
    points = []
    for size in held_out_sizes(profile, picked):
        for steps, peak in measure(name, size, None).items():
            predicted = profile.predict_peak_memory(size, steps)
            points.append(
                {"micro_batch_size": size, "accumulation_steps": steps, "predicted_bytes": predicted,
                 "measured_bytes": peak, "relative_error": predicted / peak - 1 if peak else None}
            )  # fmt: skip
    peaks = measure(name, picked, budget_bytes)
    more = picked * 10 // 9 + 1
    # Nothing is larger than the largest size of this benchmark.
    is_enough = more > LARGEST_SIZE or None in measure(name, more, budget_bytes).values()
    return {
        "name": name, "budget_mib": budget_bytes // MIB, "measurements": [m.to_dict() for m in profile.measurements],
        "probe_seconds": seconds, "probe_updates": probe_updates(profile, picked), "points": points,
        "picked": picked, "pick_peaks": peaks, "is_at_least_090": is_enough,
    }  # fmt: skip


def probe_updates(profile: Profile, picked: int) -> float:
    """What the probes' updates took, without their traces, in updates of the pick with 4 accumulation steps."""
    steps = CHECKED_STEPS[-1]
    probed = sum(
        m.seconds_per_update * max(3, math.ceil(STEADY_MICRO_STEPS / m.accumulation_steps))
        for m in profile.measurements
        if m.seconds_per_update is not None
    )
    return probed * profile.predict_throughput(picked, steps) / (picked * steps)


def describe(result: dict[str, Any]) -> str:
    """One architecture as a few lines."""
    probes: dict[int, str] = {}
    for m in result["measurements"]:
        peak = m["peak_memory_bytes"]
        text = "out" if peak is None else f"{peak / MIB:.0f}"
        size = m["micro_batch_size"]
        probes[size] = f"{probes[size]}/{text}" if size in probes else text
    listed = ", ".join(f"{size}: {text}" for size, text in probes.items())
    lines = [
        f"{result['name']} under {result['budget_mib']} MiB; ran {listed} MiB "
        f"({result['probe_seconds']:.0f} s, updates as long as {result['probe_updates']:.0f} of the pick's)"
    ]
    for point in result["points"]:
        size, peak, error = point["micro_batch_size"], point["measured_bytes"], point["relative_error"]
        measured = "out of memory" if peak is None else f"{peak / MIB:8.1f} MiB   {error:+7.1%}"
        lines.append(
            f"    {size:>4} x {point['accumulation_steps']}   predicted {point['predicted_bytes'] / MIB:8.1f}   "
            f"measured {measured}"
        )
    for steps, peak in result["pick_peaks"].items():
        runs = "RAN OUT OF MEMORY" if peak is None else f"runs, peak {peak / MIB:.1f} MiB"
        lines.append(f"    pick {result['picked']} x {steps}: {runs}")
    enough = "at least" if result["is_at_least_090"] else "LESS than"
    lines.append(f"    pick {result['picked']}: {enough} 0.9 of the largest that runs")
    return "\n".join(lines)


def summarize(results: Sequence[dict[str, Any]]) -> str:
    """The figures the goals are about."""
    points = [(result["name"], point) for result in results for point in result["points"]]
    errors = [(abs(point["relative_error"]), name, point) for name, point in points if point["measured_bytes"]]
    worst, where, point = max(errors, key=lambda error: error[0])
    peaks = [peak for result in results for peak in result["pick_peaks"].values()]
    return (
        f"{len(results)} architectures, {len(errors)} predictions: median absolute error "
        f"{statistics.median(error for error, _, _ in errors):.1%} (goal 2 %), maximum {worst:.1%} (goal 8 %; {where}, "
        f"{point['micro_batch_size']} x {point['accumulation_steps']})\n"
        f"{len(peaks)} picks: {peaks.count(None)} ran out of memory (goal 0); "
        f"{sum(result['is_at_least_090'] for result in results)} of {len(results)} at least 0.9 of the true largest\n"
        f"probes' updates, in updates of the pick x 4: median "
        f"{statistics.median(result['probe_updates'] for result in results):.0f}, most "
        f"{max(result['probe_updates'] for result in results):.0f} (goal 20)"
    )


def main() -> int:
    options = parser(__doc__, results=RESULTS)
    options.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), help="these architectures")
    options.add_argument("--table", action="store_true", help="print the existing results, run nothing")
    arguments = options.parse_args()
    names = arguments.only or list(ARCHITECTURES)
    files = {name: arguments.results / f"{name.replace(' ', '_')}.json" for name in ARCHITECTURES}
    for name in names if not arguments.table else ():
        if not files[name].exists():
            import tensorflow  # noqa: F401  (each child then has it at once)

            keep(files[name], examine(name))
            print(describe(json.loads(files[name].read_text())), flush=True)
    results = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    if arguments.table or len(names) > 1:
        print("\n".join(map(describe, results)))
    if results:
        print(summarize(results))
    keep(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
