"""`accumtune probe`: which micro-batch sizes of a model fit in a memory budget."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TextIO

from accumtune.commands.addresses import load_data, load_object, refuse_unwritable
from accumtune.commands.answer import only_the_answer
from accumtune.commands.options import add_command, add_json, add_model_and_data, count, print_json
from accumtune.memory.budget import format_bytes, parse_budget

if TYPE_CHECKING:
    from accumtune.memory.prediction.profile import Profile


def add(commands: Any) -> None:
    command = add_command(
        commands, "probe", "which micro-batch sizes of a model fit in a memory budget", run,
        "Measures a few updates at a few sizes, each in a process of its own, and predicts the other sizes. "
        "Exit code 1: nothing fits.",
    )  # fmt: skip
    add_model_and_data(command)
    command.add_argument(
        "--memory-budget", metavar="SIZE", default=None, help='for example "2GiB", or "80%%" of the device'
    )
    command.add_argument(
        "--micro-batch-sizes", metavar="N", type=count, nargs="+", default=None, help="default: powers of two"
    )
    command.add_argument(
        "--accumulation-steps", metavar="N", type=count, default=2, help="in all rows of the table; default: 2"
    )
    add_json(command, "print JSON instead of a table")
    command.add_argument("--plot", metavar="FILE", default=None, help="draw the table, for example into probe.png")


def run(options: argparse.Namespace) -> int:
    if options.plot:
        refuse_unwritable(options.plot)
    with only_the_answer() as answer:
        return _probe(options, answer)


def _probe(options: argparse.Namespace, answer: TextIO) -> int:
    from accumtune.execution.standalone_profile import profile
    from accumtune.memory.machine import budget_hint, device_memory

    device = device_memory()
    budget = None if options.memory_budget is None else parse_budget(options.memory_budget)
    if not options.json:
        print(device.describe(), file=answer, flush=True)

    build_model, (x, y) = load_object(options.build_model), load_data(options.data)
    progress = (lambda line: None) if options.json else (lambda line: print(line, file=sys.stderr, flush=True))
    costs = profile(
        build_model,
        x,
        y,
        micro_batch_sizes=options.micro_batch_sizes,
        memory_budget=budget,
        on_probe=progress,
    )
    largest = None if budget is None else costs.largest_micro_batch_size(budget, options.accumulation_steps)
    runs_at_all = any(measurement.is_feasible for measurement in costs.measurements)
    answer_size = [] if largest is None else [largest]
    sizes = sorted({*_sizes(options, costs), *answer_size}) if runs_at_all else []
    rows = [_row(costs, size, options.accumulation_steps, budget) for size in sizes]
    if options.plot and rows:
        from accumtune.memory.profile_plot import draw_profile

        draw_profile(rows, budget, options.accumulation_steps, options.plot)
    if options.json:
        summary = {"largest_micro_batch_size": largest, "memory_budget_bytes": budget, "device": vars(device)}
        print_json({**summary, "sizes": rows}, answer)
    else:
        if rows:
            print(_table(rows), file=answer)
        if budget is not None:
            text = "none: not even 1 fits" if largest is None else str(largest)
            steps = f"({options.accumulation_steps} steps)"
            print(f"Largest micro-batch in {format_bytes(budget)} {steps}: {text}", file=answer)
            if largest is None:
                import keras

                hint = budget_hint(keras.config.backend())
                print(f"Raise the budget, or make the model smaller.{hint}", file=answer)
    return 0 if budget is None or largest is not None else 1


def _sizes(options: argparse.Namespace, costs: Profile) -> list[int]:
    from accumtune.execution.standalone_profile import DEFAULT_MICRO_BATCH_SIZES

    probed = {measurement.micro_batch_size for measurement in costs.measurements}
    return sorted(probed | set(options.micro_batch_sizes or DEFAULT_MICRO_BATCH_SIZES))


def _row(costs: Profile, size: int, steps: int, budget: int | None) -> dict[str, Any]:
    measured = [m for m in costs.measurements if (m.micro_batch_size, m.accumulation_steps) == (size, steps)]
    return {
        "micro_batch_size": size,
        "predicted_peak_memory_bytes": costs.predict_peak_memory(size, steps, budget),
        "measured_peak_memory_bytes": measured[0].peak_memory_bytes if measured else None,
        "fits": None if budget is None else costs.fits(size, steps, budget),
        "throughput_samples_per_second": costs.predict_throughput(size, steps),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'micro-batch':>11}  {'predicted peak':>14}  {'measured':>10}  {'fits':>4}  {'samples/s':>9}"]
    for row in rows:
        measured = row["measured_peak_memory_bytes"]
        fits = {None: "", True: "yes", False: "no"}[row["fits"]]
        lines.append(
            f"{row['micro_batch_size']:>11}  {format_bytes(row['predicted_peak_memory_bytes']):>14}  "
            f"{'' if measured is None else format_bytes(measured):>10}  {fits:>4}  "
            f"{row['throughput_samples_per_second']:>9,.0f}"
        )
    return "\n".join(lines)
