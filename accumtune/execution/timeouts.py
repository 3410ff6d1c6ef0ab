"""Time-outs of processes that train no trial: they build a model, probe it, or look at the device."""

from __future__ import annotations

# Weights that are downloaded, and a large model that XLA compiles, take minutes.
DEFAULT_SECONDS = 1800.0
# Even a model of which a trial takes a second needs a while to be built, traced and compiled on a busy machine.
_LEAST_SECONDS = 60.0


def preparation_seconds(trial_timeout_seconds: float | None) -> float:
    """The time-out of a process that builds or probes: a trial does all of that too, and trains besides.

    Args:
        trial_timeout_seconds: as given to a tuner; None leaves trainings without a time-out, but not these.
    """
    return DEFAULT_SECONDS if trial_timeout_seconds is None else max(_LEAST_SECONDS, trial_timeout_seconds)
