"""What a person sees in the terminal while a search runs: one line per event, and below them how far it has come."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from accumtune.memory.budget import format_bytes
from accumtune.search.console.progress import Progress, describe_values, duration


class Display:
    """Prints the progress of a search; `with display:` keeps a live view below the lines, in a terminal.

    Args:
        objective_name: for example `"val_loss"`.
        max_trials: how many trials will train, if that is known.
        verbose: 0 prints nothing, 2 lines only, also in a terminal.
        stream: where to; default the standard output of the moment.
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

    def __enter__(self) -> Display:
        stream = self._stream or sys.stdout
        if self._verbose == 1 and stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=stream, highlight=False)
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

    def remember(self, status: str, objective: float | None, values: Mapping[str, Any]) -> None:
        """A trial of an earlier session, which is counted but not told of again."""
        with self._lock:
            self.progress.remember(status, objective, values)

    def trial_started(self, number: int, values: Mapping[str, Any], predicted_peak_bytes: int | None) -> None:
        with self._lock:
            self.progress.started(number, values, time.monotonic())
        peak = "" if predicted_peak_bytes is None else f", predicted peak {format_bytes(predicted_peak_bytes)}"
        self.line(f"[{self._count(number)}] {describe_values(values)}{peak}")

    def trial_ended(self, number: int, result: Any) -> None:
        name = self.progress.objective_name
        with self._lock:
            objective = result.metrics.get(name)
            seconds = self.progress.ended(number, result.status, objective, result.values, time.monotonic())
        if result.status == "completed":
            report = result.report
            speed = report["throughput_samples_per_second"]
            parts = [
                f"{name} {result.metrics[name]:.4g}",
                f"peak {format_bytes(report['peak_memory_bytes'])}",
                *([f"{speed:,.0f} samples/s"] if speed else []),
                f"{seconds:.1f} s",
                *([result.reason.split(":")[0]] if result.reason else []),  # pruned
            ]
            self.line(f"[{self._count(number)}]   → " + ", ".join(parts))
        else:
            self.line(f"[{self._count(number)}]   → {result.status}: {result.reason}")

    def _count(self, number: int) -> str:
        # Proposals that were reused or do not fit have numbers too: the last of them may be above what counts.
        return f"{number}/{self.progress.max_trials}" if number <= (self.progress.max_trials or 0) else str(number)

    def _view(self) -> Any:
        """The live view: how far it is, and what runs."""
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
