"""Where a configuration is loaded from."""

import os

import pytest
from made_config import config_of

from accumtune.config import load_config
from accumtune.errors import ConfigError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An MLflow store with one finished search and a registered model, as the tracker leaves them."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    number = client.create_experiment("digits", artifact_location=(folder / "artifacts").as_uri())
    parents = []
    for width in (1, 2):
        parent = client.create_run(number, start_time=1000 * width, tags={"accumtune.kind": "search"}).info.run_id
        client.log_text(parent, config_of(hyperparameters={"width": width}).to_json(), "best_config.json")
        client.set_terminated(parent)
        parents.append(parent)
    child = client.create_run(number, tags={"mlflow.parentRunId": parents[0]}).info.run_id
    client.create_registered_model("net")
    client.create_model_version("net", source=f"runs:/{child}/model", run_id=child)
    client.set_registered_model_alias("net", "best", "1")
    return client, f"sqlite:///{folder}/mlflow.db", parents, child


def test_every_source_leads_to_the_configuration(store):
    client, uri, (first, second), child = store
    for source in (
        f"runs:/{first}/best_config.json", f"runs:/{first}", f"runs:/{child}", "models:/net@best", "models:/net/1",
        client.get_run(first), client.get_run(child),
    ):  # fmt: skip
        assert load_config(source, tracking_uri=uri).hyperparameters == {"width": 1}, source
    assert load_config("digits", tracking_uri=uri).hyperparameters == {"width": 2}, "the newest search"


def test_a_trials_run_has_its_own_configuration_or_none(store):
    client, uri, (first, _), _ = store
    number = client.get_experiment_by_name("digits").experiment_id
    config = config_of(hyperparameters={"width": 3}, source={"trial_id": "03"})
    parent = client.create_run(number, tags={"accumtune.kind": "search"}).info.run_id
    client.log_text(parent, config.to_json(), "best_config.json")
    trials = {
        trial: client.create_run(number, tags={"mlflow.parentRunId": parent, "accumtune.trial_id": trial}).info.run_id
        for trial in ("03", "07")
    }
    assert load_config(f"runs:/{trials['03']}", tracking_uri=uri) == config == load_config(f"runs:/{parent}", uri)
    for source in (f"runs:/{trials['07']}", client.get_run(trials["07"])):
        with pytest.raises(ConfigError, match="of trial 03, the best of its search, and not of trial 07"):
            load_config(source, tracking_uri=uri)
    # A version of the registry is of one trial too, and its search may have found a better one since.
    client.create_registered_model("moved")
    tags = {"accumtune.config": "best_config.json", "accumtune.trial_id": "07"}
    client.create_model_version("moved", source=f"runs:/{parent}/model", run_id=parent, tags=tags)
    with pytest.raises(ConfigError, match="not of trial 07"):
        load_config("models:/moved/1", tracking_uri=uri)
    client.log_text(parent, config_of(hyperparameters={}, source={"trial_id": "07"}).to_json(), "model_a/c.json")
    client.create_model_version(
        "moved", source=f"runs:/{parent}/model", run_id=parent, tags=tags | {"accumtune.config": "model_a/c.json"}
    )
    assert load_config("models:/moved/2", tracking_uri=uri).source["trial_id"] == "07"


@pytest.mark.parametrize(
    "source",
    ["runs:/none/best_config.json", "models:/none@best", "models:/net@none", "no_experiment", "no/file.json",
     "a\0.json", "x" * 5000, "/" * 5000 + "x.json", ".", 7, None, b"\xff"],
)  # fmt: skip
def test_sources_that_lead_nowhere(store, source):
    with pytest.raises(ConfigError) as error:
        load_config(source, tracking_uri=store[1])
    assert error.value.expected and error.value.fix


def test_an_artifact_that_is_not_there(store):
    for source in (f"runs:/{store[2][0]}/other.json", f"runs:/{store[2][0]}/../../../../etc/passwd"):
        with pytest.raises(ConfigError):
            load_config(source, tracking_uri=store[1])


def test_the_default_store(store, tmp_path, monkeypatch):
    import shutil

    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = store[2][0]
    assert not mlflow.is_tracking_uri_set()
    with pytest.raises(ConfigError, match="no tracking store"):
        load_config(f"runs:/{run}")
    assert os.listdir(tmp_path) == [], "nothing is made by looking"
    (tmp_path / "mlruns").mkdir()
    shutil.copy(store[1].removeprefix("sqlite:///"), tmp_path / "mlruns" / "mlflow.db")
    assert load_config(f"runs:/{run}").hyperparameters == {"width": 1}
    # MLflow's own setting comes first, and what is not there is looked for in the default.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    (tmp_path / "other.db").touch()
    assert load_config(f"runs:/{run}").hyperparameters == {"width": 1}
