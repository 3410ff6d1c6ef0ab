"""The best model in MLflow's registry: with a signature, an alias and its configuration, exactly once."""

import shutil

import mlflow
import numpy as np
import pytest

from accumtune.tracking.mlflow.model_registry import MODEL_FILE
from accumtune.tracking.mlflow.tracker import Tracker


def saved_model(folder, name="digits", key="a" * 64):
    """What a search leaves: here with a model that needs no framework."""
    from mlflow.models import infer_signature

    class Half(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input, params=None):
            return np.asarray(model_input) / 2

    shutil.rmtree(folder / "model", ignore_errors=True)
    sample = np.ones((2, 3), "float32")
    mlflow.pyfunc.save_model(
        folder / "model", python_model=Half(), signature=infer_signature(sample, sample / 2), pip_requirements=["numpy"]
    )
    (folder / MODEL_FILE).write_text(f'{{"name": "{name}", "trial_id": "01", "key": "{key}"}}')


def versions(uri, name="digits"):
    return mlflow.MlflowClient(uri, uri).search_model_versions(f"name='{name}'")


def test_the_model_is_registered_once_with_its_alias_and_configuration(finished, uri, monkeypatch):
    report = finished.folder / "report"
    report.mkdir()
    (report / "best_config.json").write_text('{"source": {"trial_id": "01"}}')
    saved_model(finished.folder)
    for _ in range(2):
        Tracker(finished.folder, uri).sync()
    (version,) = versions(uri)
    config = f"model_{'a' * 8}/best_config.json"
    assert version.tags["accumtune.config"] == config and version.tags["accumtune.trial_id"] == "01"
    client = mlflow.MlflowClient(uri, uri)
    tracker = Tracker(finished.folder, uri)
    assert version.run_id == tracker.parent_run_id
    assert client.get_model_version_by_alias("digits", "best").version == version.version
    assert client.get_run(version.run_id).data.tags["accumtune.registered_model"] == "digits/1"
    local = mlflow.artifacts.download_artifacts(version.source, tracking_uri=uri)
    loaded = mlflow.pyfunc.load_model(local)
    assert loaded.metadata.signature is not None
    assert loaded.predict(np.ones((1, 3), "float32")).tolist() == [[0.5] * 3]

    saved_model(finished.folder, key="b" * 64)  # a longer search has found a better one
    Tracker(finished.folder, uri).sync()
    assert len(versions(uri)) == 2
    assert client.get_model_version_by_alias("digits", "best").version in (2, "2")


@pytest.mark.parametrize(
    "missing", [pytest.param("create_model_version", marks=pytest.mark.slow), "set_registered_model_alias"]
)
def test_a_registry_that_fails_midway_is_completed_by_the_next_sync(missing, finished, uri, monkeypatch):
    saved_model(finished.folder)
    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, missing, lambda *args, **kwargs: 1 / 0)
        with pytest.raises(Exception, match="division"):
            Tracker(finished.folder, uri).sync()
    Tracker(finished.folder, uri).sync()
    assert len(versions(uri)) == 1
    assert mlflow.MlflowClient(uri, uri).get_model_version_by_alias("digits", "best")
