"""MLflow's stores, where a configuration and its weights are looked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accumtune.errors import ConfigError
from accumtune.tracking.mlflow.server_health import refuse_other_server
from accumtune.tracking.tracking_uri import DEFAULT_TRACKING_URI, default_tracking_uri, sqlite_path


def store_uris(tracking_uri: str | None) -> list[str]:
    """Where to look: the given store alone, or the caller's, then accumtune's default.

    The caller's is what `mlflow.set_tracking_uri` was given, else `MLFLOW_TRACKING_URI`.

    Only the caller says where. An address that stands in a file is nobody's to contact: MLflow would send the caller's
    token there.
    """
    if tracking_uri is not None:
        return [tracking_uri]
    stores, default = [*_set_in_mlflow(), default_tracking_uri()], sqlite_path(DEFAULT_TRACKING_URI)
    if default is not None and default.exists():
        stores.append(DEFAULT_TRACKING_URI)
    return list(dict.fromkeys(stores))


def _set_in_mlflow() -> list[str]:
    mlflow = sys.modules.get("mlflow")  # not imported: nothing was set
    return [mlflow.get_tracking_uri()] if mlflow is not None and mlflow.is_tracking_uri_set() else []


def open_store(uri: str) -> Any:
    """MLflow's client for a store.

    Raises:
        ConfigError: it is a database file that is not there.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        # MLflow would make an empty database here, and then say that the run is not in it.
        raise ConfigError(
            f"There is no tracking store at {uri}.",
            "the store that the search was tracked in",
            'pass tracking_uri="sqlite:///<path>/mlflow.db", or run from the folder that holds mlruns/.',
        )
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def download(client: Any, run_id: str, artifact: str, folder: str) -> Path:
    """A run's artifact, from the store's own server or storage.

    Raises:
        TrackingError: the store says that it is on another server.
        Exception: whatever MLflow raises.
    """
    refuse_other_server(client.tracking_uri, client.get_run(run_id).info.artifact_uri)
    return Path(client.download_artifacts(run_id, artifact, folder))
