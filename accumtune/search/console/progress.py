"""How far a search has come: counted from its events, said in words. No terminal here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accumtune.search.feasibility import BATCH_HYPERPARAMETERS


@dataclass
class Progress:
    """What the user wants to know while waiting.

    Args:
        objective_name: for example `"val_loss"`.
        direction: `"min"` or `"max"`.
        max_trials: how many trials will train, if that is known.
        workers: trials at once.
    """

    objective_name: str
    direction: str = "min"
    max_trials: int | None = None
    workers: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    best: tuple[float, str] | None = None
    # Trial number -> (what it tries, when it began).
    running: dict[int, tuple[str, float]] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """Trials that count towards `max_trials`."""
        return self.counts["completed"] + self.counts["failed"]

    def started(self, number: int, values: Mapping[str, Any], now: float) -> None:
        """A trial begins to train."""
        self.running[number] = (describe_values(values), now)

    def ended(self, number: int, status: str, objective: float | None, values: Mapping[str, Any], now: float) -> float:
        """A trial has ended; returns the seconds that it took."""
        _, began = self.running.pop(number, ("", now))
        if status in ("completed", "failed"):
            self._seconds.append(now - began)
        self.remember(status, objective, values)
        return now - began

    def remember(self, status: str, objective: float | None, values: Mapping[str, Any]) -> None:
        """A trial that ended, in this session or an earlier one."""
        self.counts[status] += 1
        if status != "completed" or objective is None or not math.isfinite(objective):
            return
        sign = -1 if self.direction == "max" else 1
        if self.best is None or sign * objective < sign * self.best[0]:
            self.best = (objective, describe_batch(values))

    def seconds_left(self, now: float) -> float | None:
        """What remains, at the speed of this session's trials so far; None before the first, or without an end."""
        if not self._seconds or self.max_trials is None:
            return None
        each = sum(self._seconds) / len(self._seconds)
        begun = sum(min(now - began, each) for _, began in self.running.values())
        return max(0.0, (each * max(0, self.max_trials - self.trained) - begun) / self.workers)

    def summary(self, now: float) -> str:
        """`5/12 trials · 1 running · 2 reused · best val_loss 0.0628 (effective batch 16 = 16 × 1) · 2 min left`."""
        parts = [f"{self.trained}/{self.max_trials} trials" if self.max_trials else f"{self.trained} trials"]
        counts = {"running": len(self.running), **{name: self.counts[name] for name in _OTHERS}}
        parts += [f"{count} {name}" for name, count in counts.items() if count or name == "running"]
        if self.best is not None:
            parts.append(f"best {self.objective_name} {self.best[0]:.4g} ({self.best[1]})")
        left = self.seconds_left(now)
        if left is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


_OTHERS = ("reused", "infeasible", "failed")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def describe_batch(values: Mapping[str, Any]) -> str:
    """`effective batch 256 = 32 × 8`."""
    effective, micro, steps = (values.get(name) for name in BATCH_HYPERPARAMETERS)
    return f"effective batch {effective}" + (f" = {micro} × {steps}" if micro and steps else "")


def describe_values(values: Mapping[str, Any]) -> str:
    """`effective batch 256 = 32 × 8, learning_rate=0.001, width=16`."""
    others = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name not in BATCH_HYPERPARAMETERS and not name.startswith("tuner/")
    ]
    return ", ".join([describe_batch(values), *others])
