"""Registers the best model in MLflow, from the search's folder.

    <search folder>/model/                  the model in MLflow's format, with its signature
    <search folder>/model.json              its registered name and its trial; written last

The model version belongs to the search's run. Its tag `accumtune.config` names the artifact of that run that is the
model's configuration.
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
    """Returns the model to register: `name`, `trial_id` and a `key` of the content; None if there is none."""
    try:
        content = json.loads((folder / MODEL_FILE).read_text())
    except (OSError, ValueError):
        return None
    is_complete = isinstance(content, dict) and {"name", "trial_id", "key"} <= set(content)
    return content if is_complete and (folder / MODEL_FOLDER / "MLmodel").exists() else None


def register_model(client: Any, run_id: str, folder: Path) -> str | None:
    """Logs the model, registers it under its name, once, and moves the alias `best` to it.

    Args:
        client: MLflow's.
        run_id: of the search's run.
        folder: the search's.

    Returns:
        `name/version`, or None if there is no model to register.
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
            # A copy beside the model, because the search's own file is replaced when another trial is better.
            client.log_artifact(run_id, str(config), path)
            config_artifact = f"{path}/{CONFIG_FILE}"
        tags = {CONFIG_TAG: config_artifact, TRIAL_TAG: model["trial_id"], _KEY_TAG: model["key"]}
        version = client.create_model_version(name, source, run_id=run_id, tags=tags).version
        client.set_registered_model_alias(name, ALIAS, version)
    return f"{name}/{version}"


def _version(client: Any, name: str, run_id: str, model: Mapping[str, str]) -> str | None:
    """Returns the version that an earlier attempt made, or None; creates the registered model if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    quoted = name.replace("'", "''")
    for version in client.search_model_versions(f"name = '{quoted}'"):
        if version.run_id == run_id and version.tags.get(_KEY_TAG) == model["key"]:
            # The earlier attempt may have been killed before it set the alias.
            if int(client.get_registered_model(name).aliases.get(ALIAS, 0)) < int(version.version):
                client.set_registered_model_alias(name, ALIAS, version.version)
            return str(version.version)
    return None
