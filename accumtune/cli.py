"""The command line: `accumtune probe`, `ui`, `best`, `export`, `verify`, `sync`.

Exit codes, for pipelines: 0 fine; 1 the answer is no (nothing fits, a search without a result, a configuration that
does not hold here, values not delivered); 2 wrong usage or input, with the reason on the standard error. What was
asked for is on the standard output, everything else on the standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accumtune.errors import (
    AccumtuneError,
    BudgetTooSmallError,
    DataError,
    NoResultError,
    SearchDirectoryError,
    VerificationError,
)
from accumtune.memory.budget import format_bytes, parse_budget


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `accumtune` command."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (VerificationError, NoResultError, BudgetTooSmallError) as error:
        print(f"accumtune: {error}", file=sys.stderr)
        return 1
    except AccumtuneError as error:
        print(f"accumtune: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accumtune",
        description="Find the micro-batch size and accumulation steps to train a Keras model with, given this much "
        "memory.",
        epilog="Exit codes: 0 fine; 1 the answer is no (nothing fits, no result, a configuration does not hold here, "
        "values not delivered); 2 wrong usage or input.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    probe = commands.add_parser("probe", help="which micro-batch sizes of a model fit in a memory budget")
    probe.add_argument("build_model", metavar="MODULE:build_model", help="a Keras Tuner build function")
    probe.add_argument("--data", required=True, metavar="MODULE:load", help="a function that returns (x, y)")
    probe.add_argument("--memory-budget", default=None, help='for example "2GiB", or "80%%" of the device')
    probe.add_argument("--micro-batch-sizes", type=int, nargs="+", default=None)
    probe.add_argument("--accumulation-steps", type=int, default=2)
    probe.add_argument("--json", action="store_true", help="print JSON instead of a table")
    probe.add_argument("--plot", metavar="FILE", default=None, help="draw the table, for example into probe.png")
    probe.set_defaults(run=_probe)

    ui = commands.add_parser("ui", help="open a search in the MLflow UI")
    ui.add_argument("search", nargs="?", default=None, help="a search's directory; default: the newest")
    ui.add_argument("--tracking-uri", default=None)
    ui.add_argument("--port", type=int, default=None, help="default: 5000, or a free one where that is taken")
    ui.add_argument("--print", action="store_true", help="print the command and the address, start nothing")
    ui.set_defaults(run=_ui)

    best = commands.add_parser("best", help="the best configuration of a search")
    best.add_argument("search", nargs="?", default=None, help="a search's directory; default: the newest")
    _add_policy(best)
    best.add_argument("--save", metavar="FILE", default=None)
    best.add_argument("--json", action="store_true")
    best.set_defaults(run=_best)

    export = commands.add_parser("export", help="a configuration as a file, or as arguments for plain Keras")
    export.add_argument("source", nargs="?", default=None, help="a search's directory (default: the newest), or a "
                        "configuration: a path, runs:/..., models:/NAME@best, an experiment's name")  # fmt: skip
    export.add_argument("--output", "-o", metavar="FILE", default=None, help="default: print it")
    export.add_argument("--format", default="json", choices=("json", "keras"), help="keras: arguments for Keras's own "
                        "gradient_accumulation_steps, and where that differs")  # fmt: skip
    _add_policy(export)
    export.add_argument("--tracking-uri", default=None)
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify", help="does a configuration hold on this machine? exit code 1 if not")
    verify.add_argument("config", help="a path, runs:/RUN_ID/best_config.json, models:/NAME@best, an experiment's name")
    verify.add_argument("build_model", metavar="MODULE:build_model")
    verify.add_argument("--data", required=True, metavar="MODULE:load", help="a function that returns (x, y)")
    verify.add_argument("--peak-tolerance", type=float, default=0.1, help="share by which peak memory may differ")
    verify.add_argument("--whole", action="store_true", help="train the winning trial again, and compare its objective "
                        "too; then load returns (x, x_val, y, y_val)")  # fmt: skip
    verify.add_argument("--objective-tolerance", type=float, default=1e-6, help="with --whole; default: 1e-6")
    verify.add_argument("--json", action="store_true", help="print JSON instead of text")
    verify.add_argument("--tracking-uri", default=None)
    verify.set_defaults(run=_verify)

    sync = commands.add_parser("sync", help="bring a search's journals into MLflow, after it was unreachable")
    sync.add_argument("search", nargs="?", default=None, help="a search's directory; default: the newest")
    sync.add_argument("--tracking-uri", default=None)
    sync.set_defaults(run=_sync)
    return parser


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", default="quality", choices=("quality", "memory", "throughput", "balanced"))
    command.add_argument("--tolerance", type=float, default=0.01, help="share of the objective that counts as noise")


def _probe(options: argparse.Namespace) -> int:
    from accumtune.memory.machine import device_memory
    from accumtune.trials.profiling import profile

    device = device_memory()
    budget = None if options.memory_budget is None else parse_budget(options.memory_budget)
    if not options.json:
        print(device.describe(), flush=True)

    build_model, (x, y) = load_object(options.build_model), _load_data(options.data)
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
        from accumtune.memory.picture import draw_profile

        draw_profile(rows, budget, options.accumulation_steps, options.plot)
    if options.json:
        answer = {"largest_micro_batch_size": largest, "memory_budget_bytes": budget, "device": vars(device)}
        print(json.dumps({**answer, "sizes": rows}, indent=2))
    else:
        if rows:
            print(_table(rows))
        if budget is not None:
            text = "none: not even 1 fits" if largest is None else str(largest)
            print(f"Largest micro-batch in {format_bytes(budget)} ({options.accumulation_steps} steps): {text}")
    return 0 if budget is None or largest is not None else 1


def _sizes(options: argparse.Namespace, costs: Any) -> list[int]:
    from accumtune.trials.profiling import DEFAULT_MICRO_BATCH_SIZES

    probed = {measurement.micro_batch_size for measurement in costs.measurements}
    return sorted(probed | set(options.micro_batch_sizes or DEFAULT_MICRO_BATCH_SIZES))


def _row(costs: Any, size: int, steps: int, budget: int | None) -> dict[str, Any]:
    measured = [m for m in costs.measurements if (m.micro_batch_size, m.accumulation_steps) == (size, steps)]
    return {
        "micro_batch_size": size,
        "predicted_peak_memory_bytes": costs.predict_peak_memory(size, steps),
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


def _ui(options: argparse.Namespace) -> int:
    from accumtune.tracking.browsing import free_port

    tracker = _tracker(options)
    tracker.sync()
    port = options.port or free_port()
    command, address = tracker.ui_command(port), tracker.ui_address(port)
    print(f"{command}\nthen open {address}" if command else f"Open {address}", flush=True)
    if options.print or not command:
        return 0
    # The address, which may hold a password, by the environment: everyone can read a command line.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": tracker.tracking_uri}
    ui = [sys.executable, "-m", "mlflow", "ui", "--port", str(port)]
    try:
        return subprocess.call(ui, env=environment)
    except KeyboardInterrupt:  # the user's way to end it
        return 0


def _best(options: argparse.Namespace) -> int:
    from accumtune.search import results
    from accumtune.search.selection import pareto_front

    record, found, config = _choose(find_search(options.search), options)
    if options.save:
        config.save(options.save)
    if options.json:
        print(config.to_json())
        return 0
    print(results.summary(record, found, limit=10))
    print(f"\n{config}\nWhy: {config.reason}")
    print(f"{len(pareto_front(found, record.objective_direction))} candidates on the Pareto front")
    return 0


def _choose(folder: Path, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A search, its candidates, and the configuration of the one that the policy chooses."""
    from accumtune.search import results
    from accumtune.search.selection import select
    from accumtune.tracking.journal import read_search
    from accumtune.tracking.mlflow import read_cache
    from accumtune.trials.directory import SearchDirectory

    files = SearchDirectory(folder)
    record, tracked = read_search(files.path), read_cache(files.path)
    found = results.candidates(record, files.profiles_folder)
    choice = select(found, options.policy, options.tolerance, record.objective_direction)
    run_id, tracking_uri = tracked.get("parent_run_id"), tracked.get("tracking_uri")
    return record, found, results.training_config(record, choice, run_id, tracking_uri)


def _export(options: argparse.Namespace) -> int:
    from accumtune.config import load_config

    if options.source is None or (Path(options.source) / "search.jsonl").exists():
        _, _, config = _choose(find_search(options.source), options)
    else:
        config = load_config(options.source, tracking_uri=options.tracking_uri)
    if options.format == "json" and options.output:
        config.save(options.output)
        return 0
    text = config.to_json() if options.format == "json" else f"{config.keras_arguments()}\n"
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from accumtune.config import load_config

    config = load_config(options.config, tracking_uri=options.tracking_uri)
    build_model, (x, y) = load_object(options.build_model), _load_data(options.data)
    if not options.whole:
        told: Any = config.verify(build_model, x, y, peak_tolerance=options.peak_tolerance)
        holds = True
    else:
        told = config.reproduce(build_model, x, y, validation_data=_load_validation_data(options.data))
        holds = told.holds(options.objective_tolerance, options.peak_tolerance)
    print(json.dumps(asdict(told), indent=2) if options.json else told)
    return 0 if holds else 1


def _sync(options: argparse.Namespace) -> int:
    tracker = _tracker(options)
    tracker.sync()
    print(f"Everything is in MLflow: run {tracker.parent_run_id}")
    return 0


def _tracker(options: argparse.Namespace) -> Any:
    from accumtune.tracking.mlflow import Tracker, read_cache

    folder = find_search(options.search)
    return Tracker(folder, options.tracking_uri or read_cache(folder).get("tracking_uri"))


def find_search(path: str | None, searches: str = "mlruns/searches") -> Path:
    """The directory of a search: the given one, or the newest in the default place.

    Raises:
        SearchDirectoryError: there is none.
    """
    if path is not None:
        candidates = [Path(path)]
    else:
        journals = Path(searches).glob("*/search.jsonl")
        candidates = [file.parent for file in sorted(journals, key=os.path.getmtime, reverse=True)]
    for folder in candidates:
        if (folder / "search.jsonl").exists():
            return folder
    raise SearchDirectoryError(
        f"Received {path or searches!r}, which holds no search.",
        "a directory with a search.jsonl, such as mlruns/searches/<project_name>.",
        "run a search first, or give its directory.",
    )


def load_object(address: str) -> Any:
    """What `MODULE:name` means; the working directory is searched for modules too.

    Raises:
        DataError: there is no such module or name.
    """
    module_name, _, name = address.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"Received {address!r}: {error}",
            "MODULE:NAME, a name in a module that can be imported from here.",
            "for a file train.py with a function build_model: train:build_model.",
        ) from error
    return value


def _load_data(address: str) -> tuple[Any, Any]:
    data = _loaded(address)
    if isinstance(data, tuple) and len(data) == 2:
        return data
    if isinstance(data, tuple) and len(data) == 4:
        return data[0], data[2]
    if isinstance(data, tuple):
        raise DataError(f"{address} returned {len(data)} values.", "(x, y).", "return x and y.")
    return load_object(address), None


def _load_validation_data(address: str) -> tuple[Any, Any] | None:
    data = _loaded(address)
    return (data[1], data[3]) if isinstance(data, tuple) and len(data) == 4 else None


def _loaded(address: str) -> Any:
    data = load_object(address)()
    # scikit-learn's train_test_split returns (x, x_val, y, y_val) as a list.
    return tuple(data) if isinstance(data, list) and len(data) == 4 else data
