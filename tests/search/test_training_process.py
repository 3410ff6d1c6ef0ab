"""The task of a trial's process, and how its report is judged."""

import math

import pytest

from accumtune.search.trial.training_process import TrainingProcesses
from accumtune.search.trial.trial_result import trained_result
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.tracking.journal import Journal
from accumtune.worker.transport.task_directory import SearchDirectory


def test_a_trial_promoted_from_one_that_was_reused_goes_on_from_the_weights_that_exist(tmp_path):
    files = SearchDirectory(tmp_path)
    for trial_id, source in (("1", "0"), ("2", "1")):
        Journal(files.trial(trial_id).journal_file).append("ended", status="reused", reused_from=source)
    processes = TrainingProcesses(TrialSettings(None, (4,), True, True, 1, 1, "val_loss", None), files, None)
    for promoted in ("0", "1", "2"):
        arguments = processes._arguments(1, {"values": {"tuner/trial_id": promoted}}, {}, 0, [])
        assert arguments["initial_weights"] == str(files.trial("0").weights_file.resolve())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_objective_without_a_number_is_a_failure(value):
    """Keras Tuner's Bayesian oracle takes infinity for zero: the best there is."""
    report = {"metrics": {"val_loss": value}, "best_epoch": 0, "peak_memory_bytes": 1}
    result = trained_result({}, 1, report, "val_loss", None)
    assert result.status == "failed" and result.reason.startswith("val_loss was ")
