"""The direction of an objective is found without using the device, which trials need."""

import json
import sys

import forked
import keras_tuner
import pytest
from keras_tuner.src.engine.objective import create_objective

from accumtune.oracles.metric_direction import described, metric_direction, objective_from, with_direction

NAMES = [
    "loss", "val_loss", "acc", "val_accuracy", "weighted_accuracy", "auc", "AUC", "precision", "recall", "mae", "mse",
    "mean_absolute_error", "MeanSquaredError", "kl_divergence", "top_k_categorical_accuracy", "crossentropy", "mine",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_directions_are_keras_tuners(name):
    assert metric_direction(name) == keras_tuner.engine.metrics_tracking.infer_metric_direction(name)


def test_objectives_of_the_user_stay_as_they_are():
    mine = keras_tuner.Objective("f1", "max")
    assert with_direction(mine) is mine and with_direction("mine") == "mine" and with_direction(None) is None
    assert with_direction(["val_auc", mine]) == [keras_tuner.Objective("val_auc", "max"), mine]


def test_an_objective_of_several_metrics_comes_back_from_its_description():
    several = create_objective([keras_tuner.Objective("val_loss", "min"), keras_tuner.Objective("val_auc", "max")])
    description = json.loads(json.dumps(described(several)))
    assert description["terms"] == {"val_loss": "min", "val_auc": "max"}
    assert objective_from(description).get_value({"val_loss": 3.0, "val_auc": 1.0, "loss": 9.0}) == 2.0
    one = keras_tuner.Objective("val_auc", "max")
    assert objective_from({**described(one), "value": 0.5}) == one and "terms" not in described(one)


SCRIPT = """
import sys, keras_tuner
from keras_tuner.engine.trial import Trial
from tensorflow.python.eager import context
from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.oracles.metric_direction import with_direction

objective = "val_accuracy" if sys.argv[1] == "theirs" else with_direction("val_accuracy")
oracle = keras_tuner.oracles.RandomSearchOracle(objective=objective, max_trials=2)
oracle._set_project_dir(sys.argv[2], "made")
trial = oracle.create_trial("tuner0")
metrics = {"val_accuracy": 0.5, "accuracy": 0.6, "auc": 0.7, "loss": 1.0, "mine": 2.0}
assert oracles.end_completed(oracle, trial, metrics, 0)
assert oracle.trials[trial.trial_id].metrics.get_best_value("auc") == 0.7
print("TAKEN" if context.context()._context_handle is not None else "FREE")
"""


@pytest.mark.parametrize("whose, expected", [("ours", "FREE"), ("theirs", "TAKEN")])
def test_the_search_process_does_not_take_the_device(whose, expected, tmp_path):
    command = [sys.executable, "-c", SCRIPT, whose, str(tmp_path)]
    done = forked.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == expected
