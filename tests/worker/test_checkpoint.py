"""A training that is interrupted and resumed in another process is the same training."""

import os
import time
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from small_training import EPOCHS, X, Y, build

from accumtune.execution.repeated_training import run_executions
from accumtune.hypermodel import AccumulationHyperModel
from accumtune.tracking.journal import Journal, read_trial
from accumtune.worker.checkpoint.state_file import read_state, write_state
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory


class InTwoPhases(keras_tuner.HyperModel):
    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        kwargs["epochs"] = 3
        model.fit(*args, **kwargs)
        model.layers[0].trainable = False
        model.compile(keras.optimizers.Adam(0.01), loss=model.loss)
        kwargs |= {"initial_epoch": 3, "epochs": EPOCHS}
        return model.fit(*args, **kwargs)


class Interruption(keras.callbacks.Callback):
    """What happens to the trial, once."""

    def __init__(self, folder, how, epoch):
        super().__init__()
        self.folder, self.how, self.epoch = str(folder), how, epoch

    def on_epoch_begin(self, epoch, logs=None):
        marker = Path(self.folder) / "interrupted"
        if marker.exists():
            return
        if self.how == "kill" and epoch == self.epoch - 1:
            time.sleep(2.1)  # an epoch that is long enough to be saved
        if epoch == self.epoch:
            marker.touch()
            if self.how == "kill":
                os.kill(os.getpid(), 9)
            (Path(self.folder) / "stop").touch()


def callbacks(*more):
    # Nothing is improvement enough: the rate is halved after epochs 3 and 6.
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=3, min_delta=10.0)
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=5, restore_best_weights=True)
    return [plateau, stopping, *more]


def trainer(executor, folder):
    def train(
        name, *, interruption=None, hypermodel=build, executions=1, attempt=1, x=X, timeout=120, pause_after=None
    ):
        directory = TaskDirectory(folder / name)
        payload = folder / f"data_{name}" / "payload.pkl"
        how = [] if interruption is None else [Interruption(directory.path, *interruption)]
        data = (x,) if callable(x) else (x, Y)
        content = {
            "hypermodel": AccumulationHyperModel(hypermodel),
            "objective": keras_tuner.Objective("val_loss", "min"),
            "fit_args": data,
            "fit_kwargs": {"epochs": EPOCHS, "validation_data": (X, Y), "callbacks": callbacks(*how)},
        }
        dump_payload(content, payload)
        values = {"effective_batch_size": 8, "micro_batch_size": 4, "accumulation_steps": 2}
        arguments = {
            "payload": str(payload), "hyperparameters": {"space": [], "values": values}, "memory_budget_bytes": None,
            "seed": 5, "attempt": attempt, "executions": executions, "pause_after": pause_after,
        }  # fmt: skip

        def run(execution, earlier):
            directory.write_task("train", {**arguments, "execution": execution, "earlier": earlier})
            return executor.submit(directory).result(timeout=timeout)

        return directory, run_executions(run, executions)

    return train


@pytest.fixture
def train(executor, tmp_path):
    return trainer(executor, tmp_path)


@pytest.fixture(scope="module")
def whole(executor, tmp_path_factory):
    """A training that nothing interrupts: its directory and its outcome."""
    directory, outcome = trainer(executor, tmp_path_factory.mktemp("whole"))("whole")
    assert outcome.is_completed, outcome.traceback
    return directory, outcome


def curves(directory):
    return [(epoch.execution, epoch.epoch, dict(epoch.logs)) for epoch in read_trial(directory.path).epochs]


def assert_same(directory, whole, rel=1e-6):
    now, expected = curves(directory), curves(whole)
    assert [position[:2] for position in now] == [position[:2] for position in expected]
    for (*_, logs), (*_, wanted) in zip(now, expected, strict=True):
        assert logs == pytest.approx(wanted, rel=rel, nan_ok=True)  # a noise scale that cannot be told


@pytest.mark.parametrize("how, status", [("kill", "killed"), ("stop", "stopped")])
def test_it_comes_to_the_same_end_as_without_an_interruption(train, whole, how, status):
    whole, expected = whole
    directory, first = train("trial", interruption=(how, 4))
    assert first.status == status
    assert directory.checkpoint_file.exists()
    directory, outcome = train("trial", interruption=(how, 4), attempt=2)
    assert outcome.is_completed, outcome.traceback
    assert_same(directory, whole)
    assert outcome.result["metrics"] == pytest.approx(expected.result["metrics"], rel=1e-6, nan_ok=True)
    assert outcome.result["best_epoch"] == expected.result["best_epoch"]
    assert outcome.result["updates"] == expected.result["updates"]
    events = Journal(directory.journal_file).events()
    (continued,) = [event for event in events if event["event"] == "continued"]
    assert continued["epoch"] == 4 if how == "stop" else continued["epoch"] <= 3
    # The epochs before are in the journal as this attempt's, with the time at which they were trained.
    epochs = [event for event in events if event["event"] == "epoch" and event["epoch"] == 0]
    assert [event["attempt"] for event in epochs] == [1, 2] and epochs[0]["time"] == epochs[1]["time"]


def write(directory, state):
    with open(directory.checkpoint_file, "wb") as file:
        write_state(file, state)


@pytest.mark.parametrize("part", ["optimizer", "callbacks", "seeds"])
def test_without_any_part_of_the_state_it_would_be_another_training(train, whole, part):
    """Negative control: weights alone, as `BackupAndRestore` keeps them, are not enough."""
    directory, _ = train("trial", interruption=("stop", 4))
    state = read_state(directory.checkpoint_file)
    if part == "callbacks":
        state["callbacks"] = [{} for _ in state["callbacks"]]
    else:
        variables = state["variables"]
        seeds = [index for index, value in enumerate(variables) if value.dtype == np.int64 or value.dtype == np.uint32]
        if part == "seeds":
            assert seeds
        for index in seeds if part == "seeds" else range(len(variables) - 8, len(variables)):
            variables[index] = np.zeros_like(variables[index])
    write(directory, state)
    directory, outcome = train("trial", interruption=("stop", 4), attempt=2)
    assert outcome.is_completed, outcome.traceback
    with pytest.raises(AssertionError):
        assert_same(directory, whole[0])


def test_what_had_ended_before_is_not_run_again(train):
    whole, expected = train("whole", hypermodel=InTwoPhases(), executions=2)
    assert expected.is_completed, expected.traceback
    directory, first = train("trial", hypermodel=InTwoPhases(), executions=2, interruption=("stop", 5))
    assert first.status == "stopped"
    directory, outcome = train("trial", hypermodel=InTwoPhases(), executions=2, interruption=("stop", 5), attempt=2)
    assert outcome.is_completed, outcome.traceback
    assert_same(directory, whole)
    assert outcome.result["metrics"] == pytest.approx(expected.result["metrics"], rel=1e-6, nan_ok=True)


def shuffled():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, seed=3).batch(8)


def uncounted():
    return shuffled().unbatch().filter(lambda x, y: True).batch(8)


def drawn():
    import tensorflow as tf

    def samples():
        for row in np.random.permutation(len(X)):
            yield X[row], Y[row]

    signature = (tf.TensorSpec((6,)), tf.TensorSpec((1,)))
    return tf.data.Dataset.from_generator(samples, output_signature=signature).batch(8)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a tf.data pipeline")
@pytest.mark.parametrize(
    "pipeline", [drawn, *(pytest.param(other, marks=pytest.mark.slow) for other in (shuffled, uncounted))]
)
def test_a_shuffled_pipeline_goes_on_with_its_next_order(pipeline, train):
    whole, _ = train("whole", x=pipeline)
    train("trial", x=pipeline, interruption=("stop", 4))
    directory, outcome = train("trial", x=pipeline, interruption=("stop", 4), attempt=2)
    assert outcome.is_completed, outcome.traceback
    assert_same(directory, whole)


def test_a_fit_that_trains_on_after_a_pause_is_refused(train):
    """Its next phase would begin with a model that has not ended the one before."""
    _, outcome = train("phases", hypermodel=InTwoPhases(), pause_after=2)
    assert outcome.status == "failed" and "trains several times" in outcome.reason
    _, outcome = train("whole", hypermodel=InTwoPhases(), pause_after=4)  # the first phase ends before
    assert outcome.is_completed and outcome.result["paused_after_epochs"] == 4


@pytest.mark.parametrize("change", ["seed", "shape", "torn"])
def test_a_state_that_is_not_this_training_s_is_not_used(train, whole, change):
    directory, _ = train("trial", interruption=("stop", 4))
    state = read_state(directory.checkpoint_file)
    if change == "seed":
        state["key"] = "another"
    if change == "shape":
        state["variables"][0] = np.zeros((1, 2, 3))
    write(directory, state)
    if change == "torn":
        content = directory.checkpoint_file.read_bytes()
        directory.checkpoint_file.write_bytes(content[: len(content) // 2])
    directory, outcome = train("trial", attempt=2)
    assert outcome.is_completed, outcome.traceback
    assert outcome.result["updates"] == 5 * len(curves(directory))
    assert curves(directory)[-1][2]["val_loss"] == pytest.approx(curves(whole[0])[-1][2]["val_loss"], rel=1e-6)


def test_a_process_that_was_given_up_writes_nothing_more(train, executor, tmp_path):
    """A machine that seemed to have failed continues while the trial runs on another one."""

    class Replaced(keras.callbacks.Callback):
        def __init__(self, path):
            super().__init__()
            self.path = str(path)

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                task = TaskDirectory(Path(self.path))
                task.write_task(*task.read_task())

    directory = TaskDirectory(tmp_path / "trial")
    train_whole, _ = train("trial")
    payload = tmp_path / "data_trial" / "payload.pkl"
    content = {
        "hypermodel": AccumulationHyperModel(build), "objective": keras_tuner.Objective("val_loss", "min"),
        "fit_args": (X, Y),
        "fit_kwargs": {"epochs": EPOCHS, "validation_data": (X, Y), "callbacks": [Replaced(directory.path)]},
    }  # fmt: skip
    dump_payload(content, payload)
    directory.write_task(*directory.read_task())
    outcome = executor.submit(directory).result(timeout=120)
    assert outcome.status == "failed" and not directory.outcome_file.exists()
