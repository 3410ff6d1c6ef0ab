"""`accumtune demo`: a first search, without a script to write."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accumtune
from accumtune.commands.options import add_command, add_json, count
from accumtune.commands.searches import SEARCHES
from accumtune.worker.quiet_imports import without_notes

_PROJECT = "demo"


def add(commands: Any) -> None:
    command = add_command(
        commands, "demo", "a search on scikit-learn's digits under 8 MiB, in about a minute", run,
        "Trains a small network on this machine, and prints what it found and how to browse it in MLflow. "
        "Afterwards `accumtune best`, `candidates` and `ui` show this search.",
    )  # fmt: skip
    command.add_argument("--trials", metavar="N", type=count, default=5, help="default: 5; the README's example has 12")
    command.add_argument("--epochs", metavar="N", type=count, default=3, help="default: 3; the README's example has 6")
    command.add_argument("--overwrite", action="store_true", help="delete the earlier demo instead of resuming it")
    add_json(command, "print the configuration alone, as JSON")


def run(options: argparse.Namespace) -> int:
    config = f"{SEARCHES}/{_PROJECT}/best_config.json"
    arguments = ["--project-name", _PROJECT, "--config", config]
    arguments += ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    arguments += ["--overwrite"] if options.overwrite else []
    # -P keeps the script's folder off sys.path: in the wheel that is accumtune's own, full of modules.
    command = [sys.executable, "-P", str(script()), *arguments]
    with without_notes():
        # With --json only the configuration goes to the standard output.
        code = subprocess.call(command, stdout=sys.stderr if options.json else None)
    if code < 0:  # ended by a signal
        return 128 - code
    if code == 1:  # Python's own, after an exception
        return os.EX_SOFTWARE
    if not options.json:
        return code
    if code == 0:
        print(Path(config).read_text())
    return code


def script() -> Path:
    """Returns the path of the digits search: the repository's, or the copy that pyproject.toml puts into the wheel."""
    package = Path(accumtune.__file__).parent
    packaged = package / "demo.py"
    return packaged if packaged.exists() else package.parent / "experiments" / "digits.py"
