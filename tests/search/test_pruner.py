"""Pruners, Optuna's and our own: which trials they stop."""

import keras_tuner
import optuna
import pytest

import accumtune
from accumtune.search.pruning.pruner import PruningMonitor


def test_a_pruner_stops_what_is_worse_than_the_others_and_ignores_pruned_ones():
    objective = keras_tuner.Objective("val_loss", "min")
    pruning = PruningMonitor(optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1), objective)
    for name, start in [("0", 1.0), ("1", 1.2)]:
        assert not any(pruning.is_hopeless(name, epoch, {"val_loss": start - epoch / 10}) for epoch in range(5))
        pruning.end(name, "completed")
    assert not pruning.is_hopeless("2", 0, {"val_loss": 9.0})  # warming up
    assert pruning.is_hopeless("2", 1, {"val_loss": 9.0})
    pruning.end("2", "pruned")
    assert not pruning.is_hopeless("3", 1, {"val_loss": 0.9})
    # Beside 0.9 and 1.1 a 1.05 is bad; beside the 9.0 that was pruned, too, it would not be.
    assert pruning.is_hopeless("4", 1, {"val_loss": 1.05})
    assert not pruning.is_hopeless("5", 2, {"loss": 1.5})  # nothing to compare


LOSS = keras_tuner.Objective("val_loss", "min")


def report(pruning, trial_id, curve):
    """Epochs until the trial is stopped or has ended; whether it was stopped."""
    for epoch, loss in enumerate(curve):
        if pruning.is_hopeless(trial_id, epoch, {"val_loss": loss}) and epoch + 1 < len(curve):
            pruning.end(trial_id, "pruned")
            return epoch + 1, True
    pruning.end(trial_id, "completed")
    return len(curve), False


def test_a_forecast_stops_what_can_no_longer_win_and_lets_late_starters_go_on():
    pruning = PruningMonitor("forecast", LOSS)
    assert report(pruning, "0", [2.0, 1.5, 1.25, 1.1, 1.0]) == (5, False)  # nothing to compare it with
    epochs, is_stopped = report(pruning, "1", [6.0, 4.5, 3.8, 3.3, 3.0])
    assert is_stopped and epochs < 4 and pruning.forecast("1") == pytest.approx(3.0, rel=0.2)
    assert report(pruning, "2", [4.0, 2.4, 1.6, 1.1, 0.9]) == (5, False)
    assert pruning.forecast("2") is None
    # The median of those that ended would have stopped it at once.
    median = PruningMonitor(optuna.pruners.MedianPruner(n_startup_trials=1), LOSS)
    report(median, "0", [2.0, 1.5, 1.25, 1.1, 1.0])
    assert report(median, "2", [4.0, 2.4, 1.6, 1.1, 0.9]) == (1, True)
    assert median.forecast("2") < 4.0


def test_epochs_that_are_reported_once_more_count_once():
    once, twice = PruningMonitor("forecast", LOSS), PruningMonitor("forecast", LOSS)
    for pruning, times in [(once, 1), (twice, 2)]:
        report(pruning, "0", [2.0, 1.5, 1.2, 1.0])
        for epoch, loss in enumerate([9.0, 8.0]):
            for _ in range(times):  # a trial that was started anew
                pruning.is_hopeless("1", epoch, {"val_loss": loss})
        pruning.end("1", "pruned")
    assert twice.forecast("1") == once.forecast("1")


def test_a_pruner_that_is_none_of_optunas_is_refused(tmp_path):
    with pytest.raises(accumtune.errors.SearchError, match="pruner='median'"):
        accumtune.OptunaSearch(lambda hp: None, objective="val_loss", pruner="median", directory=tmp_path)
