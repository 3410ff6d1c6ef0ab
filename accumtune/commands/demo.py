"""`accumtune demo`: the first search, with nothing to write."""

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
        "It trains a small network on this machine, prints what it found, and how to browse it in MLflow. "
        "`accumtune best`, `candidates` and `ui` then have something to show.",
    )  # fmt: skip
    command.add_argument("--trials", metavar="N", type=count, default=5, help="default: 5; the README's example has 12")
    command.add_argument("--epochs", metavar="N", type=count, default=3, help="default: 3; the README's example has 6")
    command.add_argument("--overwrite", action="store_true", help="begin anew instead of going on")
    add_json(command, "print the configuration alone, as JSON")


def run(options: argparse.Namespace) -> int:
    config = f"{SEARCHES}/{_PROJECT}/best_config.json"
    arguments = ["--project-name", _PROJECT, "--config", config]
    arguments += ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    arguments += ["--overwrite"] if options.overwrite else []
    # -P: beside the copy in the wheel lie modules that are to be imported as accumtune's alone.
    command = [sys.executable, "-P", str(script()), *arguments]
    with without_notes():
        # With --json what the search prints is not what was asked for.
        code = subprocess.call(command, stdout=sys.stderr if options.json else None)
    if code < 0:  # ended by a signal
        return 128 - code
    if code == 1:  # Python's own, after an exception: no answer
        return os.EX_SOFTWARE
    if not options.json:
        return code
    if code == 0:
        print(Path(config).read_text())
    return code


def script() -> Path:
    """The digits search: of the repository, or the copy that pyproject.toml puts into the wheel."""
    package = Path(accumtune.__file__).parent
    packaged = package / "demo.py"
    return packaged if packaged.exists() else package.parent / "experiments" / "digits.py"
