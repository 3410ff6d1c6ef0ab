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

# What a secret is called. `token` counts alone or after who hands it out: `pad_token`, `max_tokens` and
# `token_accuracy` are no secrets.
_NAME = r"""(?:
    pass(?:word|wd|phrase)\w{0,9} | pwd | secrets? | credentials?
    | (?:api|access|secret|private|account|encryption|signing|subscription)[_-]?key(?:[_-]?id)?
    | (?:api|access|auth|authorization|refresh|session|bearer|security|personal|git(?:hub|lab)|wandb|oauth|service
        |secret|tracking|jwt|csrf|client|user|bot|(?<![a-z])(?:id|hf|hub))[_-]?token
    | (?<!\w)(?<!\w-)token | (?-i:[A-Z][A-Z0-9_]{0,30}TOKEN)
    | authorization | cookie
    | (?:x-amz-|x-goog-|(?<=[?&]))(?:signature|credential|security-token) | (?<=[?&])(?:key|sig|auth)
)"""
# In quotes it may hold spaces; any other ends with the first.
_VALUE = r"""(?:(?:bearer|basic|digest|token)[ ]+)?(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')?\S*"""
_PAIR = re.compile(
    rf"""({_NAME}["'\\]{{0,3}}[ \t]*(?:=>|[=:]|%3[AD])[ \t]*(?=\S) | --(?:[^\W_]+[-_]){{0,3}}{_NAME}[ \t]+){_VALUE}""",
    re.IGNORECASE | re.VERBOSE,
)
_BEARER = re.compile(r"\b(bearer[ \t]+)(?=\S{6})\S+", re.IGNORECASE)
# As Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack and Google write theirs, and JSON web tokens.
_TOKEN = re.compile(
    r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{6,}\.eyJ[\w-]+\.[\w-]*)"
)
# A password may hold what ends the host of an address. Bounded, so that no text takes long.
_USER = re.compile(r"(?<=://)(?!/)\S{0,4096}@")


def redacted(text: str, address: str = "") -> str:
    """A text without the secrets that stand in it: dots take their place.

    Secrets are the credentials of every address, what follows a name such as `password=`, `"api_key":` or `Bearer`,
    tokens of well-known shapes, and the values of environment variables whose names say so (`MLFLOW_TRACKING_PASSWORD`,
    `HF_TOKEN`). A text is cut after this, never before: the rest of a secret is not recognized.

    Args:
        text: a log, an error, a value.
        address: one whose password is looked for by itself, too: a driver's error may tell it in pieces.
    """
    text = _USER.sub("...@", text)
    text = _PAIR.sub(r"\1...", text)
    text = _BEARER.sub(r"\1...", text)
    text = _TOKEN.sub("...", text)
    for secret in _known_secrets(address):
        text = text.replace(secret, "...")
    return text


def redacted_value(name: str, value: Any) -> Any:
    """A hyperparameter's value, or dots where its name says that it is a secret."""
    if not isinstance(value, str):
        return value
    return "..." if _PAIR.search(f"{name}=x") else redacted(value)


def first_line(text: str, address: str = "") -> str:
    """The first line of a text, redacted and of a length that can be read."""
    lines = redacted(text.strip(), address).splitlines()
    return lines[0][:300] if lines else ""


def error_line(error: BaseException, address: str = "") -> str:
    """An exception in one line, redacted; its class where it says nothing."""
    return first_line(str(error), address) or type(error).__name__


def _known_secrets(address: str) -> list[str]:
    """The values of the environment's secrets and the passwords of its addresses.

    A short value would be found in innocent words, and where a key lies is no secret. Longest first: one may hold
    another.
    """
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    for uri in (address, *(value for value in os.environ.values() if "://" in value)):
        user = uri.partition("://")[2].rpartition("@")[0]
        values |= {password := user.partition(":")[2], unquote(password)}
    secrets = (value for value in values if len(value) >= _LEAST_SECRET_LENGTH and not os.path.exists(value))
    return sorted(secrets, key=len, reverse=True)
