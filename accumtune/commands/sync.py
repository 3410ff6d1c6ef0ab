"""`accumtune sync`: copies a search's journals to MLflow."""

from __future__ import annotations

import argparse
from typing import Any

from accumtune.commands.options import add_command, add_json, add_search, add_tracking_uri, print_json
from accumtune.commands.searches import end_abandoned, tracker_of


def add(commands: Any) -> None:
    command = add_command(
        commands, "sync", "copy a search's journals to MLflow, after it was unreachable", run,
        "Running it again copies nothing twice. A search whose process was killed is marked as ended. "
        "Exit code 1: MLflow did not accept all values.",
    )  # fmt: skip
    add_search(command)
    add_tracking_uri(command)
    add_json(command)


def run(options: argparse.Namespace) -> int:
    tracker = tracker_of(options)
    end_abandoned(tracker.folder)
    tracker.sync()
    if options.json:
        print_json({"run_id": tracker.parent_run_id, "experiment_id": tracker.experiment_id})
    else:
        print(f"Everything is in MLflow: run {tracker.parent_run_id}")
    return 0
