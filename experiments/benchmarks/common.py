"""The shared parts of benchmarks: `--json` and `--results`, tables, and the environment of their child processes."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MIB = 2**20


def parser(doc: str | None, results: Path | None = None) -> argparse.ArgumentParser:
    """Returns a parser whose help is the script's docstring, with `--json`.

    Args:
        doc: the script's `__doc__`.
        results: where `--results` keeps one file per row by default; without it there is no such option.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to this file")
    if results is not None:
        text = f"a folder of one JSON file per row; what is there is not measured again (default: {results})"
        made.add_argument("--results", type=Path, default=results, help=text)
    return made


def keep(path: Path | None, figures: Any) -> None:
    """Writes figures as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")


def child_environment(**more: str) -> dict[str, str]:
    """Returns the environment of a process that imports accumtune from this repository, with quiet frameworks."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", **more}


class Table:
    """Prints rows under aligned titles.

    Args:
        columns: title -> format of its values, such as `">8.2f"`. A value of None prints as "-".
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns

    def print_header(self) -> None:
        print("  ".join(format(title, _alignment(spec)) for title, spec in self._columns.items()), flush=True)

    def print_row(self, *values: Any) -> None:
        cells = zip(values, self._columns.values(), strict=True)
        print("  ".join(format("-", _alignment(s)) if v is None else format(v, s) for v, s in cells), flush=True)


def _alignment(spec: str) -> str:
    """`">8"` of `">+8,.2f"`."""
    found = re.match(r"([<>^]?)\+?(\d+)", spec)
    assert found, spec
    return f"{found[1] or '<'}{found[2]}"
