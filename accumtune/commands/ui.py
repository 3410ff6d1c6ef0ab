"""`accumtune ui`: opens a search in the MLflow UI."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from accumtune.commands.options import add_command, add_json, add_search, add_tracking_uri, count, print_json
from accumtune.commands.searches import tracker_of


def add(commands: Any) -> None:
    command = add_command(commands, "ui", "open a search in the MLflow UI", run, "Ctrl-C stops the UI.")
    add_search(command)
    add_tracking_uri(command)
    command.add_argument(
        "--port", metavar="N", type=count, default=None, help="default: 5000, or a free one where that is taken"
    )
    command.add_argument("--print", action="store_true", help="print the command and the address, start nothing")
    add_json(command, "print them as JSON, start nothing")


def run(options: argparse.Namespace) -> int:
    from accumtune.tracking.mlflow.ui import free_port

    tracker = tracker_of(options)
    tracker.sync()
    port = options.port or free_port()
    command, address = tracker.ui_command(port), tracker.ui_address(port)
    if options.json:
        print_json({"command": command or None, "address": address})
        return 0
    print(f"{command}\nthen open {address}" if command else f"Open {address}", flush=True)
    if options.print or not command:
        return 0
    # The store's address may hold a password: other users can read a command line, but not the environment.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": str(tracker.tracking_uri)}
    ui = [sys.executable, "-m", "mlflow", "ui", "--port", str(port)]
    return serve(ui, environment)


def serve(command: list[str], environment: Mapping[str, str]) -> int:
    """Runs a server until it ends by itself or by Ctrl-C or SIGTERM; its children end with it."""
    # A process group of its own: `mlflow ui` leaves the server that it has started running.
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        signal.signal(signal.SIGTERM, lambda *_: _end_group(server))
        try:
            return server.wait()
        except KeyboardInterrupt:
            _end_group(server)
            return 0


def _end_group(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself; macOS then says that it is not permitted
        os.killpg(server.pid, signal.SIGTERM)
