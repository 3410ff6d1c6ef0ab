"""What is installed here, as far as it decides what a training step costs."""

from __future__ import annotations

from importlib import metadata


def installed_versions() -> dict[str, str]:
    """The versions that decide what a training step costs, as far as they are installed."""
    versions = {}
    for name in ("accumtune", "keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
