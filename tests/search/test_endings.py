"""Every way in which a trial or a search can end, and how the search continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import keras
import keras_tuner
import pytest
from made_tuner import X, Y, make, search
from models import build_fixed, build_plain, build_wide, dense

import accumtune
from accumtune import errors
from accumtune.search import failure_limits, scheduler
from accumtune.tracking.journal import Journal, read_search


class Misbehaving(keras_tuner.HyperModel):
    """Trials that end in every possible way; probes succeed."""

    def build(self, hp):
        behaviour = hp.Choice("behaviour", ["fine", "raises", "diverges", "is killed", "hangs", "fine again"])
        return dense(learning_rate=1e30 if behaviour == "diverges" else 0.1)

    def fit(self, hp, model, *args, **kwargs):
        behaviour = hp.get("behaviour")
        if behaviour == "raises":
            raise KeyError("a column that is not there")
        if behaviour == "is killed":
            os.kill(os.getpid(), 9)
        if behaviour == "hangs":
            time.sleep(600)
        return model.fit(*args, **kwargs)


def test_every_ending_is_an_outcome_of_its_trial_and_the_search_goes_on(tmp_path):
    tuner = make(
        tmp_path, accumtune.GridSearch, Misbehaving(), max_trials=None, micro_batch_sizes=(8,), accumulation_steps=(1,),
        max_consecutive_failed_trials=10, trial_timeout_seconds=8,
    )  # fmt: skip
    search(tuner)
    trials = {trial.hyperparameters["behaviour"]: trial for trial in tuner.record().trials}
    assert trials["fine"].status == trials["fine again"].status == "completed"
    reasons = {name: trial.reason for name, trial in trials.items() if trial.status == "failed"}
    assert "a column that is not there" in reasons["raises"]
    assert "in fit" in trials["raises"].traceback
    assert "NaN" in reasons["diverges"] and "learning rate" in reasons["diverges"]
    assert "SIGKILL" in reasons["is killed"]
    assert "8 s" in reasons["hangs"] and "trial_timeout_seconds" in reasons["hangs"]
    assert tuner.record().status == "finished"
    assert [t.status for t in tuner.oracle.trials.values()].count("FAILED") == 4
    assert tuner.get_best_hyperparameters(10)[-1].get("behaviour") in ("fine", "fine again")


class AlwaysRaises(keras_tuner.HyperModel):
    def build(self, hp):
        return dense(learning_rate=hp.Float("learning_rate", 0.01, 0.1))

    def fit(self, hp, model, *args, **kwargs):
        raise ValueError(f"no luck with {hp.get('learning_rate'):.3f}")


def test_three_failures_in_a_row_end_the_search_with_their_reasons_and_it_can_go_on(tmp_path):
    with pytest.raises(errors.SearchFailedError) as caught:
        search(make(tmp_path, build=AlwaysRaises(), max_trials=10))
    assert str(caught.value).count("no luck with") >= 3
    assert read_search(tmp_path / "search").status == "failed"
    mended = search(make(tmp_path, build=build_plain, max_trials=4))
    assert len(mended.record().with_status("completed")) == 1


class Greedy(keras.callbacks.Callback):
    """Takes more memory than any probe has seen, as long as the micro-batch is large."""

    def on_train_begin(self, logs=None):
        import tensorflow as tf

        if accumtune.accumulation.accumulation_of(self.model).micro_batch_size > 4:
            tf.zeros((64, 2**20))


def test_a_surprise_out_of_memory_takes_the_next_smaller_micro_batch(tmp_path):
    tuner = make(tmp_path, build=build_fixed, max_trials=1, micro_batch_sizes=(4, 8), accumulation_steps=(2,))
    tuner.oracle.hyperparameters.Fixed("effective_batch_size", 16)
    search(tuner, callbacks=[Greedy()])
    (trial,) = tuner.record().trials
    assert trial.status == "completed"
    attempts = [e for e in Journal(trial.folder / "journal.jsonl").events() if e["event"] == "proposed"]
    tried = [event["hyperparameters"]["micro_batch_size"] for event in attempts]
    assert tried[-1] == 4 and trial.micro_batch_size == 4
    assert len({event["hyperparameters"]["effective_batch_size"] for event in attempts}) == 1


def test_a_search_ends_where_there_is_nothing_new_to_train(tmp_path):
    tuner = make(
        tmp_path, accumtune.BayesianOptimization, build_plain, max_trials=10, num_initial_points=1,
        micro_batch_sizes=(4,), accumulation_steps=(1,),
    )  # fmt: skip
    record = search(tuner, epochs=1).record()
    rates = [trial.hyperparameters["learning_rate"] for trial in record.with_status("completed")]
    assert sorted(rates) == [0.1, 0.3] and record.status == "finished"
    assert all(trial.reused_from for trial in record.with_status("reused"))


def test_models_too_large_for_the_budget_are_replaced_and_do_not_count(tmp_path):
    record = search(make(tmp_path, build=build_wide, max_trials=3)).record()
    assert len(record.with_status("completed")) == 3
    assert all(trial.hyperparameters["width"] == 8 for trial in record.with_status("completed"))
    for trial in record.with_status("infeasible"):
        assert trial.hyperparameters["width"] == 2**20 and "micro-batch 1" in trial.reason


@pytest.mark.parametrize("kind", [accumtune.RandomSearch, accumtune.GridSearch])
def test_a_budget_in_which_nothing_fits(tmp_path, kind, monkeypatch, capsys):
    def build(hp):
        return dense(width=2**20)

    for module in (failure_limits, scheduler):
        monkeypatch.setattr(module, "budget_hint", lambda backend: " What may help.")
    tuner = make(tmp_path, kind, build=build)
    with pytest.raises(errors.BudgetTooSmallError, match="16.0 MiB") as error:
        tuner.search(X, Y, validation_data=(X, Y), verbose=1)
    assert "What may help." in str(error.value)
    lines = capsys.readouterr().out.splitlines()
    first = next(index for index, line in enumerate(lines) if "infeasible" in line)
    assert lines[first + 1].strip() == "What may help.", "with the first that does not fit"
    assert sum("What may help." in line for line in lines) == 1
    assert "What may help." in tuner.record().advice, "so a resumed search does not say it again"


def test_a_grid_that_begins_with_what_does_not_fit_goes_on(tmp_path):
    def build(hp):
        return dense(width=hp.Choice("width", [2**20, 8]))

    grid = {"micro_batch_sizes": (4,), "accumulation_steps": (1, 2), "max_trials": None}
    record = search(make(tmp_path, accumtune.GridSearch, build, **grid), epochs=1).record()
    endings = [(trial.status, trial.hyperparameters["width"]) for trial in record.trials]
    assert sorted(endings) == sorted([("infeasible", 2**20), ("completed", 8)] * 2)
    assert endings[0] == ("infeasible", 2**20)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from models import build_plain, data
import accumtune
X, Y = data()
tuner = accumtune.RandomSearch(
    build_plain, objective="val_loss", max_trials=4, seed=1, memory_budget="16MiB", micro_batch_sizes=(4, 8),
    accumulation_steps=(1, 2), tracking_uri=False, directory={directory!r}, project_name="search")
tuner.search(X, Y, validation_data=(X, Y), epochs=2)
"""


def test_a_killed_search_goes_on_without_training_anything_twice(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), directory=str(tmp_path)))
    process = forked.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_search(tmp_path / "search").with_status("completed")) >= 2:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    completed = read_search(tmp_path / "search").with_status("completed")
    before = {trial.trial_id: trial.objective_value for trial in completed}
    forked.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    record = read_search(tmp_path / "search")
    assert len(record.with_status("completed")) == 4 and record.status == "finished"
    for trial in record.trials:
        if trial.trial_id in before:
            assert trial.objective_value == before[trial.trial_id]
            started = [e for e in Journal(trial.folder / "journal.jsonl").events() if e["event"] == "started"]
            assert len(started) == 1


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_at_once_and_the_search_can_go_on(tmp_path):
    script = tmp_path / "script.py"
    text = SCRIPT.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    script.write_text(text.replace("epochs=2", "epochs=100_000").replace("max_trials=4", "max_trials=1"))
    process = forked.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(t.epochs for t in read_search(tmp_path / "search").trials):
        time.sleep(0.05)
    (trial,) = read_search(tmp_path / "search").trials
    for begin in (lambda: search(make(tmp_path)), lambda: make(tmp_path, overwrite=True)):
        with pytest.raises(errors.SearchDirectoryError, match=f"running already, in process {process.pid} "):
            begin()
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and "run the same script again" in output
    assert not Path(f"/proc/{trial.pid}").exists()
    assert read_search(tmp_path / "search").status == "interrupted"
    script.write_text(text.replace("max_trials=4", "max_trials=1"))
    forked.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    (trial,) = read_search(tmp_path / "search").trials
    assert trial.status == "completed" and len(trial.epochs) == 2
