"""The states of a trial: the outcome of its process decides whether it is repeated, and with which pair."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from accumtune.errors import SearchError
from accumtune.execution.profiling import ModelFacts
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.search.trial import trial_runner
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.tracking.journal import Journal, read_trial
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import SearchDirectory

REPORT = {
    "metrics": {"val_loss": 0.5}, "best_epoch": 1, "peak_memory_bytes": 4000, "memory_source": "made", "device": "CPU",
    "seconds_per_update": 0.01, "throughput_samples_per_second": 100.0, "updates": 2, "training_seconds": 0.1,
    "precision_policy": "float32",
}  # fmt: skip
COMPLETED = Outcome("completed", REPORT)
OUT_OF_MEMORY = Outcome("out_of_memory", reason="too little")
LOST = Outcome("lost", reason="its worker was gone")


class Profiles:
    """A profile that says that everything fits, and notes what it learns."""

    def __init__(self):
        self.learned = []

    def inspect(self, space):
        return ModelFacts("s", "CPU", 0, 0, (), "float32", None, parameters=100)

    def profile(self, space):
        seconds = {4: 0.06, 8: 0.08}
        sizes = [(size, steps) for size in seconds for steps in (1, 2)]
        points = [Measurement(size, steps, 1000 * size, steps * seconds[size], "made") for size, steps in sizes]
        return Profile(tuple(points), "CPU", "made", signature="s")

    def learn(self, signature, measurement):
        self.learned.append((measurement.micro_batch_size, measurement.is_feasible))


class Outcomes:
    """Processes that come to given outcomes, one after the other."""

    backend = "tensorflow"

    def __init__(self, *outcomes):
        self.left, self.micro_batches = list(outcomes), []

    def submit(self, directory, *args, **kwargs):
        _, arguments = directory.read_task()
        self.micro_batches.append(arguments["hyperparameters"]["values"]["micro_batch_size"])
        Journal(directory.journal_file).append("started", attempt=arguments["attempt"], pid=1)
        future = Future()
        future.set_result(self.left.pop(0))
        return future

    def close(self):
        pass


def run(tmp_path, executor, profiles=None, budget=None, **settings):
    settings = TrialSettings(budget, (4, 8), False, False, 1, 1, "val_loss", None, **settings)
    runner = TrialRunner(settings, SearchDirectory(tmp_path), executor, profiles or Profiles())
    space = {"space": [], "values": {"effective_batch_size": 16}}
    return runner, lambda trial_id="0": runner.run(trial_id, 1, space, {})


def test_out_of_memory_the_same_effective_batch_is_tried_with_a_smaller_micro_batch(tmp_path):
    executor, profiles = Outcomes(OUT_OF_MEMORY, OUT_OF_MEMORY, COMPLETED), Profiles()
    _, run_trial = run(tmp_path, executor, profiles)
    result = run_trial()
    assert result.status == "completed" and executor.micro_batches == [8, 4, 2]
    assert result.values == {"effective_batch_size": 16, "micro_batch_size": 2, "accumulation_steps": 8}
    assert profiles.learned == [(8, False), (4, False), (2, True)]
    assert read_trial(SearchDirectory(tmp_path).trial("0").path).attempt == 3


def test_without_a_smaller_micro_batch_it_is_infeasible(tmp_path):
    executor = Outcomes(*[OUT_OF_MEMORY] * 4)
    result = run(tmp_path, executor)[1]()
    assert result.status == "infeasible" and executor.micro_batches == [8, 4, 2, 1]
    assert "micro-batch 1 ran out of memory" in result.reason


def test_what_probes_do_not_see_is_said_where_a_prediction_was_wrong(tmp_path):
    """A metric over the batch, whose outputs of validation's samples are on the device at once."""

    class Learning(Profiles):
        failed = ()

        def profile(self, space):
            profile = super().profile(space)
            for measurement in self.failed:
                profile = profile.with_measurement(measurement)
            return profile

        def learn(self, signature, measurement):
            self.failed = (*self.failed, measurement)

    profiles, budget = Learning(), 2**24
    _, run_trial = run(tmp_path, Outcomes(*[OUT_OF_MEMORY] * 9), profiles, budget)
    # The second begins with one pass, which needs no accumulators.
    results = [run_trial(trial_id) for trial_id in "012"]
    assert results[-1].reason.startswith("not even micro-batch 1 fits")
    for result in results:
        assert result.status == "infeasible"
        assert "a training took more than was predicted" in result.reason and "validation_batch_size" in result.reason
    # Predicted not to fit, nothing was unforeseen.
    assert "took more" not in run(tmp_path / "small", Outcomes(), Profiles(), 100)[1]().reason


def test_a_loss_that_runs_out_of_memory_is_named_and_no_smaller_micro_batch_is_tried(tmp_path):
    class OfALoss(Profiles):
        def profile(self, space):
            return replace(super().profile(space), loss_bytes=(0.0, 2.0**20, 0.0))

    executor = Outcomes(OUT_OF_MEMORY)
    result = run(tmp_path / "a", executor, OfALoss())[1]()
    assert result.status == "infeasible" and executor.micro_batches == [8]
    assert "loss over all 16 samples" in result.reason and "256.0 MiB" in result.reason
    # Known before: no attempt is made.
    result = run(tmp_path / "b", Outcomes(), OfALoss(), budget=2**27)[1]()
    assert result.status == "infeasible" and "of which 256.0 MiB hold the effective" in result.reason
    assert "a smaller effective batch needs less" in result.reason


def test_with_ghost_batches_an_infeasible_trial_names_the_micro_batch_that_it_would_need(tmp_path):
    result = run(tmp_path, Outcomes(), budget=3000, ghost_batch_size=4)[1]()
    assert result.status == "infeasible" and "a micro-batch of one ghost batch (4 samples)" in result.reason
    assert "predicted 3.9 KiB" in result.reason, "of 4 samples, not of 1"


def test_lost_with_its_machine_it_is_tried_again_as_it_was_but_not_for_ever(tmp_path):
    executor = Outcomes(LOST, LOST, COMPLETED)
    assert run(tmp_path / "twice", executor)[1]().status == "completed" and executor.micro_batches == [8, 8, 8]
    executor = Outcomes(*[LOST] * 20)
    result = run(tmp_path / "always", executor)[1]()
    assert result.status == "failed" and "its worker was gone" in result.reason
    assert len(executor.micro_batches) == trial_runner._MAX_LOSSES


def test_a_search_that_was_gone_again_and_again_while_a_trial_ran_lets_it_be(tmp_path):
    journal = Journal(SearchDirectory(tmp_path).trial("0").journal_file)
    for attempt in range(trial_runner._MAX_CRASHES):
        journal.append("started", attempt=attempt + 1, pid=1)
    executor = Outcomes(COMPLETED)
    result = run(tmp_path, executor)[1]()
    assert result.status == "failed" and "may crash the machine" in result.reason and not executor.micro_batches


def test_the_same_training_is_reused_unless_run_trial_may_train_otherwise(tmp_path):
    executor = Outcomes(COMPLETED, COMPLETED)
    _, run_trial = run(tmp_path / "one", executor)
    first, second = run_trial("0"), run_trial("1")
    assert (first.status, second.status, second.reused_from) == ("completed", "reused", "0")
    assert second.values == first.values and second.metrics == first.metrics
    executor = Outcomes(COMPLETED, COMPLETED)
    _, run_trial = run(tmp_path / "two", executor, has_own_run_trial=True)
    assert [run_trial(name).status for name in "01"] == ["completed"] * 2


def test_a_training_of_an_earlier_session_is_not_done_again(tmp_path):
    _, run_trial = run(tmp_path, Outcomes(COMPLETED))
    result = run_trial()
    runner, run_again = run(tmp_path, Outcomes())
    runner.remember("0", result)
    assert run_again("1").reused_from == "0"


def test_other_endings(tmp_path):
    assert run(tmp_path / "a", Outcomes(), max_model_size=99)[1]().status == "infeasible"
    failed = run(tmp_path / "b", Outcomes(Outcome("failed", reason="boom", traceback="...")))[1]()
    assert (failed.status, failed.reason, failed.traceback) == ("failed", "boom", "...")
    stopped = run(tmp_path / "c", Outcomes(Outcome("stopped", reason="asked to")))[1]()
    assert stopped.status == "stopped"
    error = {"class": "SearchError", "arguments": ["Received it.", "something else.", "change it."]}
    with pytest.raises(SearchError, match="change it"):
        run(tmp_path / "d", Outcomes(Outcome("failed", reason="x", error=error)))[1]()
