"""The README's digits search in a smaller form, and production with its result."""

import os
import re
import sys
from dataclasses import replace

import forked
import pytest
from running import DIGITS, EXPERIMENTS, WITHOUT_ACCUMTUNE, run_experiment

import accumtune
from accumtune import cli
from accumtune.errors import ConfigError
from accumtune.tracking.journal import read_search


def test_the_search_stays_in_its_budget_and_says_what_it_found(digits):
    folder, output = digits
    record = read_search(folder / "mlruns" / "searches" / "digits")
    completed = record.with_status("completed")
    assert len(completed) == 3
    assert all(trial.peak_memory_bytes <= record.memory_budget_bytes for trial in completed)
    for words in ("[3/3]", "micro × steps", "Pareto front", "Why:", "best_config.json", "mlflow ui"):
        assert words in output


def test_the_budget_bites_and_the_search_says_what_accumulation_has_won(digits):
    """Micro-batches of 256 and 512 do not fit, and no probe or prediction says that they would."""
    folder, output = digits
    assert "probed micro-batch 64" in output
    assert re.search("^(What accumulation won|Accumulation is not needed): ", output, re.MULTILINE)
    assert not re.search(r"probed micro-batch (256|512): ×1 \d|(256|512) × ", output)


def test_mlflow_has_one_run_per_trial_and_the_best_configuration(digits):
    import mlflow

    folder, _ = digits
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1 and len(children) == 3
    for run in children:
        assert run.info.status == "FINISHED"
        searched = {"micro_batch_size", "accumulation_steps", "effective_batch_size", "learning_rate"}
        assert searched <= set(run.data.params)
        assert {
            "effective_batch_size", "throughput_samples_per_second", "peak_memory_mib", "predicted_peak_memory_mib",
            "best_val_loss", "updates", "training_seconds", "loss", "val_loss",
        } <= set(run.data.metrics)  # fmt: skip
        assert run.data.tags["accumtune.status"] == "completed"
        assert len(client.get_metric_history(run.info.run_id, "val_loss")) == 2
    artifacts = {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)}
    assert {"best_config.json", "candidates.csv", "pareto.png", "memory.png"} <= artifacts
    assert "best_config.json" in parents[0].data.tags["mlflow.note.content"]
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    config = accumtune.load_config(f"runs:/{parents[0].info.run_id}/best_config.json", tracking_uri=uri)
    assert config.hyperparameters == accumtune.load_config(folder / "best_config.json").hyperparameters


def test_the_same_command_again_trains_nothing_and_doubles_nothing(digits):
    import mlflow

    folder, _ = digits
    before = {trial.trial_id: trial.ended_at for trial in read_search(folder / "mlruns/searches/digits").trials}
    assert "the model of trial" not in run_experiment(folder, *DIGITS), "nobody has edited it"
    after = {trial.trial_id: trial.ended_at for trial in read_search(folder / "mlruns/searches/digits").trials}
    assert before == after
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    assert len([run for run in runs if run.data.tags.get("accumtune.kind") != "production"]) == 4


def test_production_trains_with_the_result_and_leaves_a_plain_keras_model(digits):
    import mlflow

    folder, _ = digits
    output = run_experiment(folder, "production.py", "models:/digits@best", "--epochs", "2", "--warm-start")
    assert "a plain Keras model" in output and "peak memory" in output
    script = (
        WITHOUT_ACCUMTUNE + "import keras\n"
        # Without the loss, which is digits.py's own.
        "print(keras.models.load_model('production/digits.keras', compile=False).count_params())"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = forked.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`accumtune.kind` = 'production'")
    assert run.info.status == "FINISHED" and run.data.params["epochs"] == "2"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_loss")] == [0, 1]
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "model")] == ["model/digits.keras"]
    assert not (folder / "production" / "job").exists()


def test_the_registered_model_is_a_warm_start(digits, monkeypatch, tmp_path):
    """As on another machine: with the registry, without the search's folder."""
    import mlflow

    folder, _ = digits
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from digits import VALIDATION_BATCH_SIZE, build_model, load_data

    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    config = accumtune.load_config("models:/digits@best", tracking_uri=uri)
    elsewhere = replace(config, trial={**config.trial, "weights": None})
    farther = replace(elsewhere, source={**config.source, "tracking_uri": f"sqlite:///{folder}/gone.db"})
    monkeypatch.chdir(tmp_path)  # no mlruns/ here
    _, x_val, _, y_val = load_data()

    def loss_of(model):
        return model.evaluate(x_val, y_val, VALIDATION_BATCH_SIZE, verbose=0, return_dict=True)["loss"]

    expected = pytest.approx(config.objective["value"], abs=1e-5)
    assert config.source["tracking_uri"] == uri
    assert loss_of(elsewhere.load_weights(config.build(build_model), tracking_uri=uri)) == expected, "its own"
    with pytest.raises(ConfigError, match="tracking_uri"):  # of whoever wrote the file, unless the caller says so
        elsewhere.load_weights(config.build(build_model))
    assert loss_of(farther.load_weights(config.build(build_model), tracking_uri=uri)) == expected, "the store given"
    with pytest.raises(ConfigError, match="no registered model is known"):
        farther.load_weights(config.build(build_model))
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", uri)
    assert loss_of(farther.load_weights(config.build(build_model))) == expected, "the store that MLflow is set to"


def test_the_command_line_finds_the_search(digits, monkeypatch, capfd):
    folder, _ = digits
    monkeypatch.chdir(folder)
    for arguments, words in (
        (["best"], "Why:"),
        (["best", "--json"], '"effective_batch_size"'),
        (["candidates"], "micro × steps"),
        (["candidates", "--json"], '"is_on_pareto_front": true'),
        (["ui", "--print"], "viewStateShareKey"),
        (["ui", "--json"], '"address": "http'),
        (["sync"], "Everything is in MLflow"),
    ):
        assert cli.main(arguments) == 0, capfd.readouterr()
        assert words in capfd.readouterr().out
