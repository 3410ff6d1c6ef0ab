"""Declares what several commands share: a command, options that mean the same everywhere, and their completion."""

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
  0  fine
  1  the answer is no: nothing fits, a search without a result, a configuration that does not hold here, values that
     MLflow did not take
  2  wrong usage or input, with the reason on the standard error
  70  an error of accumtune's own, with its traceback
  130, 141  Ctrl-C; whoever reads the output has read enough, such as `head`"""


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int], more: str = ""
) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
        commands: what `add_subparsers` returned.
        summary: one line, for the list of commands.
        run: does it and returns the exit code.
        more: what else its own help says.
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
        help="share of the objective that counts as noise; default: 0.01",
    )  # fmt: skip


_TRACKING_URI = "MLflow's; default: MLFLOW_TRACKING_URI, else sqlite:///mlruns/mlflow.db"


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
    """A finite number of at least 0: with NaN every comparison would be false."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# argparse calls a type by its name: "invalid count value: '0'".
share.__name__, count.__name__ = "non-negative number", "positive whole number"


def print_json(values: Any, file: TextIO | None = None) -> None:
    print(json.dumps(_finite(values), indent=2, allow_nan=False), file=file)


def _finite(values: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def functions_here(prefix: str = "", **_: Any) -> Iterator[str]:
    """`MODULE:name` of the functions in this folder's files, which are read and not run."""
    for file in sorted(Path().glob("*.py")):
        if not file.stem.startswith(prefix.partition(":")[0][: len(file.stem)]):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from (f"{file.stem}:{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef))
