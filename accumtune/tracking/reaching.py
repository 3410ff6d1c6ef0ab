"""Whether a tracking server answers: asked before MLflow's own retries take minutes, and listened to afterwards."""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from accumtune.errors import TrackingError
from accumtune.tracking.uris import without_credentials

_CONNECT_SECONDS = 3.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_reachable(uri: str) -> None:
    """Asks a server for a connection.

    Raises:
        TrackingError: there is no answer.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _PORTS or not parts.hostname:
        return
    with contextlib.suppress(KeyError):
        # Behind a proxy only the proxy knows.
        if urllib.request.getproxies()[scheme] and not urllib.request.proxy_bypass(parts.hostname):
            return
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise TrackingError(
            f"The tracking server {without_credentials(uri)} does not answer: {error}.",
            "a running MLflow server",
            "start it, or check the address. What was searched is in the search's directory, nothing is lost.",
        ) from None


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
