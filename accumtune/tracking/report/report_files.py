"""Names the files of a search's report, and updates the MLflow run in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accumtune.tracking.small_files import write_atomically
from accumtune.tracking.tracking_uri import without_credentials

REPORT_FOLDER = "report"
NOTE_FILE = "note.md"
CONFIG_FILE = "best_config.json"


def import_line(source: Mapping[str, Any], report: Path) -> str:
    """Returns the line of code that loads a report's configuration, from its run or, without one, from its file."""
    if not source.get("run_id"):
        return f"config = accumtune.load_config({json.dumps(str(report / CONFIG_FILE), ensure_ascii=False)})"
    place = json.dumps(f"runs:/{source['run_id']}/{CONFIG_FILE}")
    if source.get("tracking_uri"):
        place += f", tracking_uri={json.dumps(source['tracking_uri'], ensure_ascii=False)}"
    return f"config = accumtune.load_config({place})"


def source_of(report: Path) -> dict[str, Any]:
    """Returns the `source` of the report's configuration; {} if there is none."""
    try:
        source = json.loads((report / CONFIG_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return source if isinstance(source, dict) else {}


def name_run(report: Path, run_id: str, tracking_uri: str) -> None:
    """Writes the search's present run into its report.

    When the report was written, the store may not have answered; or the run was deleted since.
    """
    before = source_of(report)
    now = before | {"run_id": run_id, "tracking_uri": without_credentials(tracking_uri)}
    if not before or before == now:
        return
    config, note = report / CONFIG_FILE, report / NOTE_FILE
    if note.exists():
        text = note.read_text(encoding="utf-8")
        write_atomically(note, text.replace(import_line(before, report), import_line(now, report)))
    # Last: after a kill before this, the next call repeats all of it.
    values = json.loads(config.read_text(encoding="utf-8"))
    write_atomically(config, json.dumps({**values, "source": now}, indent=2) + "\n")
