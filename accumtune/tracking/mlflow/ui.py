"""Makes the command that starts MLflow's UI, and the address at which it shows a search."""

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
    """Returns the command that starts the UI from the working directory; "" if a server serves it already."""
    if server_address(tracking_uri):
        return ""
    uri = without_credentials(tracking_uri)
    path = sqlite_path(uri)
    if path is not None and path.is_relative_to(Path.cwd()):
        uri = f"sqlite:///{path.relative_to(Path.cwd())}"
    return shlex.join([_mlflow(), "ui", "--backend-store-uri", uri, "--port", str(port)])


def ui_address(tracking_uri: str, experiment_id: str, view_key: str | None, port: int = UI_PORT) -> str:
    """Returns the address at which the UI shows a search.

    Args:
        tracking_uri: of the store.
        experiment_id: the search's.
        view_key: of its saved view; None for the plain list of runs.
        port: of the UI on this machine, unless a server serves it.
    """
    server = server_address(tracking_uri) or f"http://127.0.0.1:{port}"
    # Without `workflowType`, MLflow 3 shows its pages for prompts and traces.
    address = f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return f"{address}&viewStateShareKey={view_key}" if view_key else address


def server_address(tracking_uri: str) -> str:
    """Returns the address of an MLflow server, without credentials; "" for a database."""
    uri = without_credentials(tracking_uri)
    return uri.rstrip("/") if urlsplit(uri).scheme in ("http", "https") else ""


def free_port(preferred: int = UI_PORT) -> int:
    """Returns the preferred port on 127.0.0.1, or a free one if that is taken."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    return preferred


def _mlflow() -> str:
    """Returns how to call `mlflow` from here: by its path, if its virtual environment is not active."""
    beside = Path(sys.executable).parent / "mlflow"
    if shutil.which("mlflow") is not None or not beside.exists():
        return "mlflow"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
