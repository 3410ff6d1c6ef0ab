"""Loads a configuration from a file, an MLflow run, a registered model, or an experiment's newest search."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumtune.config.schema import MAXIMUM_BYTES
from accumtune.config.training_config import TrainingConfig
from accumtune.errors import ConfigError, TrackingError
from accumtune.tracking.mlflow.model_registry import CONFIG_TAG
from accumtune.tracking.mlflow.run_content import TRIAL_TAG
from accumtune.tracking.mlflow.server_health import refuse_other_server
from accumtune.tracking.redaction import error_line
from accumtune.tracking.report.report_files import CONFIG_FILE
from accumtune.tracking.small_files import read_small
from accumtune.tracking.tracking_uri import DEFAULT_TRACKING_URI, default_tracking_uri, sqlite_path, without_credentials

_SOURCES = (
    'a path ("best_config.json"), "runs:/<run_id>/best_config.json", "models:/<name>@<alias>", an MLflow run, '
    "or the name of an experiment"
)


def load_config(source: Any, tracking_uri: str | None = None) -> TrainingConfig:
    """Loads the training configuration that a search has exported.

    Args:
        source: a path, `"runs:/<run_id>/best_config.json"`, `"models:/<name>@<alias>"` or `"models:/<name>/<version>"`,
            an `mlflow.entities.Run`, or the name of an experiment (a search's `project_name`), for its newest finished
            search.
        tracking_uri: MLflow's store; default: the one that was set in MLflow (`MLFLOW_TRACKING_URI`,
            `mlflow.set_tracking_uri`), then accumtune's own, `sqlite:///mlruns/mlflow.db`.

    Raises:
        ConfigError: there is nothing at the source, or it is not a configuration that this version can read.

    Example:

    >>> config = accumtune.load_config("runs:/0123456789abcdef/best_config.json")
    """
    run_id = getattr(getattr(source, "info", None), "run_id", None)
    if run_id is not None:
        return _from_run(str(run_id), None, tracking_uri)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"Received {source!r} of type {type(source).__name__}.", _SOURCES, "pass one of these.")
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if match := re.fullmatch(r"runs:/+([^/]+)(?:/(.+))?", text):
        return _from_run(match[1], match[2], tracking_uri)
    if match := re.fullmatch(r"models:/+([^/@]+)(?:@(.+)|/(\d+))", text):
        return _from_model(match[1], match[2], match[3], tracking_uri)
    if isinstance(source, os.PathLike) or _is_path(text):
        return _from_file(Path(source))
    return _from_experiment(text, tracking_uri)


def _is_path(text: str) -> bool:
    if text.endswith(".json") or os.sep in text or "\0" in text:
        return True
    return os.path.exists(text)


def _from_file(path: Path) -> TrainingConfig:
    try:
        if path.is_dir():
            path = path / CONFIG_FILE
        content = read_small(path, MAXIMUM_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"The file {str(path)!r} cannot be read: {reason}.", _SOURCES, "check the path.") from None
    return TrainingConfig.from_json(content, f"The file {str(path)!r}")


def _from_run(run_id: str, artifact: str | None, tracking_uri: str | None) -> TrainingConfig:
    client, run = _asked(tracking_uri, lambda client: client.get_run(run_id), f"The run {run_id!r}")
    # A trial's run has no configuration: the search's run, its parent, has that of the best trial.
    parent = run.data.tags.get("mlflow.parentRunId")
    if parent and artifact is None:
        return _download(client, parent, CONFIG_FILE, of_trial=run.data.tags.get(TRIAL_TAG))
    return _download(client, run_id, artifact or CONFIG_FILE)


def _from_model(name: str, alias: str | None, version: str | None, tracking_uri: str | None) -> TrainingConfig:
    def version_of(client: Any) -> Any:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)

    client, found = _asked(tracking_uri, version_of, f"The registered model {name!r}")
    if CONFIG_TAG not in found.tags:  # not registered by a search
        return _from_run(found.run_id, None, client.tracking_uri)
    return _download(client, found.run_id, found.tags[CONFIG_TAG], of_trial=found.tags.get(TRIAL_TAG))


def _from_experiment(name: str, tracking_uri: str | None) -> TrainingConfig:
    def newest_search(client: Any) -> Any:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise LookupError("no such experiment")
        runs = client.search_runs(
            [experiment.experiment_id],
            "tags.`accumtune.kind` = 'search' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if not runs:
            raise LookupError("no finished search in it")
        return runs[0]

    what = f"{name!r} is not a file. The experiment of this name"
    client, run = _asked(tracking_uri, newest_search, what)
    return _download(client, run.info.run_id, CONFIG_FILE)


def _asked(tracking_uri: str | None, ask: Callable[[Any], Any], what: str) -> tuple[Any, Any]:
    """Returns the client of the first store that has an answer, and the answer.

    Raises:
        ConfigError: no store has one; the message begins with `what`.
    """
    faults = []
    for uri in store_uris(tracking_uri):
        client = open_store(uri)
        try:
            return client, ask(client)
        except Exception as error:  # MLflow raises what its store raises, SQLAlchemy's and requests' errors included
            faults.append(f"{without_credentials(uri)}: {error_line(error)}")
    raise ConfigError(f"{what} was not found. {'; '.join(faults)}.", _SOURCES, "check the name and the tracking_uri.")


def _download(client: Any, run_id: str, artifact: str, of_trial: str | None = None) -> TrainingConfig:
    """Downloads the configuration from a run's artifacts; it must be that of trial `of_trial`, if that is given."""
    origin = f"runs:/{run_id}/{artifact}"
    with tempfile.TemporaryDirectory(prefix="accumtune-") as folder:
        try:
            content = read_small(download(client, run_id, artifact, folder), MAXIMUM_BYTES)
        except TrackingError as error:
            raise ConfigError(f"{origin}: {error.received}", error.expected, error.fix) from None
        except Exception as error:
            raise ConfigError(
                f"{origin} cannot be downloaded: {error_line(error)}",
                "the run of a search that has finished with a best configuration",
                "pass the search's (parent) run; `accumtune best SEARCH` prints its configuration.",
            ) from None
    config = TrainingConfig.from_json(content, origin)
    if of_trial is not None and config.source.get("trial_id") != of_trial:
        raise ConfigError(
            f"{origin} is the configuration of trial {config.source.get('trial_id')}, the best of its search, and not "
            f"of trial {of_trial}.",
            "the run of the search, or that of its best trial",
            f'accumtune.load_config("{origin}") for the best one; tuner.get_best_config(lambda candidates: next(it for '
            f'it in candidates if it.trial_id == "{of_trial}")) for this one.',
        )
    return config


def store_uris(tracking_uri: str | None) -> list[str]:
    """Returns the stores to search: the given one alone, or the caller's and then accumtune's default.

    The caller's is the one of `mlflow.set_tracking_uri`, else `MLFLOW_TRACKING_URI`. An address in a configuration is
    never used, because MLflow would send the caller's token there.
    """
    if tracking_uri is not None:
        return [tracking_uri]
    stores, default = [*_set_in_mlflow(), default_tracking_uri()], sqlite_path(DEFAULT_TRACKING_URI)
    if default is not None and default.exists():
        stores.append(DEFAULT_TRACKING_URI)
    return list(dict.fromkeys(stores))


def _set_in_mlflow() -> list[str]:
    mlflow = sys.modules.get("mlflow")  # if it is not imported, nothing was set
    return [mlflow.get_tracking_uri()] if mlflow is not None and mlflow.is_tracking_uri_set() else []


def open_store(uri: str) -> Any:
    """MLflow's client for a store.

    Raises:
        ConfigError: the database file does not exist.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        # MLflow would create an empty database here, and not find the run in it.
        raise ConfigError(
            f"There is no tracking store at {uri}.",
            "the store that the search was tracked in",
            'pass tracking_uri="sqlite:///<path>/mlflow.db", or run from the folder that holds mlruns/.',
        )
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def download(client: Any, run_id: str, artifact: str, folder: str) -> Path:
    """Downloads a run's artifact from the store's own server or storage.

    Raises:
        TrackingError: the artifact is on another server.
        Exception: whatever MLflow raises.
    """
    refuse_other_server(client.tracking_uri, client.get_run(run_id).info.artifact_uri)
    return Path(client.download_artifacts(run_id, artifact, folder))
