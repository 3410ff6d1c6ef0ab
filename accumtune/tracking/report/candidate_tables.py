"""Writes candidates as a CSV file and as a table for the terminal, and formats their numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.memory.budget import format_bytes, mib
from accumtune.tracking.records import SearchRecord
from accumtune.tracking.redaction import redacted_value


class CandidateLike(Protocol):
    """The part of a candidate (`accumtune.search.results.selection.Candidate`) that is written."""

    @property
    def objective(self) -> float | None: ...
    @property
    def peak_memory_bytes(self) -> float | None: ...
    @property
    def throughput_samples_per_second(self) -> float | None: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def effective_batch_size(self) -> int: ...
    @property
    def hyperparameters(self) -> Mapping[str, Any]: ...
    @property
    def trial_id(self) -> str: ...
    @property
    def is_trained(self) -> bool: ...


def candidates_csv(
    record: SearchRecord, candidates: Iterable[CandidateLike], front: Sequence[CandidateLike]
) -> str:
    """Returns all candidates as CSV, best objective first."""
    items = ordered(candidates, record.objective_direction)
    names = dict.fromkeys(name for item in items for name in item.hyperparameters if name not in BATCH_HYPERPARAMETERS)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial_id", record.objective_name, "peak_memory_mib", "throughput_samples_per_second", *BATCH_HYPERPARAMETERS,
         "is_on_pareto_front", "is_trained", *names]
    )  # fmt: skip
    for item in items:
        peak = None if item.peak_memory_bytes is None else round(mib(item.peak_memory_bytes), 3)
        row = [item.trial_id, item.objective, peak, item.throughput_samples_per_second]
        row += [getattr(item, name) for name in BATCH_HYPERPARAMETERS]
        row += [is_among(item, front), item.is_trained]
        writer.writerow(row + [redacted_value(name, item.hyperparameters.get(name)) for name in names])
    return text.getvalue()


def candidates_table(candidates: Iterable[CandidateLike], front: Sequence[CandidateLike], direction: str) -> str:
    """Returns the candidates as a table for the terminal, best objective first; `*` marks the Pareto front.

    `~` marks the peak memory and throughput of candidates whose pair was not trained.
    """
    header = ["", "objective", "effective", "micro × steps", "peak", "samples/s", "hyperparameters", "trial"]
    rows = [header]
    for item in ordered(candidates, direction):
        rows.append(["*" if is_among(item, front) else "", *candidate_cells(item), item.trial_id])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    # Text to the left, numbers to the right.
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column in (0, 6, 7) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def candidate_cells(item: CandidateLike) -> list[str]:
    """Returns a candidate's objective, effective batch, pair, peak, speed and own hyperparameters, for a table."""
    mark = "" if item.is_trained else "~"
    return [
        number(item.objective),
        str(item.effective_batch_size),
        f"{item.micro_batch_size} × {item.accumulation_steps}",
        mark + size(item.peak_memory_bytes),
        mark + speed(item.throughput_samples_per_second),
        own_hyperparameters(item.hyperparameters),
    ]


def ordered(candidates: Iterable[CandidateLike], direction: str) -> list[CandidateLike]:
    """Sorts candidates: best objective first, of equal ones the trained first, then the fastest."""
    sign = -1 if direction == "max" else 1

    def key(item: CandidateLike) -> tuple[float, bool, float]:
        value = math.inf if item.objective is None or math.isnan(item.objective) else sign * item.objective
        return (value, not item.is_trained, -(item.throughput_samples_per_second or 0.0))

    return sorted(candidates, key=key)


def is_among(item: CandidateLike, others: Sequence[CandidateLike]) -> bool:
    """Returns whether a candidate is one of the others."""
    return any(item is other or item == other for other in others)


def _own(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hyperparameters.items() if k not in BATCH_HYPERPARAMETERS and not k.startswith("tuner/")}


def own_hyperparameters(hyperparameters: Mapping[str, Any], quote: str = "") -> str:
    """Returns the user's own hyperparameters in one line, without the batch sizes and Keras Tuner's entries."""
    own = _own(hyperparameters)
    return ", ".join(f"{quote}{name}={_value(redacted_value(name, value))}{quote}" for name, value in own.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escaped(str(value))


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def size(size_bytes: float | None) -> str:
    return "–" if size_bytes is None else format_bytes(size_bytes)


def speed(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def escaped(text: str) -> str:
    """Escapes what Markdown would read as a table or a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
