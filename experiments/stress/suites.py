"""Runs another project's tests with and without accumtune, and lists those that pass only without it.

The suite's files are not copied. Each run is a child process with a pytest plugin, which switches accumtune on (or not)
and writes the outcome of each test as a line of a file: so a killed run keeps its earlier outcomes.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTCOMES = "ACCUMTUNE_STRESS_OUTCOMES"
VARIANT = "ACCUMTUNE_STRESS_VARIANT"  # what a plugin switches on; empty for the suite as it is


class Recorder:
    """A pytest plugin that appends each test's outcome to the file that the environment names.

    Attributes:
        note: what else is worth knowing of the test that runs.
    """

    def __init__(self) -> None:
        self._file = Path(os.environ[OUTCOMES])
        self.note = ""

    def pytest_runtest_setup(self) -> None:
        self.note = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        reason = "" if report.outcome == "passed" else _last_error(report.longreprtext)
        row = {"test": report.nodeid, "outcome": report.outcome, "reason": reason, "note": self.note}
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _last_error(text: str) -> str:
    """The first line of the exception that a test ended with, not of one that caused it."""
    text = re.split(r"^(?:The above exception was the direct cause|During handling of the above)", text, flags=re.M)[-1]
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ") and line[1:].strip()]
    return (errors or [line for line in text.splitlines() if line.strip()] or [""])[0][:300]


def run(
    files: Sequence[Path],
    plugin: str,
    variant: str,
    folder: Path,
    timeout_seconds: float,
) -> dict[str, dict[str, str]]:
    """Runs test files in one child process.

    Args:
        files: of the suite.
        plugin: the module beside this one that pytest loads.
        variant: what the plugin switches on; "" for nothing.
        folder: where outcomes and pytest's output go.
        timeout_seconds: the child is killed after it, and what it had not run is missing.

    Returns:
        test's id -> its row: `outcome` ("passed", "failed", "skipped"), `reason` and `note`.
    """
    name = variant or "untouched"
    outcomes = folder / f"{name}.jsonl"
    outcomes.unlink(missing_ok=True)
    own = {OUTCOMES: str(outcomes), VARIANT: variant, "PYTHONPATH": os.pathsep.join([str(HERE), *_python_path()])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors", *map(str, files)]
    with (folder / f"{name}.log").open("w") as log:
        try:
            subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, **own},
                stdout=log,
                stderr=log,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {timeout_seconds:.0f} s; the tests that it had not run are missing below.")
    if not outcomes.exists():
        sys.exit(f"{name}: no test ran.\n{(folder / f'{name}.log').read_text()[-3000:]}")
    return {row["test"]: row for row in map(json.loads, outcomes.read_text().splitlines())}


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def test_files(folder: Path, only: Sequence[str]) -> list[Path]:
    """The suite's `*_test.py` whose path holds one of the given parts; exits where there are none."""
    files = sorted(path for path in folder.rglob("*_test.py") if any(part in path.as_posix() for part in only))
    if not files:
        sys.exit(
            f"{folder} holds no *_test.py whose path contains one of {', '.join(only)}: see --help for what to unpack."
        )
    return files


def reason_for(test: str, documented: Mapping[str, str]) -> str | None:
    """Why a difference is meant, where it is documented: keys are patterns of a test's id."""
    return next((reason for pattern, reason in documented.items() if fnmatch.fnmatch(test, f"*{pattern}*")), None)


def report(
    untouched: Mapping[str, Mapping[str, str]],
    changed: Mapping[str, Mapping[str, Mapping[str, str]]],
    documented: Mapping[str, str],
) -> dict[str, Any]:
    """Prints what passes only in the untouched run, and counts it.

    Args:
        untouched: outcomes of the suite as it is.
        changed: outcomes by variant.
        documented: patterns of tests that may differ, and why.

    Returns:
        What was printed, for `--json`; `undocumented` lists the differences without a reason.
    """
    rows = []
    passed = {test for test, row in untouched.items() if row["outcome"] == "passed"}
    print(f"{'':24} {'tests':>6} {'passed':>7} {'failed':>7} {'skipped':>8} {'lost':>5}")
    for name, outcomes in {"untouched": untouched, **changed}.items():
        counts = Counter(row["outcome"] for row in outcomes.values())
        lost = [test for test in passed if outcomes.get(test, {}).get("outcome") != "passed"]
        numbers = (len(outcomes), counts["passed"], counts["failed"], counts["skipped"], len(lost))
        print(f"{name:24} {numbers[0]:>6} {numbers[1]:>7} {numbers[2]:>7} {numbers[3]:>8} {numbers[4]:>5}")
        for test in sorted(lost):
            row = outcomes.get(test, {"outcome": "missing", "reason": "it did not run", "note": ""})
            rows.append({"variant": name, "test": test, **row, "documented": reason_for(test, documented)})
    notes = {test: row["note"] for outcomes in changed.values() for test, row in outcomes.items() if row["note"]}
    print(f"\nNotes: {len(notes)}", *(f"  {test}\n      {note}" for test, note in sorted(notes.items())), sep="\n")
    _print_rows("Differences with a reason", [row for row in rows if row["documented"]])
    undocumented = [row for row in rows if not row["documented"]]
    _print_rows("Differences without a reason", undocumented)
    seen = {row["documented"] for row in rows}
    unseen = [pattern for pattern, reason in documented.items() if reason not in seen]
    if unseen:
        print("\nDocumented, but no difference now:", *(f"  {pattern}" for pattern in unseen), sep="\n")
    print(f"\n{len(undocumented)} differences are unexplained." if undocumented else "\nNothing is unexplained.")
    return {"passed_untouched": len(passed), "lost": rows, "notes": notes, "undocumented": len(undocumented)}


def _print_rows(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    print(f"\n{title}: {len(rows)}")
    for row in rows:
        print(f"  {row['variant']}  {row['test']}")
        print(f"      {row['documented'] or row['outcome'] + ': ' + row['reason']}")
