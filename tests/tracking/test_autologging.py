"""MLflow's autologging records the same for an accumulated fit as for a plain one."""

import keras
import mlflow
import numpy as np
import pytest

import accumtune

pytest.importorskip("tensorflow")
X, Y = np.ones((32, 2), "float32"), np.ones((32, 1), "float32")


@pytest.fixture
def fit(new_uri, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # What is set here is unset for the tests that follow.
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    uri = new_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # set_tracking_uri sets it too
    mlflow.set_tracking_uri(uri)
    mlflow.tensorflow.autolog(log_models=False, checkpoint=False)

    def fit(*data, **accumulation):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        if accumulation:
            model = accumtune.accumulate(model, **accumulation)
        with mlflow.start_run() as run:
            model.fit(*data, epochs=1, verbose=0)
        return mlflow.get_run(run.info.run_id)

    yield fit
    mlflow.tensorflow.autolog(disable=True)


def test_the_training_data_are_an_input_of_the_run(fit, caplog):
    plain = fit(X, Y).inputs.dataset_inputs
    for accumulation in ({"micro_batch_size": 8}, {"accumulation_steps": 2}):
        run = fit(X, Y, **accumulation)
        (found,) = run.inputs.dataset_inputs
        assert found.dataset.digest == plain[0].dataset.digest and found.tags == plain[0].tags
        assert "loss" in run.data.metrics
    assert "Unrecognized" not in caplog.text


def test_and_not_where_the_user_wants_none(fit):
    mlflow.tensorflow.autolog(log_models=False, checkpoint=False, log_datasets=False)
    assert not fit(X, Y, micro_batch_size=8).inputs.dataset_inputs
