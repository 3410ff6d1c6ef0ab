"""The parts of `fit` that a configuration records, and those that it reports as not recorded."""

import json

import keras
import keras_tuner
import numpy as np
import pytest

from accumtune.search.results.training_dependencies import count_samples, dependencies_of_trial, describe_fit
from accumtune.tracking.records import TrialRecord

NOTHING = {"optimizer": None, "loss": None, "metrics": None}


def test_what_is_usual_is_not_written_down():
    given = {"validation_data": (1, 2), "epochs": 3, "shuffle": True, "callbacks": [], "class_weight": None, "x": 1}
    assert describe_fit(given, lambda hp: None, NOTHING) == {"options": {}, "not_carried": []}


def test_what_changes_the_result_is():
    given = {"shuffle": False, "class_weight": {0: np.float32(1), 1: 2}, "validation_split": 0.2, "steps_per_epoch": 5}
    options = describe_fit(given, lambda hp: None, NOTHING)["options"]
    assert options == {
        "shuffle": False, "class_weight": {"0": 1.0, "1": 2.0}, "validation_split": 0.2, "steps_per_epoch": 5
    }  # fmt: skip
    json.dumps(options)


def test_the_size_of_validation_batches_is_where_it_was_given_or_a_test_step_depends_on_it():
    def options(*given):
        return describe_fit(given[0], lambda hp: None, NOTHING, *given[1:])["options"]

    assert options({}, 4) == {"validation_batch_size": 4}
    assert options({"validation_batch_size": 6}, 4) == options({"validation_batch_size": 6}) == {
        "validation_batch_size": 6
    }  # fmt: skip


def test_what_cannot_be_carried_is_named():
    class Own(keras_tuner.HyperModel):
        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, **kwargs)

    given = {"callbacks": [keras.callbacks.EarlyStopping()], "sample_weight": np.ones(3)}
    assert describe_fit(given, Own(), NOTHING | {"loss": "mse"})["not_carried"] == [
        "search() was given callbacks: EarlyStopping",
        "search() was given sample_weight",
        "Own.fit, which may do more than model.fit",
        "the tuner compiled the models with its own loss",
    ]


def test_a_trial_that_went_on_from_another_says_so(tmp_path):
    task = {"seed": 3, "executions": 2, "initial_weights": "/somewhere/trial_0007/checkpoint.weights.h5",
            "fit_overrides": {"epochs": 6, "initial_epoch": 2}}  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps({"task": "train", "arguments": task}))
    record = TrialRecord(tmp_path, "0008", hyperparameters={"micro_batch_size": 4}, peak_memory_bytes=9.7, best_epoch=5)
    assert dependencies_of_trial(record, ["callbacks"]) == {
        "seed": 3,
        "trial": {
            "micro_batch_size": 4, "peak_memory_bytes": 9, "executions": 2, "best_epoch": 5, "weights": None,
            "not_carried": ["callbacks", "the trial started at epoch 2 with the weights of trial 0007"],
        },
    }  # fmt: skip
    (tmp_path / "task.json").unlink()
    assert dependencies_of_trial(record, [])["seed"] is None, "an older search"


@pytest.mark.parametrize(
    "x, samples",
    [
        (np.zeros((5, 2)), 5),
        ({"a": np.zeros((5, 2)), "b": np.zeros(5)}, 5),
        ((np.zeros((5, 2)), {"b": np.zeros(5)}), 5),
        (lambda: 1, None),
        (None, None),
    ],
    ids=["array", "dict", "tuple", "function", "none"],
)
def test_samples_are_counted_where_they_can_be(x, samples):
    assert count_samples((x, None), {}) == samples
    assert count_samples((x, None), {"validation_split": 0.2}) is None
