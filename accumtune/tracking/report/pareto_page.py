"""Writes the Pareto front as an interactive HTML file of some twenty kilobytes, with SVG and a script, for use offline.

A plotting library's bundle would add 4 MB to each search's run.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from accumtune.memory.budget import format_bytes, mib
from accumtune.tracking.records import SearchRecord
from accumtune.tracking.report.candidate_tables import is_among, number, own_hyperparameters, size, speed

_TEMPLATE = "pareto.html"


def pareto_html(record: SearchRecord, candidates: Sequence[Any], front: Sequence[Any], best: Any | None) -> str | None:
    """Returns the page; None if there is no candidate to show.

    Args:
        record: the search.
        candidates: all; those without objective or peak memory are left out.
        front: those on the Pareto front.
        best: the chosen one.
    """
    points = [
        _point(item, front, best)
        for item in candidates
        if _is_number(item.objective) and _is_number(item.peak_memory_bytes)
    ]
    if not points:
        return None
    content = {
        "objective": record.objective_name,
        "direction": record.objective_direction,
        "budget": None if record.memory_budget_bytes is None else mib(record.memory_budget_bytes),
        "budgetText": None if record.memory_budget_bytes is None else format_bytes(record.memory_budget_bytes),
        "points": points,
    }
    # A "</" in a hyperparameter would end the script element.
    data = json.dumps(content, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    template = files("accumtune.tracking.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    title = html.escape(f"{record.name}: quality, memory and speed")
    return template.replace("{{title}}", title).replace("{{data}}", data)


def _point(item: Any, front: Sequence[Any], best: Any | None) -> dict[str, Any]:
    rate = item.throughput_samples_per_second
    mark = "" if item.is_trained else "~"
    return {
        "memory": mib(item.peak_memory_bytes),
        "objective": item.objective,
        "speed": rate if _is_number(rate) else None,
        "isTrained": item.is_trained,
        "isFront": is_among(item, front),
        "isBest": best is not None and is_among(item, [best]),
        "batch": f"{item.effective_batch_size} = {item.micro_batch_size} × {item.accumulation_steps}",
        "trial": item.trial_id,
        "objectiveText": number(item.objective),
        "memoryText": mark + size(item.peak_memory_bytes),
        "speedText": mark + speed(rate),
        "hyperparameters": own_hyperparameters(item.hyperparameters),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
