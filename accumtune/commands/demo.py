"""`accumtune demo`: the first search, with nothing to write."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import accumtune
from accumtune.commands.options import add_command
from accumtune.commands.searches import SEARCHES

_BRIEF = ("--trials", "5", "--epochs", "3")


def add(commands: Any) -> None:
    command = add_command(
        commands, "demo", "a search on scikit-learn's digits under 8 MiB, in about a minute", run,
        "It trains a small network on this machine, prints what it found, and how to browse it in MLflow. "
        "`accumtune best`, `candidates` and `ui` then have something to show.",
    )  # fmt: skip
    command.add_argument("--whole", action="store_true", help="12 trials of 12 epochs, as in the README: three minutes")
    command.add_argument("--overwrite", action="store_true", help="begin anew instead of going on")


def run(options: argparse.Namespace) -> int:
    project = "demo_whole" if options.whole else "demo"
    arguments = [] if options.whole else [*_BRIEF]
    arguments += ["--project-name", project, "--config", f"{SEARCHES}/{project}/best_config.json"]
    arguments += ["--overwrite"] if options.overwrite else []
    return subprocess.call([sys.executable, str(script()), *arguments])


def script() -> Path:
    """The digits search: of the repository, or the copy that pyproject.toml puts into the wheel."""
    package = Path(accumtune.__file__).parent
    packaged = package / "demo.py"
    return packaged if packaged.exists() else package.parent / "experiments" / "digits.py"
