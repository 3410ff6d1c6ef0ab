"""Where runs are tracked, and how to write such an address down without giving away its password."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# Named explicitly: MLflow's own default still resolves to an old ./mlruns/<n>/meta.yaml where there is one, and a
# file store is refused since MLflow 3.13.
DEFAULT_TRACKING_URI = "sqlite:///mlruns/mlflow.db"

_SECRET_PARAMETER = re.compile(r"pass|pwd|token|secret|key|credential|signature|sig\b", re.IGNORECASE)


def absolute_uri(uri: str) -> str:
    """The same store, also after the process has changed its working directory."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path.resolve()}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of an SQLite URI; None for any other store, and for a database in memory."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri == prefix or "?" in uri or uri == prefix + ":memory:":
        return None
    return Path(uri.removeprefix(prefix))


def without_credentials(uri: str) -> str:
    """The address without user, password and secret query parameters.

    >>> without_credentials("postgresql://me:secret@db:5432/mlflow?sslmode=require&password=x")
    'postgresql://db:5432/mlflow?sslmode=require'
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        return redacted(uri)
    query = "&".join(item for item in parts.query.split("&") if not _SECRET_PARAMETER.search(item.split("=")[0]))
    if parts.netloc == parts.netloc.rpartition("@")[2] and query == parts.query:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def redacted(text: str) -> str:
    """A text, such as an exception's message, with the credentials of every address in it replaced by dots."""
    text = re.sub(r"(?<=://)[^/\s@'\"]+@", "...@", text)
    return re.sub(r"(?i)\b(password|passwd|pwd|token|secret)=[^&\s'\"]+", r"\1=...", text)
