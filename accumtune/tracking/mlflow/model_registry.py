"""Registers the best model in MLflow, from what the search has left in its folder.

    <search folder>/model/                  the model as MLflow saves it, with its signature
    <search folder>/model.json              under which name, of which trial; written last

The version's run is the search's; the version's tag `accumtune.config` says which of its artifacts is the configuration
of that model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accumtune.tracking.mlflow.run_content import TRIAL_TAG
from accumtune.tracking.report.report_files import CONFIG_FILE, REPORT_FOLDER, source_of

MODEL_FOLDER = "model"
MODEL_FILE = "model.json"
ALIAS = "best"
CONFIG_TAG = "accumtune.config"
_KEY_TAG = "accumtune.model_key"


def wanted(folder: Path) -> dict[str, str] | None:
    """What is to be registered: `name`, `trial_id` and a `key` of the content; None where nothing is."""
    try:
        content = json.loads((folder / MODEL_FILE).read_text())
    except (OSError, ValueError):
        return None
    is_complete = isinstance(content, dict) and {"name", "trial_id", "key"} <= set(content)
    return content if is_complete and (folder / MODEL_FOLDER / "MLmodel").exists() else None


def bring_model(client: Any, run_id: str, folder: Path) -> str | None:
    """Logs the model and registers it under its name, once; the alias `best` moves to it.

    Args:
        client: MLflow's.
        run_id: the search's.
        folder: the search's.

    Returns:
        `name/version`, or None where there is no model to register.
    """
    model = wanted(folder)
    if model is None:
        return None
    name = model["name"]
    version = _version(client, name, run_id, model)
    if version is None:
        path = f"{MODEL_FOLDER}_{model['key'][:8]}"
        client.log_artifacts(run_id, str(folder / MODEL_FOLDER), path)
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        config = folder / REPORT_FOLDER / CONFIG_FILE
        config_artifact = CONFIG_FILE
        if source_of(config.parent).get("trial_id") == model["trial_id"]:
            # Beside the model: the search's own is that of another trial as soon as one is better.
            client.log_artifact(run_id, str(config), path)
            config_artifact = f"{path}/{CONFIG_FILE}"
        tags = {CONFIG_TAG: config_artifact, TRIAL_TAG: model["trial_id"], _KEY_TAG: model["key"]}
        version = client.create_model_version(name, source, run_id=run_id, tags=tags).version
        client.set_registered_model_alias(name, ALIAS, version)
    return f"{name}/{version}"


def _version(client: Any, name: str, run_id: str, model: Mapping[str, str]) -> str | None:
    """The version that an earlier attempt has made; the registered model is made where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    quoted = name.replace("'", "''")
    for version in client.search_model_versions(f"name = '{quoted}'"):
        if version.run_id == run_id and version.tags.get(_KEY_TAG) == model["key"]:
            # Between the version and its alias, a kill may have come.
            if int(client.get_registered_model(name).aliases.get(ALIAS, 0)) < int(version.version):
                client.set_registered_model_alias(name, ALIAS, version.version)
            return str(version.version)
    return None
