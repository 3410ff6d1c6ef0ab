"""Formats sizes in bytes for the user and for MLflow's metrics."""

from __future__ import annotations


def format_bytes(size_bytes: float) -> str:
    """Formats a size: `"1.50 GiB"`, `"20.0 MiB"`.

    >>> format_bytes(1610612736)
    '1.50 GiB'
    """
    for unit, factor, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.{digits}f} {unit}"
    return f"{int(size_bytes)} B"


def mib(size_bytes: float) -> float:
    """Converts bytes to mebibytes (2**20), the unit of MLflow's metrics."""
    return size_bytes / 2**20
