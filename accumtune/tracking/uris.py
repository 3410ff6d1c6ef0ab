"""Where runs are tracked, and how to write such an address down without giving away its password."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# Named explicitly: MLflow's own default still resolves to an old ./mlruns/<n>/meta.yaml where there is one, and a
# file store is refused since MLflow 3.13.
DEFAULT_TRACKING_URI = "sqlite:///mlruns/mlflow.db"

_SECRET_PARAMETER = re.compile(r"pass|pwd|token|secret|key|credential|signature|sig\b", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:PASS(?:WORD|WD|PHRASE)?|PW|\w*TOKEN|SECRET|CREDENTIALS?|(?:API)?KEY)(?:_|$)|_PWD$", re.IGNORECASE
)
_LEAST_SECRET_LENGTH = 8


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
    """A text, such as a log or an exception's message, without the secrets that stand in it.

    Dots take the place of the credentials of every address, and of the value of every environment variable whose name
    says that it is a secret (`MLFLOW_TRACKING_PASSWORD`, `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`).
    """
    text = re.sub(r"(?<=://)[^/\s@'\"]+@", "...@", text)
    text = re.sub(r"(?i)\b(password|passwd|pwd|token|secret)=[^&\s'\"]+", r"\1=...", text)
    for secret in _secrets_of_environment():
        text = text.replace(secret, "...")
    return text


def _secrets_of_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    # A short value would be found in innocent words, and where a key lies is no secret. Longest first: one may hold
    # another.
    return sorted(
        (value for value in values if len(value) >= _LEAST_SECRET_LENGTH and not os.path.exists(value)),
        key=len, reverse=True,
    )  # fmt: skip
