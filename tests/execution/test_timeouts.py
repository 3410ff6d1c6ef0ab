"""A build function that never returns is ended after a time limit, wherever it is called."""

import keras
import keras_tuner
import pytest

from accumtune import errors
from accumtune.execution.timeouts import DEFAULT_SECONDS, preparation_seconds
from accumtune.search import processes
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.task_directory import SearchDirectory


def build(hp):
    import time

    time.sleep(3600 if hp.Boolean("sleeps", default=True) else 0)


@pytest.fixture
def searched(tmp_path):
    searched = processes.SearchProcesses(
        SearchDirectory(tmp_path / "search"), None, keras.backend.backend(), memory_budget_bytes=None,
        micro_batch_sizes=(8,), timeout_seconds=1.0,
    )  # fmt: skip
    yield searched
    searched.close()


def test_discovering_inspecting_and_probing_end(searched):
    hypermodel = ModelBuilder(build)
    with pytest.raises(errors.BuildError, match="did not finish in time.*1 s.*\n(.*\n)*.*raise trial_timeout_seconds"):
        searched.discover(hypermodel, keras_tuner.HyperParameters())
    space = {"space": [], "values": {"sleeps": True}}
    with searched.sharing({"hypermodel": hypermodel, "fit_args": (), "fit_kwargs": {}}):
        with pytest.raises(errors.BuildError, match="build function did not finish in time"):
            searched.profiler().inspect(space)
        with pytest.raises(errors.BuildError, match="few updates did not finish in time"):
            searched.profiler().measure(space, "signature", 8, 1)


def test_what_a_user_sets_for_trials_holds_for_what_precedes_them():
    assert preparation_seconds(None) == DEFAULT_SECONDS
    assert preparation_seconds(600.0) == 600.0
    assert preparation_seconds(2.0) == 60.0
