"""Prints a search to the terminal: a line per event, and below the lines how far the search has come."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS, without_batch
from accumtune.memory.budget import format_bytes

_OTHERS = ("reused", "infeasible", "failed")


@dataclass
class Progress:
    """How far a search has come, counted from its events.

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
    # Numbers of trials that have completed for now.
    _paused: set[int] = field(default_factory=set)

    @property
    def trained(self) -> int:
        """Trials that count towards `max_trials`."""
        return self.counts["completed"] + self.counts["failed"]

    def started(self, number: int, values: Mapping[str, Any], now: float) -> None:
        """Notes that a trial begins to train."""
        self.running[number] = (describe_values(values), now)
        if number in self._paused:
            self._paused.remove(number)
            self.counts["completed"] -= 1

    def ended(
        self,
        number: int,
        status: str,
        objective: float | None,
        values: Mapping[str, Any],
        now: float,
        is_paused: bool = False,
    ) -> float:
        """Notes that a trial has ended, perhaps only for now; returns the seconds that it took."""
        _, began = self.running.pop(number, ("", now))
        if status in ("completed", "failed"):
            self._seconds.append(now - began)
        self.remember(status, objective, values, number if is_paused else None)
        return now - began

    def remember(
        self, status: str, objective: float | None, values: Mapping[str, Any], paused: int | None = None
    ) -> None:
        """Counts a trial that ended, in this session or an earlier one; `paused` is its number if it may go on."""
        self.counts[status] += 1
        if paused is not None:
            self._paused.add(paused)
        if status != "completed" or objective is None or not math.isfinite(objective):
            return
        sign = -1 if self.direction == "max" else 1
        if self.best is None or sign * objective < sign * self.best[0]:
            self.best = (objective, describe_batch(values))

    def seconds_left(self, now: float) -> float | None:
        """Estimates the time left from this session's trials; None before the first, or without an end."""
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
        for name, value in without_batch(values).items()
        if not name.startswith("tuner/")
    ]
    return ", ".join([describe_batch(values), *others])


class Console:
    """Prints the progress of a search; `with console:` keeps a live view below the lines, in a terminal.

    Args:
        objective_name: for example `"val_loss"`.
        max_trials: how many trials will train, if that is known.
        verbose: 0 prints nothing; 1 prints lines, with a live view in a terminal; 2 prints lines alone.
        stream: default: `sys.stdout` at the time of each line.
        direction: of the objective.
        workers: trials at once.
    """

    def __init__(
        self,
        objective_name: str,
        max_trials: int | None,
        verbose: int = 1,
        stream: TextIO | None = None,
        direction: str = "min",
        workers: int = 1,
    ) -> None:
        self.progress = Progress(objective_name, direction, max_trials, workers)
        self._verbose = verbose
        self._stream = stream
        # Events come from the search's thread and from those of its trials.
        self._lock = threading.RLock()
        self._live: Any = None

    def __enter__(self) -> Console:
        stream = self._stream or sys.stdout
        if self._verbose == 1 and stream.isatty():
            import rich.console
            from rich.live import Live

            console = rich.console.Console(file=stream, highlight=False)
            if not console.is_dumb_terminal:
                # What the user's own code prints appears above the view.
                self._live = Live(get_renderable=self._view, console=console, refresh_per_second=2, transient=True)
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            live, self._live = self._live, None
        if live is not None:
            live.stop()

    def line(self, text: str) -> None:
        if not self._verbose:
            return
        with self._lock:
            if self._live is None:
                print(text, file=self._stream, flush=True)
            else:
                self._live.console.print(text, markup=False, soft_wrap=True)

    def probe(self, text: str) -> None:
        self.line(f"  {text}")

    def remember(
        self, status: str, objective: float | None, values: Mapping[str, Any], paused: int | None = None
    ) -> None:
        """Counts a trial of an earlier session, without a line; `paused` is its number if it may go on."""
        with self._lock:
            self.progress.remember(status, objective, values, paused)

    def trial_started(self, number: int, values: Mapping[str, Any], predicted_peak_bytes: int | None) -> None:
        with self._lock:
            self.progress.started(number, values, time.monotonic())
        peak = "" if predicted_peak_bytes is None else f", predicted peak {format_bytes(predicted_peak_bytes)}"
        self.line(f"[{self._count(number)}] {describe_values(values)}{peak}")

    def trial_ended(self, number: int, result: Any) -> None:
        name = self.progress.objective_name
        with self._lock:
            objective = result.metrics.get(name)
            seconds = self.progress.ended(
                number, result.status, objective, result.values, time.monotonic(), result.is_paused
            )
        if result.status == "completed":
            report = result.report
            speed = report["throughput_samples_per_second"]
            parts = [
                f"{name} {result.metrics[name]:.4g}",
                f"peak {format_bytes(report['peak_memory_bytes'])}",
                *([f"{speed:,.0f} samples/s"] if speed else []),
                f"{seconds:.1f} s",
                *([result.reason.split(":")[0]] if result.reason else []),  # pruned, paused
            ]
            self.line(f"[{self._count(number)}]   → " + ", ".join(parts))
        else:
            self.line(f"[{self._count(number)}]   → {result.status}: {result.reason}")

    def _count(self, number: int) -> str:
        # Reused and infeasible trials have numbers too but do not count, so a number may exceed max_trials.
        return f"{number}/{self.progress.max_trials}" if number <= (self.progress.max_trials or 0) else str(number)

    def _view(self) -> Any:
        """Draws the live view: how far the search is, and what runs."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        now = time.monotonic()
        with self._lock:
            progress = self.progress
            parts: list[Any] = [Text("")]
            if progress.max_trials:
                parts.append(ProgressBar(progress.max_trials, progress.trained, width=60))
            parts.append(Text(progress.summary(now), style="bold"))
            parts += [
                Text(f"  trial {number}: {text}, {duration(now - began)}", style="dim", overflow="ellipsis")
                for number, (text, began) in sorted(progress.running.items())
            ]
        return Group(*parts)
