"""A task's process sets up its memory before the user's objects are unpickled, and measures these too."""

import os

import keras
import keras_tuner
import numpy as np
import pytest

from accumtune.hypermodel import AccumulationHyperModel
from accumtune.memory.device import memory_limit_environment
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]
VALUES = {"effective_batch_size": 16, "micro_batch_size": 8, "accumulation_steps": 2}
LARGE_MIB = 24


class Weighted(keras.Loss):
    """Holds a tensor that is larger than all of the training."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1) * self.weights[0]


class Mean(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.mean = keras.metrics.Mean()

    def on_train_batch_end(self, batch, logs=None):
        self.mean.update_state(logs["loss"])


def script(large_mib):
    """A build function as in a script that has made everything at its top."""
    normalization = keras.layers.Normalization()
    normalization.adapt(np.array([[1.0, 2.0], [3.0, 4.0]]))
    metrics = [keras.metrics.MeanAbsoluteError(name="off")]
    loss = Weighted(keras.ops.ones((large_mib * 2**18,), "float32"))

    def build(hp):
        model = keras.Sequential([keras.Input((2,)), normalization, keras.layers.Dense(1)])
        model.compile("sgd", loss, metrics=metrics)
        return model

    return build


@pytest.fixture
def run(executor, tmp_path):
    def run(task, build, *data, budget=None, **arguments):
        payload, directory = tmp_path / "data" / "payload.pkl", TaskDirectory(tmp_path / task)
        content = {
            "hypermodel": AccumulationHyperModel(build), "objective": keras_tuner.Objective("val_off", "min"),
            "fit_args": data, "fit_kwargs": {"epochs": 1, "validation_data": data, "callbacks": [Mean()]},
        }  # fmt: skip
        dump_payload(content, payload)
        common = {"payload": str(payload), "hyperparameters": {"space": [], "values": VALUES}}
        directory.write_task(task, {**common, **arguments})
        environment = memory_limit_environment(BACKEND, budget)
        outcome = executor.submit(directory, environment, is_memory_limited=budget is not None).result(timeout=240)
        assert outcome.is_completed, outcome.traceback
        return outcome.result

    return run


def tensors():
    x = np.random.default_rng(0).normal(size=(32, 2)).astype("float32")
    return keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(x[:, :1])


def test_tensors_of_a_script_are_sent_and_are_in_a_trial_s_memory(run):
    data = tensors()
    budget = 64 * MIB if BACKEND == "tensorflow" else None
    limits = {"memory_budget_bytes": budget, "budget": budget}
    found = run("train", script(LARGE_MIB), *data, seed=1, attempt=1, **limits)
    assert found["metrics"]["val_off"] > 0
    if BACKEND != "torch":  # where a process's resident memory stands in for what it holds
        without = run("train", script(1), *data, seed=1, attempt=1, **limits)
        more = found["peak_memory_bytes"] - without["peak_memory_bytes"]
        assert more == pytest.approx((LARGE_MIB - 1) * MIB, rel=0.05)
    probed = run("probe", script(LARGE_MIB), *data, micro_batch_size=8, accumulation_steps=[2], **limits)
    assert probed["measurements"][0]["peak_memory_bytes"] > LARGE_MIB * MIB
    assert run("inspect", script(1), *data)["sample_shapes"][0] == [[2], "float32"]
