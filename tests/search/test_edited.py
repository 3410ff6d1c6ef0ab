"""Whether a resumed search says that its model was edited; tests/search/test_semantics.py edits a real one."""

from pathlib import Path

import pytest

from accumtune.errors import BuildError
from accumtune.search.edited import edited_model_warning
from accumtune.tracking.records import TrialRecord
from accumtune.trials.profiling import ModelFacts


def trial(trial_id, signature, ended_at, status="completed"):
    values = {"width": 8, "micro_batch_size": 4}
    return TrialRecord(
        Path(trial_id), trial_id, status=status, signature=signature, ended_at=ended_at, hyperparameters=values
    )


def facts(signature):
    return ModelFacts(signature, "CPU:0", 0, 0, (), "float32", None)


def warning(trials, inspect):
    return edited_model_warning(trials, lambda trial_id: {"space": [trial_id], "values": {}}, inspect)


def test_the_newest_trained_trial_is_built_again_with_its_own_hyperparameters():
    asked = []
    trials = [trial("0", "old", 1.0), trial("2", "failed", 3.0, "failed"), trial("1", "new", 2.0)]
    assert warning(trials, lambda space: asked.append(space) or facts("new")) is None
    assert asked == [{"space": ["1"], "values": {"width": 8, "micro_batch_size": 4}}]


def test_another_signature_is_an_edited_model():
    assert "trial 0" in warning([trial("0", "before", 1.0)], lambda space: facts("after"))


def test_nothing_is_built_where_nothing_was_trained():
    assert warning([trial("0", None, None, "running")], lambda space: pytest.fail("it was built")) is None


def test_a_model_that_no_longer_builds_is_left_to_the_next_trial():
    def fails(space):
        raise BuildError("Received a mistake.", "a model", "mend it")

    assert warning([trial("0", "before", 1.0)], fails) is None
