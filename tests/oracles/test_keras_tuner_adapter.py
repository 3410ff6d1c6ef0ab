"""The information about a trial that an oracle gets."""

import math
import warnings

import keras_tuner
import pytest

from accumtune.oracles import keras_tuner_adapter as oracles

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


def test_a_promoted_trial_that_is_drawn_anew_begins_anew(oracle, trial):
    """Its weights are those of the values that it had; they would be loaded into another model."""
    trial.hyperparameters.Choice("a", [1, 2, 3])
    oracle.update_space(trial.hyperparameters)
    bracket = {"tuner/epochs": 9, "tuner/bracket": 1, "tuner/round": 1}
    trial.hyperparameters.values |= {**bracket, "tuner/initial_epoch": 3, "tuner/trial_id": "0"}
    values = oracles.replace_infeasible(oracle, trial)
    assert values.pop("a") in (1, 2, 3)
    assert values == {**bracket, "tuner/initial_epoch": 0}
    # A trial of the first round keeps all of its own.
    trial.hyperparameters.values = {**bracket, "tuner/initial_epoch": 0, "a": 1}
    assert oracles.redraw(oracle, trial).keys() == {*bracket, "tuner/initial_epoch", "a"}


def test_trials_that_did_not_train_make_room_once_whatever_the_number_of_sessions(oracle):
    for _ in range(3):
        oracles.take_back_grants(oracle)
        oracles.grant_another_trial(oracle)
        assert (oracle.max_trials, oracles.asked_trials(oracle)) == (3, 2)


def test_what_did_not_fit_may_be_proposed_again_with_more_memory(oracle, trial):
    trial.hyperparameters.Choice("a", [1])
    oracle.update_space(trial.hyperparameters)
    oracle._record_values(trial)
    oracles.end_without_counting(oracle, trial, "too large")
    assert oracles.has_nothing_new(oracle)
    oracles.allow_again(oracle, [trial.trial_id])
    assert oracle._random_values() == {"a": 1}
