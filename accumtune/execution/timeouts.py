"""Time limits of processes that do not train a trial: they build a model, probe it, or query the device."""

from __future__ import annotations

# Downloading weights, and compiling a large model with XLA, take minutes.
DEFAULT_SECONDS = 1800.0
# Building, tracing and compiling take a while on a busy machine, even if a trial takes a second.
_LEAST_SECONDS = 60.0


def preparation_seconds(trial_timeout_seconds: float | None) -> float:
    """Returns the time limit of a process that builds or probes: that of a trial, which does all of this too.

    Args:
        trial_timeout_seconds: as given to a tuner; None is no limit for trials, and `DEFAULT_SECONDS` for these.
    """
    return DEFAULT_SECONDS if trial_timeout_seconds is None else max(_LEAST_SECONDS, trial_timeout_seconds)
