"""Names the files of a search's report, and brings the MLflow run that its configuration is loaded from into them."""

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
    """The line of code that loads a report's configuration: from its run, or from its file where it has none."""
    if not source.get("run_id"):
        return f"config = accumtune.load_config({json.dumps(str(report / CONFIG_FILE), ensure_ascii=False)})"
    place = json.dumps(f"runs:/{source['run_id']}/{CONFIG_FILE}")
    if source.get("tracking_uri"):
        place += f", tracking_uri={json.dumps(source['tracking_uri'], ensure_ascii=False)}"
    return f"config = accumtune.load_config({place})"


def source_of(report: Path) -> dict[str, Any]:
    """What the report's configuration says of where it is from; {} where there is none."""
    try:
        source = json.loads((report / CONFIG_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return source if isinstance(source, dict) else {}


def name_run(report: Path, run_id: str, tracking_uri: str) -> None:
    """Brings the run that a search has now into its report.

    When the report was written, the store may have been out of reach, or it has lost its runs since.
    """
    before = source_of(report)
    now = before | {"run_id": run_id, "tracking_uri": without_credentials(tracking_uri)}
    if not before or before == now:
        return
    config, note = report / CONFIG_FILE, report / NOTE_FILE
    if note.exists():
        text = note.read_text(encoding="utf-8")
        write_atomically(note, text.replace(import_line(before, report), import_line(now, report)))
    # Last: as long as it has the old run, this is done again.
    values = json.loads(config.read_text(encoding="utf-8"))
    write_atomically(config, json.dumps({**values, "source": now}, indent=2) + "\n")
