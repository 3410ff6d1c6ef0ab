"""Makes the saved view with which MLflow's UI opens a search: its columns, its order and its charts.

MLflow 3 keeps a shared view in a tag of the experiment (verified on 3.17.2). This is not a documented interface: if a
store refuses it, the UI opens the plain list of runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from typing import Any

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.tracking.mlflow.run_content import SEARCH_TAG, clean_name
from accumtune.tracking.records import SearchRecord, TrialRecord

_TAG = "mlflow.sharedViewState."
_OURS_TAG = "accumtune.viewDigest."
_MAXIMUM_TAG = 20_000
_METRICS = ("peak_memory_mib", "throughput_samples_per_second")
_KIND_TAG = "mlflow.experimentKind"
# Widths of the table's columns in pixels; long headers are cut, so that a window holds the important columns.
_PIXELS_PER_LETTER, _MARGIN_PIXELS, _LEAST_PIXELS, _MOST_PIXELS, _DESCRIPTION_PIXELS = 7, 28, 90, 132, 420


def save_view(client: Any, experiment_id: str, search: SearchRecord, value: str) -> str | None:
    """Saves the search's view in its experiment, unless the user has edited or deleted it.

    Args:
        client: MLflow's.
        experiment_id: the search's.
        search: the search.
        value: of `encoded_view`.

    Returns:
        The key that opens the view (`?viewStateShareKey=<key>`), or None if there is no view.
    """
    from mlflow.exceptions import MlflowException

    key = hashlib.sha256(f"accumtune {search.search_id}".encode()).hexdigest()[:32]
    digest = _digest(value)
    try:
        tags = client.get_experiment(experiment_id).tags
        if _KIND_TAG not in tags:
            # Without it, the UI assumes an experiment of prompts and traces, and hides columns and charts.
            client.set_experiment_tag(experiment_id, _KIND_TAG, "custom_model_development")
        ours, present = tags.get(_OURS_TAG + key), tags.get(_TAG + key)
        is_untouched = ours is None or (present is not None and _digest(present) == ours)
        if is_untouched and ours != digest:
            client.set_experiment_tag(experiment_id, _TAG + key, value)
            client.set_experiment_tag(experiment_id, _OURS_TAG + key, digest)
            present = value
    except MlflowException as error:
        logging.getLogger(__name__).info("MLflow refused the saved view: %s", error)
        return None
    return key if present is not None else None


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def encoded_view(search: SearchRecord, trials: Sequence[TrialRecord]) -> str | None:
    """Returns the tag's value; None if it would be longer than MLflow allows."""
    when = int((search.started_at or 0.0) * 1000)
    state = json.dumps(view_state(search, trials), separators=(",", ":"))
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode(), 9)).decode()
    name = f"accumtune: {search.name or 'search'}"
    value = json.dumps({"name": name, "createdAt": when, "updatedAt": when, "state": packed})
    return value if len(value) <= _MAXIMUM_TAG else None


def view_state(search: SearchRecord, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Returns the state of MLflow's run list for one search.

    Args:
        search: the search.
        trials: its trials, whose hyperparameters become columns and axes.
    """
    best = clean_name(f"best_{search.objective_name}")
    own = _hyperparameters(trials)
    # The metrics come first: the pair is in each run's name already.
    columns = [
        *(f"metrics.`{name}`" for name in (best, *_METRICS)),
        *(f"params.`{name}`" for name in BATCH_HYPERPARAMETERS),
        "tags.`accumtune.status`",
        *(f"params.`{name}`" for name in own[:6]),
        "metrics.`predicted_peak_memory_mib`",
        "attributes.`Description`",
    ]
    order = ["attributes.`Run Name`", *columns]
    # Parallel coordinates omit runs that lack an axis, so only hyperparameters of all trials become axes.
    shared = [name for name in own if all(_has(trial, name) for trial in trials if trial.status == "completed")]
    sections, charts = _charts(search, best, shared)
    return {
        "searchFilter": f"tags.`{SEARCH_TAG}` = '{search.search_id}'",
        "orderByKey": f"metrics.`{best}`",
        "orderByAsc": search.objective_direction != "max",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": order,
        "columnWidths": {column: _width(column) for column in columns},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "compareRunSections": sections,
        "compareRunCharts": charts,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _hyperparameters(trials: Sequence[TrialRecord]) -> list[str]:
    """Returns the names of the user's hyperparameters, in the order of their first use."""
    names = {clean_name(name): None for trial in trials for name in trial.hyperparameters}
    return [name for name in names if name not in BATCH_HYPERPARAMETERS and not name.startswith("tuner/")]


def _has(trial: TrialRecord, name: str) -> bool:
    return any(clean_name(key) == name for key in trial.hyperparameters)


def _width(column: str) -> int:
    name = column.split("`")[1]
    letters = _PIXELS_PER_LETTER * len(name) + _MARGIN_PIXELS
    return _DESCRIPTION_PIXELS if name == "Description" else min(_MOST_PIXELS, max(_LEAST_PIXELS, letters))


def _charts(search: SearchRecord, best: str, own: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def identity(name: str) -> str:
        return hashlib.sha256(f"{search.search_id} {name}".encode()).hexdigest()[:24]

    def section(name: str) -> dict[str, Any]:
        # Two in a row: with MLflow's three, titles are cut and parallel axes are too close.
        common = {"isReordered": True, "deleted": False, "isGenerated": False, "columns": 2, "cardHeight": 380}
        return {"uuid": identity(name), "name": name, "display": True, **common}

    def chart(where: str, kind: str, title: str, **options: Any) -> dict[str, Any]:
        common = {"runsCountToCompare": 100, "deleted": False, "isGenerated": False}
        return {
            "uuid": identity(title), "type": kind, "metricSectionId": identity(where), "displayName": title,
            **common, **options,
        }  # fmt: skip

    def scatter(title: str, x: str, y: str, x_type: str = "METRIC") -> dict[str, Any]:
        axes = {"xaxis": {"key": x, "type": x_type}, "yaxis": {"key": y, "type": "METRIC"}}
        return chart(_TRADE_OFF, "SCATTER", title, **axes)

    objective = search.objective_name
    charts = [
        scatter(f"{objective} against peak memory (MiB)", "peak_memory_mib", best),
        scatter(f"{objective} against effective batch", "effective_batch_size", best),
        scatter("throughput against peak memory (MiB)", "peak_memory_mib", "throughput_samples_per_second"),
        chart(
            _TRADE_OFF, "PARALLEL", "parameters to memory and objective",
            # A card has room for the labels of six axes.
            selectedParams=[*BATCH_HYPERPARAMETERS[:2], *own[:2]], selectedMetrics=["peak_memory_mib", best],
            showAllRuns=False,
        ),
        *(
            chart(
                _CURVES, "LINE", name,
                metricKey=name, selectedMetricKeys=[name], xAxisKey="step", yAxisKey="metric", yAxisExpressions=[],
                range={}, xAxisScaleType="linear", scaleType="linear", lineSmoothness=0, selectedXAxisMetricKey="",
            )
            for name in dict.fromkeys((objective, "loss", "val_loss"))
        ),
    ]  # fmt: skip
    return [section(_TRADE_OFF), section(_CURVES)], charts


_TRADE_OFF = "What quality costs"
_CURVES = "Curves"
