"""MLflow's stores, where a configuration and its weights are looked for."""

from __future__ import annotations

from typing import Any

from accumtune.errors import ConfigError
from accumtune.tracking.uris import DEFAULT_TRACKING_URI, sqlite_path


def store_uris(tracking_uri: str | None) -> list[str]:
    """Where to look: the given store alone, or MLflow's own setting, then accumtune's default."""
    if tracking_uri is not None:
        return [tracking_uri]
    import mlflow

    stores = [uri for uri in [mlflow.get_tracking_uri()] if uri and mlflow.is_tracking_uri_set()]
    default = sqlite_path(DEFAULT_TRACKING_URI)
    if not stores or (default is not None and default.exists()):
        stores.append(DEFAULT_TRACKING_URI)
    return list(dict.fromkeys(stores))


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
