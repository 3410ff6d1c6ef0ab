"""Removes secrets from texts such as logs, errors and hyperparameters."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:PASS(?:WORD|WD|PHRASE)?|PW|\w*TOKEN|SECRET|CREDENTIALS?|(?:API)?KEY)(?:_|$)|_PWD$", re.IGNORECASE
)
_LEAST_SECRET_LENGTH = 8

# Names of secrets. `token` counts alone or after the name of its issuer: `pad_token`, `max_tokens` and
# `token_accuracy` are not secrets.
_NAME = r"""(?:
    pass(?:word|wd|phrase)\w{0,9} | pwd | secrets? | credentials?
    | (?:api|access|secret|private|account|encryption|signing|subscription)[_-]?key(?:[_-]?id)?
    | (?:api|access|auth|authorization|refresh|session|bearer|security|personal|git(?:hub|lab)|wandb|oauth|service
        |secret|tracking|jwt|csrf|client|user|bot|(?<![a-z])(?:id|hf|hub))[_-]?token
    | (?<!\w)(?<!\w-)token | (?-i:[A-Z][A-Z0-9_]{0,30}TOKEN)
    | authorization | cookie
    | (?:x-amz-|x-goog-|(?<=[?&]))(?:signature|credential|security-token) | (?<=[?&])(?:key|sig|auth)
)"""
# A value in quotes may hold spaces; any other value ends at the first space.
_VALUE = r"""(?:(?:bearer|basic|digest|token)[ ]+)?(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')?\S*"""
_PAIR = re.compile(
    rf"""({_NAME}["'\\]{{0,3}}[ \t]*(?:=>|[=:]|%3[AD])[ \t]*(?=\S) | --(?:[^\W_]+[-_]){{0,3}}{_NAME}[ \t]+){_VALUE}""",
    re.IGNORECASE | re.VERBOSE,
)
_BEARER = re.compile(r"\b(bearer[ \t]+)(?=\S{6})\S+", re.IGNORECASE)
# The forms of tokens of Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack and Google, and of JSON web tokens.
_TOKEN = re.compile(
    r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{6,}\.eyJ[\w-]+\.[\w-]*)"
)
# User and password of an address, up to its last "@", since a password may hold any character. Bounded, for speed.
_USER = re.compile(r"(?<=://)(?!/)\S{0,4096}@")


def redacted(text: str, address: str = "") -> str:
    """Returns a text with its secrets replaced by dots.

    Secrets are the credentials in addresses, values after a name such as `password=`, `"api_key":` or `Bearer`, tokens
    of well-known forms, and the values of environment variables with a secret's name (`MLFLOW_TRACKING_PASSWORD`,
    `HF_TOKEN`). Redact before shortening a text: a part of a secret is not recognized.

    Args:
        text: a log, an error, a value.
        address: its password is also replaced where it stands alone, as in a driver's error.
    """
    text = _USER.sub("...@", text)
    text = _PAIR.sub(r"\1...", text)
    text = _BEARER.sub(r"\1...", text)
    text = _TOKEN.sub("...", text)
    for secret in _known_secrets(address):
        text = text.replace(secret, "...")
    return text


def redacted_value(name: str, value: Any) -> Any:
    """Returns a hyperparameter's value, redacted; dots if its name is that of a secret."""
    if not isinstance(value, str):
        return value
    return "..." if _PAIR.search(f"{name}=x") else redacted(value)


def first_line(text: str, address: str = "") -> str:
    """Returns the first line of a text, redacted, with at most 300 characters."""
    lines = redacted(text.strip(), address).splitlines()
    return lines[0][:300] if lines else ""


def error_line(error: BaseException, address: str = "") -> str:
    """Returns an exception's first line, redacted; the name of its class if it has no text."""
    return first_line(str(error), address) or type(error).__name__


def _known_secrets(address: str) -> list[str]:
    """Returns the secrets in environment variables, and the passwords of addresses in them, longest first.

    Short values are left out, because they occur in ordinary words, and so are paths of existing files. The longest
    comes first, because one secret may contain another.
    """
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    for uri in (address, *(value for value in os.environ.values() if "://" in value)):
        user = uri.partition("://")[2].rpartition("@")[0]
        values |= {password := user.partition(":")[2], unquote(password)}
    secrets = (value for value in values if len(value) >= _LEAST_SECRET_LENGTH and not os.path.exists(value))
    return sorted(secrets, key=len, reverse=True)
