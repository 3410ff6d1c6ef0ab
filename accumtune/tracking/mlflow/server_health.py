"""Checks that a tracking server answers, before MLflow's own retries take minutes, and listens to it afterwards."""

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
# Hosts, separated by commas, that the caller keeps artifacts on beside the tracking server.
_ALLOWED_HOSTS = "ACCUMTUNE_ARTIFACT_HOSTS"
# Schemes of artifacts with which MLflow contacts the host that is named, as the user who calls.
_WITH_CREDENTIALS = ("http", "https", "mlflow-artifacts", "ftp", "sftp")


def check_reachable(uri: str) -> None:
    """Asks a server for a connection.

    Raises:
        TrackingError: there is no answer.
    """
    try:
        server = server_of(uri)
    except ValueError as error:
        raise TrackingError(
            f"The tracking store's address {without_credentials(uri)} cannot be read: {redacted(str(error), uri)}.",
            "scheme://user:password@host:port/path",
            "write what is special in user and password percent-encoded, such as %23 for #, %2F for / and %3F for ?.",
        ) from None
    if server is None or server[0] not in _PORTS:
        return
    scheme, host, port = server
    with contextlib.suppress(KeyError):
        # Behind a proxy only the proxy knows.
        if urllib.request.getproxies()[scheme] and not urllib.request.proxy_bypass(host):
            return
    try:
        socket.create_connection((host, port or _PORTS[scheme]), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise TrackingError(
            f"The tracking server {without_credentials(uri)} does not answer: {redacted(str(error), uri)}.",
            "a running MLflow server",
            "start it, or check the address. What was searched is in the search's directory, nothing is lost.",
        ) from None


def refuse_other_server(tracking_uri: str, artifact_uri: str) -> None:
    """Refuses artifacts on a server that the tracking store names and the caller does not.

    MLflow sends the caller's token to whatever host stands there, which anyone who may make an experiment decides.
    Storage of a cloud, which has credentials of its own, and folders are left to MLflow.

    Raises:
        TrackingError: they are on such a server.
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
        f"The tracking store {without_credentials(tracking_uri)} says that the artifacts are at "
        f"{without_credentials(artifact_uri)}.",
        "artifacts behind the tracking server itself, in a folder or in a cloud's storage; your token is not sent "
        "elsewhere",
        f"if you trust that server: {_ALLOWED_HOSTS}={there[1] or '<host>'} in the environment.",
    )


def is_answering(uri: str) -> bool:
    """Whether an MLflow server answers a request now, whatever it says; False of stores that are no servers.

    A call that was on its way when a server went down waits in MLflow's own retries for up to minutes, long after the
    server is back.
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


class Pulse:
    """When a store was last heard.

    Args:
        is_local: a file on this machine, which is slow at worst and never silent.
    """

    def __init__(self, is_local: bool) -> None:
        self._heard_at = math.inf if is_local else time.monotonic()

    def beat(self) -> None:
        self._heard_at = max(self._heard_at, time.monotonic())

    def silent_seconds(self) -> float:
        """How long nothing was heard; 0 of a file."""
        return max(0.0, time.monotonic() - self._heard_at)


class Listening:
    """MLflow's client; each call that returns is a beat of its store's pulse."""

    def __init__(self, client: Any, pulse: Pulse) -> None:
        self._client = client
        self._pulse = pulse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **keywords: Any) -> Any:
            answer = value(*arguments, **keywords)
            self._pulse.beat()
            return answer

        return call
