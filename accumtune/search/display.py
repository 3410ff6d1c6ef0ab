"""What a person sees in the terminal while a search runs: one plain line per event."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from accumtune.memory.budget import format_bytes
from accumtune.search.feasibility import BATCH_HYPERPARAMETERS


class Display:
    """Prints the progress of a search.

    Args:
        objective_name: for example `"val_loss"`.
        max_trials: how many trials will train, if that is known.
        verbose: 0 prints nothing.
        stream: where to; default the standard output of the moment.
    """

    def __init__(self, objective_name: str, max_trials: int | None, verbose: int = 1, stream: TextIO | None = None):
        self._objective_name = objective_name
        self._max_trials = max_trials
        self._verbose = verbose
        self._stream = stream
        self._started: dict[int, float] = {}

    def line(self, text: str) -> None:
        if self._verbose:
            print(text, file=self._stream, flush=True)

    def probe(self, text: str) -> None:
        self.line(f"  {text}")

    def trial_started(self, number: int, values: Mapping[str, Any], predicted_peak_bytes: int | None) -> None:
        self._started[number] = time.monotonic()
        peak = "" if predicted_peak_bytes is None else f", predicted peak {format_bytes(predicted_peak_bytes)}"
        self.line(f"[{self._count(number)}] {describe_values(values)}{peak}")

    def trial_ended(self, number: int, result: Any) -> None:
        if result.status == "completed":
            report = result.report
            seconds = time.monotonic() - self._started.get(number, time.monotonic())
            speed = report["throughput_samples_per_second"]
            parts = [
                f"{self._objective_name} {result.metrics[self._objective_name]:.4g}",
                f"peak {format_bytes(report['peak_memory_bytes'])}",
                *([f"{speed:,.0f} samples/s"] if speed else []),
                f"{seconds:.1f} s",
            ]
            self.line(f"[{self._count(number)}]   → " + ", ".join(parts))
        else:
            self.line(f"[{self._count(number)}]   → {result.status}: {result.reason}")

    def _count(self, number: int) -> str:
        return f"{number}/{self._max_trials}" if self._max_trials else str(number)


def describe_values(values: Mapping[str, Any]) -> str:
    """`effective batch 256 = 32 × 8, learning_rate=0.001, width=16`."""
    effective, micro, steps = (values.get(name) for name in BATCH_HYPERPARAMETERS)
    batch = f"effective batch {effective}" + (f" = {micro} × {steps}" if micro and steps else "")
    others = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name not in BATCH_HYPERPARAMETERS and not name.startswith("tuner/")
    ]
    return ", ".join([batch, *others])
