"""Finds the tracking URI, and removes credentials from it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from accumtune.tracking.redaction import redacted

# Not MLflow's own default: if there is an old ./mlruns/<n>/meta.yaml, that is a file store, which MLflow refuses since
# 3.13.
DEFAULT_TRACKING_URI = "sqlite:///mlruns/mlflow.db"

_SECRET_PARAMETER = re.compile(
    r"pass|pwd|token|secret|key|credential|signature|sig\b|auth|odbc_connect", re.IGNORECASE
)
_DATABASES = ("postgresql", "mysql", "mariadb", "mssql", "oracle", "cockroachdb")


def default_tracking_uri() -> str:
    """Returns `MLFLOW_TRACKING_URI`, which `mlflow.set_tracking_uri` sets too, or else accumtune's default."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI


def absolute_uri(uri: str) -> str:
    """Makes an SQLite URI independent of the working directory."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path.resolve()}"


def sqlite_path(uri: str) -> Path | None:
    """Returns the database file of an SQLite URI; None for any other store, and for a database in memory."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri == prefix or "?" in uri or uri == prefix + ":memory:":
        return None
    return Path(uri.removeprefix(prefix))


def server_of(uri: str) -> tuple[str, str, int | None] | None:
    """Returns scheme (without a driver), host and port, as the library that connects reads them; None without a host.

    Raises:
        ValueError: the address cannot be read.
    """
    scheme = uri.partition("://")[0].partition("+")[0].lower()
    if scheme not in _DATABASES:
        parts = urlsplit(uri)
        return (scheme, parts.hostname, parts.port) if parts.hostname else None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        raise ValueError("SQLAlchemy cannot read it") from None
    return (scheme, url.host, url.port) if url.host else None


def without_credentials(uri: str) -> str:
    """Returns the address without user, password and secret query parameters.

    It removes everything before the last `@`: libraries disagree on where a password with `/`, `?`, `#` or `@` ends.

    >>> without_credentials("postgresql://me:secret@db:5432/mlflow?sslmode=require&password=x")
    'postgresql://db:5432/mlflow?sslmode=require'
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return redacted(uri)
    if any("@" in item and _is_secret(item) for item in rest.partition("?")[2].split("&")):
        return f"{scheme}{mark}..."  # either the end of a password, or a parameter
    address, _, query = (rest if rest.startswith("/") else rest.rpartition("@")[2]).partition("?")
    kept = [item for item in query.split("&") if item and not _is_secret(item)]
    return redacted(f"{scheme}{mark}{address}{'?' if kept else ''}{'&'.join(kept)}")


def _is_secret(item: str) -> bool:
    name, _, value = (unquote(part) for part in item.partition("="))
    return bool(_SECRET_PARAMETER.search(name)) or redacted(value) != value
