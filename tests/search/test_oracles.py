"""What an oracle is told of a trial."""

import math
import warnings

import keras_tuner
import pytest

from accumtune.search import oracles

METRICS = {"val_loss": 0.5, "gradient_noise_scale": math.nan}


@pytest.fixture
def oracle(tmp_path):
    oracle = keras_tuner.oracles.RandomSearchOracle(keras_tuner.Objective("val_loss", "min"), max_trials=2)
    oracle._set_project_dir(tmp_path, "made")
    return oracle


@pytest.fixture
def trial(oracle):
    trial = oracle.create_trial("tuner0")
    trial.metrics.register("gradient_noise_scale", direction="min")
    return trial


def test_a_metric_that_was_only_nan_prints_no_warning(oracle, trial):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert oracles.end_completed(oracle, trial, METRICS, 0)
    assert oracle.trials[trial.trial_id].score == 0.5


def test_keras_tuner_itself_would_warn(oracle, trial):
    oracle.update_trial(trial.trial_id, METRICS)
    trial.status = "COMPLETED"
    with pytest.warns(RuntimeWarning, match="All-NaN"):
        oracle.end_trial(trial)
        oracle.trials[trial.trial_id].metrics.get_best_value("gradient_noise_scale")


def test_an_objective_that_is_nan_is_told(oracle, trial):
    assert not oracles.end_completed(oracle, trial, {"val_loss": math.nan}, 0)
