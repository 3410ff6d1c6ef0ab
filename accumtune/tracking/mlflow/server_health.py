"""Checks that a tracking server answers, because MLflow's own retries take minutes, and notes when it last did."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import socket
import time
import urllib.error
import urllib.request
from typing import Any

from accumtune.errors import TrackingError
from accumtune.tracking.redaction import redacted
from accumtune.tracking.tracking_uri import server_of, without_credentials

_CONNECT_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
# An environment variable: the hosts, separated by commas, that may hold artifacts beside the tracking server.
_ALLOWED_HOSTS = "ACCUMTUNE_ARTIFACT_HOSTS"
# Schemes of artifacts for which MLflow sends the user's credentials to the host in the address.
_WITH_CREDENTIALS = ("http", "https", "mlflow-artifacts", "ftp", "sftp")


def check_reachable(uri: str) -> None:
    """Connects to a tracking server and closes the connection.

    Raises:
        TrackingError: the server does not answer, or its address cannot be read.
    """
    try:
        server = server_of(uri)
    except ValueError as error:
        raise TrackingError(
            f"The tracking store's address {without_credentials(uri)} cannot be read: {redacted(str(error), uri)}.",
            "scheme://user:password@host:port/path",
            "percent-encode special characters of user and password, such as %23 for #, %2F for / and %3F for ?.",
        ) from None
    if server is None or server[0] not in _PORTS:
        return
    scheme, host, port = server
    with contextlib.suppress(KeyError):
        # Only the proxy can reach the server.
        if urllib.request.getproxies()[scheme] and not urllib.request.proxy_bypass(host):
            return
    try:
        socket.create_connection((host, port or _PORTS[scheme]), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise TrackingError(
            f"The tracking server {without_credentials(uri)} does not answer: {redacted(str(error), uri)}.",
            "a running MLflow server",
            "start it, or check the address. Nothing is lost: the search's directory has all results.",
        ) from None


def refuse_other_server(tracking_uri: str, artifact_uri: str) -> None:
    """Refuses artifacts on a server that the user has not named.

    MLflow sends the user's token to the host of an experiment's artifacts, and anybody who may create an experiment
    can choose that host. Folders, and cloud storage with its own credentials, are allowed.

    Raises:
        TrackingError: the artifacts are on such a server.
    """
    try:
        there, ours = server_of(artifact_uri), server_of(tracking_uri)
    except ValueError:
        there, ours = ("http", "", None), None
    if there is None or there[0] not in _WITH_CREDENTIALS:
        return
    if there[1] and there[1] in os.environ.get(_ALLOWED_HOSTS, "").split(","):
        return
    if ours is not None and ours[0] in _WITH_CREDENTIALS:
        # Artifacts of MLflow's own kind are fetched with the tracking server's scheme.
        scheme = ours[0] if there[0] == "mlflow-artifacts" else there[0]
        if there[1] == ours[1] and (there[2] or _PORTS.get(scheme)) == (ours[2] or _PORTS[ours[0]]):
            return
    raise TrackingError(
        f"The tracking store {without_credentials(tracking_uri)} keeps its artifacts at "
        f"{without_credentials(artifact_uri)}.",
        "artifacts on the tracking server, in a folder or in cloud storage; your token is not sent to another server",
        f"if you trust that server, set {_ALLOWED_HOSTS}={there[1] or '<host>'} in the environment.",
    )


def is_answering(uri: str) -> bool:
    """Returns whether an MLflow server answers a request now; False for stores that are not servers.

    A call during which a server goes down may wait in MLflow's retries for minutes, long after the server is back.
    """
    address = without_credentials(uri)
    if not address.startswith(("http:", "https:")):
        return False
    try:
        urllib.request.urlopen(address.rstrip("/") + "/health", timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


class Heartbeat:
    """Notes when a store last answered.

    Args:
        is_local: whether the store is a file on this machine, which may be slow but is never silent.
    """

    def __init__(self, is_local: bool) -> None:
        self._heard_at = math.inf if is_local else time.monotonic()

    def beat(self) -> None:
        self._heard_at = max(self._heard_at, time.monotonic())

    def silent_seconds(self) -> float:
        """Returns the seconds since the last answer; 0 for a file."""
        return max(0.0, time.monotonic() - self._heard_at)


class MonitoredClient:
    """Wraps MLflow's client; each call that returns is a beat of the store's heartbeat."""

    def __init__(self, client: Any, heartbeat: Heartbeat) -> None:
        self._client = client
        self._heartbeat = heartbeat

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **keywords: Any) -> Any:
            answer = value(*arguments, **keywords)
            self._heartbeat.beat()
            return answer

        return call
