"""The production job, killed and started again, reaches the same weights as one that was not killed."""

import json
import os
import signal
import sys
import time

import forked
import numpy as np
import pytest
from running import EXPERIMENTS

# Dropout, shuffling, a schedule, Adam and EMA: all that a training has in memory besides its weights.
MODULE = """
import keras, numpy as np

def build_model(hp):
    rate = keras.optimizers.schedules.ExponentialDecay(hp.Float("learning_rate", 1e-3, 1e-1), 10, 0.9)
    model = keras.Sequential([
        keras.Input((16,)),
        keras.layers.GaussianNoise(0.1),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1),
    ])
    model.compile(keras.optimizers.Adam(rate, use_ema=True), "mse")
    return model

def load_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 16)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    return x[:700], x[700:], y[:700], y[700:]
"""
EPOCHS = 12
SCRIPT = EXPERIMENTS / "production.py"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    (folder / "noisy.py").write_text(MODULE)
    values = {"micro_batch_size": 16, "accumulation_steps": 4, "effective_batch_size": 64}
    content = {"schema_version": 1, **values, "hyperparameters": {"learning_rate": 0.01}, "seed": 5}
    content["source"] = {"experiment": "noisy"}
    (folder / "best_config.json").write_text(json.dumps(content))
    return folder


def start(folder, name, script):
    command = [
        sys.executable, str(script), "best_config.json", "--no-verify", "--module", "noisy", "--epochs", str(EPOCHS),
        "--job", f"{name}/job", "--model", f"{name}/model.keras", "--tracking-uri", "sqlite:///mlflow.db",
    ]  # fmt: skip
    log = open(folder / f"{name}.log", "a")
    return forked.Popen(command, cwd=folder, stdout=log, stderr=log)


def finish(folder, name, script=SCRIPT):
    assert start(folder, name, script).wait(timeout=300) == 0, (folder / f"{name}.log").read_text()
    return weights_of(folder / name / "model.keras")


def weights_of(path):
    import keras

    model = keras.models.load_model(path)
    return [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]


def kill_after(folder, name, epoch, script=SCRIPT):
    """Sends SIGKILL after this number of epochs is backed up, at a random moment of the next epoch."""
    process = start(folder, name, script)
    deadline = time.monotonic() + 200
    while max((int(path.name[6:]) for path in (folder / name / "job").glob("epoch-*")), default=0) < epoch:
        assert process.poll() is None and time.monotonic() < deadline, (folder / f"{name}.log").read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed, not finished"


@pytest.mark.slow
def test_killed_and_resumed_is_as_if_nothing_had_happened(job):
    import mlflow

    alone = finish(job, "alone")
    kill_after(job, "killed", 4)
    state = job / "killed" / "job"
    run_id = (state / "run_id").read_text()
    # What a kill in the middle of a backup leaves besides; Keras's own callback would end with an error.
    (state / "writing").mkdir(exist_ok=True)
    (state / "writing" / "latest.weights.h5").write_bytes(b"half")
    (state / "writing" / "training_metadata.json").write_text("")
    assert_equal(finish(job, "killed"), alone)
    assert "Resuming the job that was started before" in (job / "killed.log").read_text() and not state.exists()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{job}/mlflow.db")
    assert client.get_run(run_id).info.status == "FINISHED", "one run, of two processes"
    steps = [point.step for point in client.get_metric_history(run_id, "val_loss")]
    assert sorted(set(steps)) == list(range(EPOCHS))


@pytest.mark.slow
def test_without_seeds_for_each_epoch_it_would_be_another_training(job):
    """Negative control: the order of samples and dropout depend on the process's random state."""
    script = job / "careless.py"
    text = SCRIPT.read_text()
    assert "SeedByEpoch(data, seed), " in text
    script.write_text(text.replace("SeedByEpoch(data, seed), ", ""))
    alone = finish(job, "careless_alone", script)
    kill_after(job, "careless", 3, script)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(finish(job, "careless", script), alone)


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
