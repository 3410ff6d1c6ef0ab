"""Writes a search's report into a folder: a note in Markdown, a table and pictures.

The tracker uploads the folder's files to MLflow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accumtune.memory.budget import format_bytes
from accumtune.tracking.mlflow.run_content import STATUSES
from accumtune.tracking.records import SearchRecord
from accumtune.tracking.redaction import first_line, redacted
from accumtune.tracking.report import plots
from accumtune.tracking.report.accumulation_gain import accumulation_gain
from accumtune.tracking.report.candidate_tables import (
    CandidateLike,
    candidate_cells,
    candidates_csv,
    candidates_table,
    escaped,
    is_among,
    number,
    ordered,
    own_hyperparameters,
    size,
    speed,
)
from accumtune.tracking.report.noise_scale_note import noise_scale_of
from accumtune.tracking.report.pareto_page import pareto_html
from accumtune.tracking.report.report_files import CONFIG_FILE, NOTE_FILE, import_line
from accumtune.tracking.small_files import write_atomically

__all__ = ["candidates_csv", "candidates_table", "note", "write_report"]

_RUNNERS_UP = 8
_REASONS = 6
# MLflow shows at most this much of a note (mlflow.utils.validation.MAX_TAG_VAL_LENGTH).
_MAXIMUM_NOTE = 8000


class ChoiceLike(Protocol):
    """The candidate that was chosen, and why."""

    @property
    def candidate(self) -> CandidateLike: ...
    @property
    def reason(self) -> str: ...


def write_report(
    folder: Path,
    *,
    record: SearchRecord,
    candidates: Sequence[CandidateLike],
    front: Sequence[CandidateLike],
    best: ChoiceLike | None,
    config_json: str | None,
    profile_points: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Writes `note.md`, `candidates.csv`, the pictures and, if there is a best candidate, `best_config.json`.

    Args:
        folder: created if it does not exist; files of an earlier report are replaced.
        record: the search.
        candidates: all, trained and untrained.
        front: those on the Pareto front.
        best: the chosen candidate and why; None if no trial has completed.
        config_json: its configuration.
        profile_points: the profile's predictions for its model: dicts with `micro_batch_size`,
            `predicted_peak_memory_bytes` and `predicted_throughput_samples_per_second`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NOTE_FILE, note(record, candidates, front, best, config_json, folder))
    write_atomically(folder / "candidates.csv", candidates_csv(record, candidates, front))
    if config_json is not None:
        write_atomically(folder / CONFIG_FILE, config_json)
    winner = None if best is None else best.candidate
    images = plots.draw_all(record, candidates, front, winner, profile_points or ())
    for name, content in images.items():
        write_atomically(folder / name, content)
    page = pareto_html(record, candidates, front, winner)
    if page is not None:
        write_atomically(folder / "pareto.html", page)


def note(
    record: SearchRecord,
    candidates: Sequence[CandidateLike],
    front: Sequence[CandidateLike],
    best: ChoiceLike | None,
    config_json: str | None,
    folder: Path,
) -> str:
    """Returns the report's text, with the chosen configuration first."""
    parts = [_answer(record, best, candidates)]
    if best is not None:
        parts.append(_import_lines(config_json, folder))
        parts.append(_runners_up(record, candidates, front, best.candidate))
    parts += [_what_happened(record, None if best is None else best.candidate), _pictures_line(candidates)]
    text = redacted("\n\n".join(part for part in parts if part)) + "\n"
    return text if len(text) <= _MAXIMUM_NOTE else text[: _MAXIMUM_NOTE - 2] + "…\n"


def _answer(record: SearchRecord, best: ChoiceLike | None, candidates: Sequence[CandidateLike]) -> str:
    if best is None:
        why = f": {record.reason}" if record.reason else ""
        title = f"### {escaped(record.name)}: no configuration yet"
        return f"{title}\n\nNo trial has completed (the search is {record.status}{why})."
    item = best.candidate
    facts = [f"{escaped(record.objective_name)} **{number(item.objective)}**"]
    if item.peak_memory_bytes is not None:
        share = ""
        if record.memory_budget_bytes:
            percent = 100 * item.peak_memory_bytes / record.memory_budget_bytes
            share = f" of {format_bytes(record.memory_budget_bytes)} ({percent:.0f} %)"
        facts.append(f"peak memory **{size(item.peak_memory_bytes)}**{share}")
    if item.throughput_samples_per_second is not None:
        facts.append(f"**{speed(item.throughput_samples_per_second)} samples/s**")
    own = own_hyperparameters(item.hyperparameters, "`")
    lines = [
        # MLflow shows only the first lines of a note until it is unfolded.
        f"### Train with micro-batch {item.micro_batch_size} × {item.accumulation_steps} accumulation "
        f"step{'s' if item.accumulation_steps > 1 else ''} = effective batch {item.effective_batch_size}",
        f"{', '.join(facts)}{', with ' + own if own else ''}.",
        f"**Why:** {best.reason}",
        escaped(accumulation_gain(candidates, item, record.objective_name, record.objective_direction)),
    ]
    return "\n\n".join(lines)


def _import_lines(config_json: str | None, folder: Path) -> str:
    source = json.loads(config_json or "{}").get("source") or {}
    return (
        "### Train with it\n\n```python\n"
        f"{import_line(source, folder)}\n"
        "model = config.build(build_model)\n"
        "model.fit(x, y, **config.fit_arguments())\n```"
    )


def _runners_up(
    record: SearchRecord, candidates: Sequence[CandidateLike], front: Sequence[CandidateLike], winner: CandidateLike
) -> str:
    others = [item for item in ordered(candidates, record.objective_direction) if not is_among(item, [winner])]
    # Trained ones first: an untrained one is the same training in another micro-batch.
    shown = [item for item in others if item.is_trained][:_RUNNERS_UP]
    shown += [item for item in others if not item.is_trained and is_among(item, front)][: _RUNNERS_UP // 2]
    if not shown:
        return ""
    name = escaped(record.objective_name)
    lines = [
        "### Runners-up",
        "",
        f"| | {name} | effective batch | micro × steps | peak memory | samples/s | hyperparameters |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for item in shown:
        cells = ["●" if is_among(item, front) else "", *candidate_cells(item)]
        lines.append("| " + " | ".join(cells) + " |")
    legend = "● on the Pareto front: no other is at least as good in quality, memory and speed and better in one."
    if any(not item.is_trained for item in shown):
        legend += " ~ predicted: the same training in another micro-batch."
    return "\n".join([*lines, "", legend])


def _what_happened(record: SearchRecord, winner: CandidateLike | None) -> str:
    budget = record.memory_budget_bytes
    counts = {status: record.with_status(status) for status in STATUSES}
    words = {
        "completed": "trained",
        "reused": "reused (the same training as an earlier trial)",
        "infeasible": "infeasible",
        "failed": "failed",
        "running": "not ended",
    }
    proposals = ", ".join(f"{len(trials)} {words[status]}" for status, trials in counts.items() if trials) or "none"
    lines = [
        "### The search",
        "",
        f"- **Memory budget:** {'none' if budget is None else format_bytes(budget)}",
        f"- **Searched:** {record.tuner or 'a tuner'} over micro-batches {_sizes(record.micro_batch_sizes)} "
        f"and accumulation steps {_sizes(record.accumulation_steps)}"
        + (f", as {record.search_over.replace('_', ' ')}" if record.search_over else ""),
        f"- **Proposals:** {proposals}",
    ]
    for status in ("infeasible", "failed"):
        reasons = Counter(_first_line(trial.reason) for trial in counts[status])
        lines += [f"    - {status}: {reason} ({count} ×)" for reason, count in reasons.most_common(_REASONS)]
    if record.status not in ("finished", "running"):
        lines.append(f"- **The search was {record.status}:** {_first_line(record.reason)}")
    where = ", ".join(escaped(item) for item in (record.device or _device(record), record.backend) if item)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines.append(f"- **Measured on:** {'; '.join(item for item in (where, versions) if item) or 'unknown'}")
    noise = noise_scale_of(record, winner)
    advices = [*record.advice, *([] if noise is None else [noise.advice(winner)])]
    lines += [f"- **Advice:** {escaped(advice)}" for advice in advices]
    return "\n".join(lines)


def _pictures_line(candidates: Sequence[CandidateLike]) -> str:
    if not candidates:
        return ""
    return (
        "This run's artifacts have pictures: `pareto.html` (quality, memory and speed, interactive; also "
        "`pareto.png`), `memory.png` and `throughput.png` (against the micro-batch) and `effective_batch.png`. "
        "`candidates.csv` has all candidates."
    )


def _device(record: SearchRecord) -> str:
    return next((trial.device for trial in record.trials if trial.device), "")


def _sizes(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "–"


def _first_line(text: str) -> str:
    return escaped(first_line(text)) or "no reason given"

