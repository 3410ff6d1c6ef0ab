"""Several trials at once: workers, devices and executors of a search."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
from test_crash import Trainings, session

from accumtune.errors import SearchError
from accumtune.execution.placement import Place
from accumtune.search import parallelism
from accumtune.search.session.reporter import command_to_resume
from accumtune.tracking.journal import Journal, read_search


def test_keras_tuner_s_chief_and_workers_are_pointed_to_an_executor(monkeypatch):
    parallelism.refuse_chief_and_workers()
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "chief")
    with pytest.raises(SearchError, match="KERASTUNER_TUNER_ID") as caught:
        parallelism.refuse_chief_and_workers()
    assert 'executor="ray"' in str(caught.value)


def test_what_is_no_executor_is_refused():
    with pytest.raises(SearchError, match="get_executor"):
        parallelism.resolve_pool(object())
    with ThreadPoolExecutor(1) as pool:
        assert parallelism.resolve_pool(pool) is pool
        assert parallelism.places_for_workers(3, "auto", pool, None) == [Place()] * 3
        with pytest.raises(SearchError, match="devices"):
            parallelism.places_for_workers(3, [0], pool, None)


def test_one_worker_is_left_to_the_framework():
    assert parallelism.places_for_workers(1, "auto", None, None) == [Place()]


def test_the_command_to_resume_is_the_one_that_was_given(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "train.py", "--name", "two words"])
    monkeypatch.setattr("sys.modules", {})
    assert command_to_resume() == "python3 train.py --name 'two words'"


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import keras
import accumtune
from accumtune.search import scheduler
from models import build_plain, data

class Waiting(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        time.sleep({seconds} if epoch else 0.1)

scheduler._STOPPING_SECONDS = {patience}
X, Y = data()
tuner = accumtune.GridSearch(
    build_plain, objective="val_loss", micro_batch_sizes=(8,), accumulation_steps=(1,), workers=2, tracking_uri=False,
    directory={directory!r}, project_name="search",
)
tuner.search(X, Y, validation_data=(X, Y), epochs=5, callbacks=[Waiting()])
"""


def start(folder, seconds, patience=7.0):
    script = folder / "script.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, directory=str(folder), seconds=seconds, patience=patience))
    return forked.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training(folder, epochs=1):
    """The two trials, once each has reported an epoch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        trials = read_search(folder / "search").trials
        if len(trials) == 2 and all(len(trial.epochs) >= epochs for trial in trials):
            return trials
        time.sleep(0.05)
    raise AssertionError("the trials did not begin")


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


def processes_of(trials):
    """Returns the ids of the trials' processes and of the fork server that started them."""
    stats = [Path(f"/proc/{trial.pid}/stat").read_text().rsplit(")", 1)[1].split() for trial in trials]
    return [*(trial.pid for trial in trials), *{int(stat[1]) for stat in stats}]


@pytest.mark.slow
def test_ctrl_c_saves_what_runs_ends_every_process_and_the_search_goes_on_from_there(tmp_path):
    process = start(tmp_path, 0.5)
    trials = training(tmp_path, epochs=2)
    pids = processes_of(trials)
    assert len(pids) == 3
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, -9)
    assert f"to resume, run the same script again: {Path(sys.executable).name} {tmp_path / 'script.py'}" in output
    assert not any(map(is_alive, pids))
    assert read_search(tmp_path / "search").status == "interrupted"
    assert all((trial.folder / "continue.npz").exists() for trial in trials)
    process = start(tmp_path, 0.5)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for trial in read_search(tmp_path / "search").trials:
        assert trial.status == "completed" and [epoch.epoch for epoch in trial.epochs] == list(range(5))
        events = Journal(trial.folder / "journal.jsonl").events()
        (continued,) = [event for event in events if event["event"] == "continued"]
        assert continued["epoch"] >= 1
        assert not (trial.folder / "continue.npz").exists()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trial_in_a_long_epoch_is_not_waited_for(tmp_path, times):
    """After Ctrl-C for a few seconds, after a second one not at all (this search would wait for an hour)."""
    process = start(tmp_path, 600, patience=2.0 if times == 1 else 3600.0)
    trials = training(tmp_path)
    pids = processes_of(trials)
    process.send_signal(signal.SIGINT)
    if times == 2:
        assert "Stopping" in next(line for line in process.stdout if "Stopping" in line)
        assert all(map(is_alive, pids))
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, -9), output
    assert "to resume, run the same script again: " in output
    assert not any(map(is_alive, pids))
    assert read_search(tmp_path / "search").status == "interrupted"


def test_hyperband_promotes_only_what_has_ended_also_with_several_at_once(tmp_path):
    """A worker waits until the trials that decide about a promotion have ended."""
    oracle, search = session(tmp_path / "s", "hyperband", Trainings(), workers=4)
    search.run()
    assert not oracle.ongoing_trials and len(oracle.end_order) == len(oracle.trials)
    sources = []
    for number, trial_id in enumerate(oracle.start_order):
        values = oracle.trials[trial_id].hyperparameters.values
        if values.get("tuner/trial_id"):
            source = values["tuner/trial_id"]
            before = oracle.trials[source].hyperparameters.values
            assert source in oracle.start_order[:number] and oracle.trials[source].status == "COMPLETED"
            # Keras Tuner writes the number of its newest bracket, so the epochs say which bracket it is: they differ.
            assert before["tuner/bracket"] >= values["tuner/bracket"]
            assert before["tuner/epochs"] == values["tuner/initial_epoch"] > 0
            assert before["tuner/round"] == values["tuner/round"] - 1
            sources.append(source)
    assert sources and len(sources) == len(set(sources))
