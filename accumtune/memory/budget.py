"""Parses memory budgets as people write them ("2GiB") into bytes."""

from __future__ import annotations

import re

from accumtune.errors import BudgetError
from accumtune.memory.machine import device_memory
from accumtune.memory.units import format_bytes, mib

__all__ = ["format_bytes", "mib", "parse_budget", "parse_share"]

# GiB = 2**30 and GB = 10**9 (IEC 80000-13). A bare "G" means GiB, as in `docker run --memory` and Slurm.
_UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "kib": 2**10, "kb": 10**3,
    "m": 2**20, "mib": 2**20, "mb": 10**6,
    "g": 2**30, "gib": 2**30, "gb": 10**9,
    "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
_SHARE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*")
_EXPECTED = 'a number of bytes (2147483648) or a text such as "2GiB", "1.5 GiB", "512MiB" or "80%" (of the device)'
_FIX = 'write the number and its unit, for example memory_budget="2GiB".'


def parse_budget(budget: int | float | str) -> int:
    """Turns a memory budget into bytes.

    Args:
        budget: bytes as a number, a text with a unit: `"2GiB"` (2 * 2**30), `"2GB"` (2 * 10**9), `"512MiB"`, or a
            share of this machine's device: `"80%"`.

    Returns:
        The budget in bytes, at least 1.

    Raises:
        BudgetError: the budget cannot be read, or is not positive and finite.

    Example:

    >>> parse_budget("2GiB")
    2147483648
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetError(f"Received memory_budget={budget!r} of type {type(budget).__name__}.", _EXPECTED, _FIX)
    share = parse_share(budget)
    if share is not None:
        number = share * device_memory().total_bytes
    elif isinstance(budget, str):
        match = _PATTERN.fullmatch(budget)
        if match is None or match[2].lower() not in _UNITS:
            raise BudgetError(f"Received memory_budget={budget!r}, which is not a size.", _EXPECTED, _FIX)
        number = float(match[1]) * _UNITS[match[2].lower()]
    else:
        number = float(budget)
    if not 1 <= number < 2**63:
        raise BudgetError(f"Received memory_budget={budget!r}, which no device can give.", _EXPECTED, _FIX)
    return int(number)


def parse_share(budget: int | float | str) -> float | None:
    """Turns a share of the device, `"80%"`, into a number, 0.8; returns None for other budgets.

    Raises:
        BudgetError: the share is 0 % or above 100 %.

    >>> parse_share("80%")
    0.8
    """
    match = _SHARE.fullmatch(budget) if isinstance(budget, str) else None
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share <= 1:
        raise BudgetError(f"Received memory_budget={budget!r}.", "more than 0 % and at most 100 % of the device", _FIX)
    return share
