"""Says how to look at a search in MLflow's UI: the command that starts it, and the address that opens the search."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from accumtune.tracking.tracking_uri import sqlite_path, without_credentials

UI_PORT = 5000


def ui_command(tracking_uri: str, port: int = UI_PORT) -> str:
    """The command that starts the UI from the working directory; "" where a server has it already."""
    if server_address(tracking_uri):
        return ""
    uri = without_credentials(tracking_uri)
    path = sqlite_path(uri)
    if path is not None and path.is_relative_to(Path.cwd()):
        uri = f"sqlite:///{path.relative_to(Path.cwd())}"
    return shlex.join([_mlflow(), "ui", "--backend-store-uri", uri, "--port", str(port)])


def ui_address(tracking_uri: str, experiment_id: str, view_key: str | None, port: int = UI_PORT) -> str:
    """Where the UI shows a search.

    Args:
        tracking_uri: MLflow's.
        experiment_id: the search's.
        view_key: of its saved view; None for the plain list of runs.
        port: of the UI, where no server has it.
    """
    server = server_address(tracking_uri) or f"http://127.0.0.1:{port}"
    # Without the workflow's name MLflow 3 shows its pages for prompts and traces.
    address = f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return f"{address}&viewStateShareKey={view_key}" if view_key else address


def server_address(tracking_uri: str) -> str:
    """The address of an MLflow server, without credentials; "" for a database."""
    uri = without_credentials(tracking_uri)
    return uri.rstrip("/") if urlsplit(uri).scheme in ("http", "https") else ""


def free_port(preferred: int = UI_PORT) -> int:
    """The preferred port of the loopback, or another one where that is taken."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    return preferred


def _mlflow() -> str:
    """The program as it can be called from here: in a virtual environment that is not active, by its path."""
    beside = Path(sys.executable).parent / "mlflow"
    if shutil.which("mlflow") is not None or not beside.exists():
        return "mlflow"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
