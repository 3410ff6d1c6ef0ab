"""What a person reads first: a note in Markdown, a table, and pictures, written into a folder of the search.

Nothing here knows MLflow; the tracker uploads whatever is in the folder.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accumtune.config.uris import redacted
from accumtune.memory.budget import format_bytes, mib
from accumtune.tracking import pictures
from accumtune.tracking.records import SearchRecord
from accumtune.tracking.runs import BATCH, STATUSES

_RUNNERS_UP = 8
_REASONS = 6
# MLflow shows at most this much of a note (mlflow.utils.validation.MAX_TAG_VAL_LENGTH).
_MAXIMUM_NOTE = 8000


class CandidateLike(Protocol):
    """What is written about a candidate (`accumtune.search.selection.Candidate`)."""

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
    """Writes `note.md`, `candidates.csv`, the pictures and, where there is a winner, `best_config.json`.

    Args:
        folder: made where it does not exist; files of an earlier report are replaced.
        record: the search.
        candidates: what could be chosen, trained and profiled.
        front: those that no other beats.
        best: the winner and why; None where nothing has completed.
        config_json: the winner's configuration.
        profile_points: what the profile predicts for the winner's model: dicts with `micro_batch_size`,
            `predicted_peak_memory_bytes` and `predicted_throughput_samples_per_second`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "note.md", note(record, candidates, front, best, config_json, folder))
    _write(folder / "candidates.csv", candidates_csv(record, candidates, front))
    if config_json is not None:
        _write(folder / "best_config.json", config_json)
    winner = None if best is None else best.candidate
    images = pictures.draw_all(record, candidates, front, winner, profile_points or ())
    for name, content in images.items():
        _write(folder / name, content)


def note(
    record: SearchRecord,
    candidates: Sequence[CandidateLike],
    front: Sequence[CandidateLike],
    best: ChoiceLike | None,
    config_json: str | None,
    folder: Path,
) -> str:
    """The report's text: the answer first."""
    parts = [_answer(record, best)]
    if best is not None:
        parts.append(_import_lines(config_json, folder))
        parts.append(_runners_up(record, candidates, front, best.candidate))
    parts += [_what_happened(record), _pictures_line(candidates)]
    text = redacted("\n\n".join(part for part in parts if part)) + "\n"
    return text if len(text) <= _MAXIMUM_NOTE else text[: _MAXIMUM_NOTE - 2] + "…\n"


def candidates_csv(
    record: SearchRecord, candidates: Iterable[CandidateLike], front: Sequence[CandidateLike]
) -> str:
    """All candidates, best objective first."""
    ordered = _ordered(candidates, record.objective_direction)
    names = dict.fromkeys(name for item in ordered for name in item.hyperparameters if name not in BATCH)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial_id", record.objective_name, "peak_memory_mib", "throughput_samples_per_second", *BATCH,
         "is_on_pareto_front", "is_trained", *names]
    )  # fmt: skip
    for item in ordered:
        peak = None if item.peak_memory_bytes is None else round(mib(item.peak_memory_bytes), 3)
        row = [item.trial_id, item.objective, peak, item.throughput_samples_per_second]
        row += [getattr(item, name) for name in BATCH]
        row += [_is_among(item, front), item.is_trained]
        writer.writerow(row + [item.hyperparameters.get(name) for name in names])
    return text.getvalue()


def candidates_table(candidates: Iterable[CandidateLike], front: Sequence[CandidateLike], direction: str) -> str:
    """The candidates as a table for the terminal, best objective first, `*` marking the Pareto front.

    Peaks and speeds of candidates whose pair was not itself trained are predictions, marked `~`.
    """
    header = ["", "objective", "effective", "micro × steps", "peak", "samples/s", "hyperparameters", "trial"]
    rows = [header]
    for item in _ordered(candidates, direction):
        mark = "" if item.is_trained else "~"
        rows.append([
            "*" if _is_among(item, front) else "",
            _number(item.objective),
            str(item.effective_batch_size),
            f"{item.micro_batch_size} × {item.accumulation_steps}",
            mark + _size(item.peak_memory_bytes),
            mark + _speed(item.throughput_samples_per_second),
            _own_hyperparameters(item.hyperparameters),
            item.trial_id,
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    # Text to the left, numbers to the right.
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column in (0, 6, 7) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def _answer(record: SearchRecord, best: ChoiceLike | None) -> str:
    if best is None:
        why = f": {record.reason}" if record.reason else ""
        title = f"### {_text(record.name)}: no configuration yet"
        return f"{title}\n\nNo trial has completed (the search is {record.status}{why})."
    item = best.candidate
    facts = [f"{_text(record.objective_name)} **{_number(item.objective)}**"]
    if item.peak_memory_bytes is not None:
        share = ""
        if record.memory_budget_bytes:
            percent = 100 * item.peak_memory_bytes / record.memory_budget_bytes
            share = f" of {format_bytes(record.memory_budget_bytes)} ({percent:.0f} %)"
        facts.append(f"peak memory **{_size(item.peak_memory_bytes)}**{share}")
    if item.throughput_samples_per_second is not None:
        facts.append(f"**{_speed(item.throughput_samples_per_second)} samples/s**")
    own = _own_hyperparameters(item.hyperparameters, "`")
    lines = [
        # MLflow folds a note after a few lines: the whole answer is in them.
        f"### Train with micro-batch {item.micro_batch_size} × {item.accumulation_steps} accumulation steps "
        f"= effective batch {item.effective_batch_size}",
        f"{', '.join(facts)}{', with ' + own if own else ''}.",
        f"**Why:** {best.reason}"
        + ("" if item.is_trained else " Its memory and speed were predicted from the profile of its model."),
    ]
    return "\n\n".join(lines)


def _import_lines(config_json: str | None, folder: Path) -> str:
    origin = json.loads(config_json or "{}").get("source") or {}
    source = json.dumps(str(folder / "best_config.json"))
    if origin.get("run_id"):
        source = f'"runs:/{origin["run_id"]}/best_config.json"'
        # accumtune looks into its default store by itself.
        source += f', tracking_uri="{origin["tracking_uri"]}"' if origin.get("tracking_uri") else ""
    return (
        "### Train with it\n\n```python\n"
        f'config = accumtune.load_config({source})\n'
        "model = config.build(build_model)\n"
        "model.fit(x, y, **config.fit_arguments())\n```"
    )


def _runners_up(
    record: SearchRecord, candidates: Sequence[CandidateLike], front: Sequence[CandidateLike], winner: CandidateLike
) -> str:
    others = [item for item in _ordered(candidates, record.objective_direction) if not _is_among(item, [winner])]
    # Trained ones first: a profiled one is the same training as a trained one, in another micro-batch.
    shown = [item for item in others if item.is_trained][:_RUNNERS_UP]
    shown += [item for item in others if not item.is_trained and _is_among(item, front)][: _RUNNERS_UP // 2]
    if not shown:
        return ""
    name = _text(record.objective_name)
    lines = [
        "### Runners-up",
        "",
        f"| | {name} | effective batch | micro × steps | peak memory | samples/s | hyperparameters |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for item in shown:
        mark = "" if item.is_trained else "~"
        cells = [
            "●" if _is_among(item, front) else "",
            _number(item.objective),
            str(item.effective_batch_size),
            f"{item.micro_batch_size} × {item.accumulation_steps}",
            mark + _size(item.peak_memory_bytes),
            mark + _speed(item.throughput_samples_per_second),
            _own_hyperparameters(item.hyperparameters),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    legend = "● on the Pareto front: nothing else is at least as good in all of quality, memory and speed."
    if any(not item.is_trained for item in shown):
        legend += " ~ predicted: the same training in another micro-batch."
    return "\n".join([*lines, "", legend])


def _what_happened(record: SearchRecord) -> str:
    budget = record.memory_budget_bytes
    counts = {status: record.with_status(status) for status in STATUSES}
    words = {
        "completed": "trained",
        "reused": "reused (the same training as an earlier trial)",
        "infeasible": "infeasible",
        "failed": "failed",
        "running": "not ended",
    }
    told = ", ".join(f"{len(trials)} {words[status]}" for status, trials in counts.items() if trials) or "none"
    lines = [
        "### The search",
        "",
        f"- **Memory budget:** {'none' if budget is None else format_bytes(budget)}",
        f"- **Searched:** {record.tuner or 'a tuner'} over micro-batches {_sizes(record.micro_batch_sizes)} "
        f"and accumulation steps {_sizes(record.accumulation_steps)}"
        + (f", as {record.search_over.replace('_', ' ')}" if record.search_over else ""),
        f"- **Proposals:** {told}",
    ]
    for status in ("infeasible", "failed"):
        reasons = Counter(_first_line(trial.reason) for trial in counts[status])
        lines += [f"    - {status}: {reason} ({count} ×)" for reason, count in reasons.most_common(_REASONS)]
    if record.status not in ("finished", "running"):
        lines.append(f"- **The search was {record.status}:** {_first_line(record.reason)}")
    where = ", ".join(_text(item) for item in (record.device or _device(record), record.backend) if item)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines.append(f"- **Measured on:** {'; '.join(item for item in (where, versions) if item) or 'unknown'}")
    lines += [f"- **Advice:** {_text(advice)}" for advice in record.advice]
    return "\n".join(lines)


def _pictures_line(candidates: Sequence[CandidateLike]) -> str:
    if not candidates:
        return ""
    return (
        "Pictures are among this run's artifacts: `pareto.png` (quality, memory, speed), `memory.png` and "
        "`throughput.png` (against the micro-batch), `effective_batch.png`; all candidates: `candidates.csv`."
    )


def _device(record: SearchRecord) -> str:
    return next((trial.device for trial in record.trials if trial.device), "")


def _ordered(candidates: Iterable[CandidateLike], direction: str) -> list[CandidateLike]:
    sign = -1 if direction == "max" else 1

    def key(item: CandidateLike) -> tuple[float, bool, float]:
        value = math.inf if item.objective is None or math.isnan(item.objective) else sign * item.objective
        return (value, not item.is_trained, -(item.throughput_samples_per_second or 0.0))

    return sorted(candidates, key=key)


def _is_among(item: CandidateLike, others: Sequence[CandidateLike]) -> bool:
    return any(item is other or item == other for other in others)


def _own(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hyperparameters.items() if k not in BATCH and not k.startswith("tuner/")}


def _own_hyperparameters(hyperparameters: Mapping[str, Any], quote: str = "") -> str:
    own = _own(hyperparameters)
    return ", ".join(f"{quote}{name}={_value(value)}{quote}" for name, value in own.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(str(value))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _size(size_bytes: float | None) -> str:
    return "–" if size_bytes is None else format_bytes(size_bytes)


def _speed(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _sizes(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "–"


def _text(text: str) -> str:
    """Without what Markdown would take for a table or a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return _text(lines[0][:300]) if lines else "no reason given"


def _write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
