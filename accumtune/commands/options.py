"""Declares what commands share: their form, the options that mean the same everywhere, and tab completion."""

from __future__ import annotations

import argparse
import ast
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from accumtune.commands.searches import all_searches

EXIT_CODES = """\
exit codes:
  0  success
  1  the answer is no: nothing fits, a search has no result, a configuration does not hold on this machine, MLflow did
     not accept all values
  2  wrong usage or input, with the reason on the standard error
  70  an internal error of accumtune, with its traceback
  130  ended by Ctrl-C
  141  the reader of the output, such as `head`, has closed it"""


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int], more: str = ""
) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
        commands: what `add_subparsers` returned.
        summary: one line, for the list of commands.
        run: runs the command and returns its exit code.
        more: the rest of the command's help.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{textwrap.fill(more, 100)}" if more else ""),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_search(command: argparse.ArgumentParser) -> None:
    search: Any = command.add_argument(
        "search", nargs="?", default=None,
        help="a search's project_name or directory; default: the newest in mlruns/searches",
    )  # fmt: skip
    search.completer = lambda **_: [it for folder in all_searches() for it in (folder.name, str(folder))]


def add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", default="quality", choices=("quality", "memory", "throughput", "balanced"))
    command.add_argument(
        "--tolerance", metavar="SHARE", type=share, default=0.01,
        help="relative difference of objectives that counts as noise; default: 0.01",
    )  # fmt: skip


_TRACKING_URI = "MLflow's tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlruns/mlflow.db"


def add_tracking_uri(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tracking-uri", metavar="URI", default=None, help=_TRACKING_URI)


def add_json(command: argparse.ArgumentParser, what: str = "print JSON instead of text") -> None:
    command.add_argument("--json", action="store_true", help=what)


def add_model_and_data(command: argparse.ArgumentParser) -> None:
    build_model: Any = command.add_argument(
        "build_model", metavar="MODULE:build_model", help="a Keras Tuner build function: train:build_model in train.py"
    )
    data: Any = command.add_argument(
        "--data", required=True, metavar="MODULE:load",
        help="a function that returns (x, y), (x, x_val, y, y_val) as scikit-learn's train_test_split, "
        "((x, y), (x_test, y_test)) as keras.datasets, or a data set",
    )  # fmt: skip
    build_model.completer = data.completer = functions_here


def share(text: str) -> float:
    """Reads a finite number of at least 0. NaN is refused because every comparison with it is false."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# argparse's message has the function's name: "invalid positive whole number value: '0'".
share.__name__, count.__name__ = "non-negative number", "positive whole number"


def print_json(values: Any, file: TextIO | None = None) -> None:
    print(json.dumps(_finite(values), indent=2, allow_nan=False), file=file)


def _finite(values: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def functions_here(prefix: str = "", **_: Any) -> Iterator[str]:
    """Yields `MODULE:name` for each function in this folder's files, which are parsed and not run."""
    for file in sorted(Path().glob("*.py")):
        if not file.stem.startswith(prefix.partition(":")[0][: len(file.stem)]):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from (f"{file.stem}:{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef))
