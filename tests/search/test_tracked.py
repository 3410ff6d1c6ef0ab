"""A real search with tracking: what it writes to MLflow, and the user's MLflow state that it does not change."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout

import forked
import mlflow
import mlflow.sklearn
import numpy as np
import pytest
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from models import build_plain, data
from running import WITHOUT_ACCUMTUNE

import accumtune
from accumtune.errors import SearchDirectoryError

X, Y = data()
SECRET = "hunter2-in-plain-sight"


def make(folder, **kwargs):
    defaults = {
        "objective": "val_loss", "max_trials": 2, "seed": 1, "memory_budget": "16MiB", "micro_batch_sizes": (4, 8),
        "accumulation_steps": (1, 2), "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", "directory": folder,
        "project_name": "tracked",
    }  # fmt: skip
    return accumtune.RandomSearch(build_plain, **{**defaults, **kwargs})


def users_mlflow():
    """What is global in MLflow."""
    autologging = {name: dict(config) for name, config in AUTOLOGGING_INTEGRATIONS.items() if config}
    assert autologging["sklearn"]["log_models"] is False
    run = mlflow.active_run().info.run_id
    return run, mlflow.get_tracking_uri(), mlflow.get_registry_uri(), os.environ["MLFLOW_TRACKING_URI"], autologging


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A search beside a user's own MLflow run; gives the folder, what was printed, and MLflow's state around it."""
    folder = tmp_path_factory.mktemp("tracked")
    own = f"sqlite:///{folder / 'own.db'}"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # What a user's own calls set in MLflow, here and in the environment, is unset for the tests that follow.
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
        patch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
        patch.setenv("A_PASSWORD", SECRET)
        mlflow.set_tracking_uri(own)
        mlflow.set_experiment("mine")
        with mlflow.start_run() as run, redirect_stdout(printed):
            mlflow.log_metric("mine", 1.0)
            mlflow.sklearn.autolog(disable=True, log_models=False)
            state = users_mlflow()
            make(folder, register_as="small").search(X, Y, validation_data=(X, Y), epochs=2, verbose=2)
            after = users_mlflow()
        own_runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return folder, printed.getvalue(), (state, after, run.info.run_id, own_runs)


def client_of(folder):
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return mlflow.MlflowClient(uri, uri)


def runs_of(folder):
    client = client_of(folder)
    return client.search_runs([client.get_experiment_by_name("tracked").experiment_id])


def test_the_users_own_mlflow_is_as_it_was(tracked):
    _, _, (before, after, run_id, own_runs) = tracked
    assert before == after and before[0] == run_id
    assert [run.info.run_id for run in own_runs] == [run_id]
    assert own_runs[0].data.metrics == {"mine": 1.0} and own_runs[0].info.status == "FINISHED"


def test_the_end_of_a_search_prints_where_to_browse_it(tracked):
    _, printed, _ = tracked
    assert re.search(r"Browse it: .*mlflow ui --backend.*\n  then open http://127.0.0.1:5000/#/experiments/", printed)


def test_each_run_has_the_data_with_name_shapes_and_digest(tracked):
    folder, _, _ = tracked
    for run in runs_of(folder):
        (given,) = run.inputs.dataset_inputs
        assert given.dataset.name == "tracked" and json.loads(given.dataset.profile)["shapes"]["x"] == [64, 16]
        assert len(given.dataset.digest) == 16 and not given.dataset.digest.startswith("shapes")


def test_the_best_model_is_registered_with_signature_alias_and_configuration(tracked):
    folder, _, _ = tracked
    client = client_of(folder)
    version = client.get_model_version_by_alias("small", "best")
    assert version.tags["accumtune.config"].endswith("/best_config.json"), "beside the model"
    local = mlflow.artifacts.download_artifacts(version.source, tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(local)
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 16)
    best = make(folder).get_best_models()[0]
    assert np.allclose(model.predict(X[:4]), best.predict(X[:4], verbose=0), atol=1e-6)
    path = client.download_artifacts(version.run_id, version.tags["accumtune.config"], str(folder))
    assert accumtune.load_config(path).effective_batch_size
    script = WITHOUT_ACCUMTUNE + "import mlflow.keras; mlflow.keras.load_model(sys.argv[1])"
    forked.run([sys.executable, "-c", script, local], check=True)


def test_no_secret_of_the_environment_is_written_down(tracked):
    folder, _, _ = tracked
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs root: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_what_has_completed_stays(small_disk):
    tuner = make(small_disk, tracking_uri=False, max_trials=1)
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)
    with pytest.raises(SearchDirectoryError, match="No space left.*\n.*\nFix: free some space"):
        make(small_disk, tracking_uri=False, max_trials=2).search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    filler.unlink()
    tuner = make(small_disk, tracking_uri=False, max_trials=2)
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    assert len(tuner.record().with_status("completed")) == 2


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_runs(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SearchDirectoryError, match="Read-only.*\n.*\nFix: correct its permissions"):
        make(small_disk, tracking_uri=False)


def test_the_gradient_noise_scale_is_a_curve_of_every_trial_that_accumulates(tracked):
    folder, _, _ = tracked
    client = client_of(folder)
    trials = [run for run in runs_of(folder) if "accumulation_steps" in run.data.params]
    assert trials
    for run in trials:
        curve = client.get_metric_history(run.info.run_id, "gradient_noise_scale")
        assert len(curve) == (2 if int(run.data.params["accumulation_steps"]) > 1 else 0)
