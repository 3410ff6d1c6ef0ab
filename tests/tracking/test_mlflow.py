"""Journals -> a real MLflow store, read back through its client: everything, exactly once, whatever happens."""

import logging
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_search import MadeSearch

from accumtune.errors import TrackingError
from accumtune.tracking import browsing, reaching
from accumtune.tracking import mlflow as tracking
from accumtune.tracking.mlflow import Tracker, read_cache

MIB = 2**20


class Runs:
    """What a store holds, by trial id; the parent under "parent"."""

    def __init__(self, uri, experiment="made"):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self.client.get_experiment_by_name(experiment)
        runs = list(self.client.search_runs([self.experiment.experiment_id])) if self.experiment else []
        self.by_id = {run.data.tags.get("accumtune.trial_id", "parent"): run for run in runs}
        assert len(self.by_id) == len(runs), "a run is there twice"

    def __getitem__(self, name):
        return self.by_id[name]

    def history(self, name, metric):
        return [(it.step, it.value) for it in self.client.get_metric_history(self[name].info.run_id, metric)]

    def artifacts(self, name):
        return {file.path for file in self.client.list_artifacts(self[name].info.run_id)}

    def text(self, name, artifact):
        return Path(self.client.download_artifacts(self[name].info.run_id, artifact)).read_text()

    def content(self):
        """Everything that does not differ from one store to another, to compare stores with."""
        told = {}
        for name, run in self.by_id.items():
            tags = {key: value for key, value in run.data.tags.items() if not re.search("parentRunId|best_run_id", key)}
            curves = {metric: self.history(name, metric) for metric in run.data.metrics}
            info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
            data = [it.dataset.digest for it in run.inputs.dataset_inputs]
            told[name] = repr((info, sorted(run.data.params.items()), sorted(tags.items()), sorted(curves.items()),
                               sorted(self.artifacts(name)), data))  # fmt: skip
        return told


def dump(uri):
    """Every row of the database."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return list(connection.iterdump())


def sync(made, uri):
    Tracker(made.folder, uri).sync()
    return Runs(uri, made.name)


def report(made, note="# The answer", **files):
    folder = made.folder / "report"
    folder.mkdir(exist_ok=True)
    for name, text in {"note.md": note, "candidates.csv": "a,b\n", "pareto.png": "png", **files}.items():
        (folder / name).write_text(text)


def test_every_trial_has_its_run(finished, uri):
    runs = sync(finished, uri)
    assert set(runs.by_id) == {"parent", "00", "01", "02", "03", "infeasible_0000"}
    run = runs["00"]
    assert run.info.run_name == "trial 00: 64 = 16 × 4" and run.info.status == "FINISHED"
    assert run.data.params == {
        "learning_rate": "0.01", "width": "32",
        "effective_batch_size": "64", "micro_batch_size": "16", "accumulation_steps": "4",
    }  # fmt: skip
    metrics = {
        "effective_batch_size": 64, "micro_batch_size": 16, "accumulation_steps": 4,
        "throughput_samples_per_second": 4000, "predicted_throughput_samples_per_second": 4000,
        "peak_memory_mib": 38, "predicted_peak_memory_mib": 40,
        "best_val_loss": 0.5, "best_epoch": 2, "updates": 30, "training_seconds": 1.5,
    }  # fmt: skip
    assert {name: run.data.metrics[name] for name in metrics} == metrics
    assert runs.history("00", "loss") == [(0, 0.5 / 1.1 * 3), (1, 0.5 / 1.1 * 2), (2, 0.5 / 1.1)]
    tags = {name.removeprefix("accumtune."): value for name, value in run.data.tags.items()}
    assert tags["status"] == "completed" and tags["memory_source"] == "BFC allocator" and tags["device"] == "CPU"
    assert tags["search_id"] == finished.search_id and tags["trial_id"] == "00"
    assert tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    assert "peak 38.0 MiB" in tags["mlflow.note.content"]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "abc") and "[100, 8, 8]" in data.dataset.profile


def test_what_did_not_complete_says_why(finished, uri):
    runs = sync(finished, uri)
    assert {name: run.info.status for name, run in runs.by_id.items()} == {
        "parent": "FINISHED", "00": "FINISHED", "01": "FINISHED", "02": "FAILED", "03": "FINISHED",
        "infeasible_0000": "KILLED",
    }  # fmt: skip
    statuses = {name: run.data.tags["accumtune.status"] for name, run in runs.by_id.items() if name != "parent"}
    assert statuses == {
        "00": "completed", "01": "completed", "02": "failed", "03": "reused", "infeasible_0000": "infeasible"
    }  # fmt: skip
    assert "boom" in runs["02"].data.tags["accumtune.reason"] and "boom" in runs.text("02", "traceback.txt")
    assert "best_val_loss" not in runs["02"].data.metrics
    assert math.isnan(runs.history("02", "loss")[0][1])
    assert runs["03"].data.tags["accumtune.reused_from"] == "00" and runs["03"].data.metrics["best_val_loss"] == 0.5
    assert "fits" in runs["infeasible_0000"].data.tags["accumtune.reason"]


def test_the_parent_has_the_report(finished, uri):
    report(finished, **{"best_config.json": '{"source": {"trial_id": "01"}}'})
    runs = sync(finished, uri)
    parent = runs["parent"]
    assert runs.artifacts("parent") == {"note.md", "candidates.csv", "pareto.png", "best_config.json"}
    assert parent.data.tags["mlflow.note.content"] == "# The answer"
    assert parent.data.tags["accumtune.best_run_id"] == runs["01"].info.run_id
    assert parent.data.params["memory_budget"] == "64.0 MiB" and parent.data.params["max_trials"] == "4"
    assert parent.data.tags["accumtune.trials_completed"] == "2" and "mlflow.parentRunId" not in parent.data.tags
    report(finished, note="# Another answer")
    assert sync(finished, uri)["parent"].data.tags["mlflow.note.content"] == "# Another answer"


def test_a_second_sync_changes_nothing(finished, uri):
    report(finished)
    tracker = Tracker(finished.folder, uri)
    tracker.sync()
    before = dump(uri)
    tracker.sync()
    Tracker(finished.folder, uri).sync()
    os.remove(finished.folder / "tracking.json")
    Tracker(finished.folder, uri).sync()
    assert dump(uri) == before


def test_a_running_trial_is_there_live(made, uri):
    made.start()
    made.propose("00")
    made.begin("00")
    tracker = Tracker(made.folder, uri)
    for epoch in range(3):
        made.epoch("00", epoch, 1.0 / (epoch + 1))
        if epoch == 1:
            tracker = Tracker(made.folder, uri)  # another process
        tracker.sync()
        runs = Runs(uri)
        assert runs["00"].info.status == runs["parent"].info.status == "RUNNING"
        assert runs.history("00", "loss") == [(step, 1.0 / (step + 1)) for step in range(epoch + 1)]
    assert "1 running" in runs["parent"].data.tags["mlflow.note.content"]
    made.end("00")
    made.finish()
    runs = sync(made, uri)
    assert len(runs.history("00", "loss")) == 3 and runs["00"].info.status == "FINISHED"
    assert runs["parent"].data.tags["accumtune.trials_running"] == "0"


def test_a_torn_line_is_not_there_yet(made, uri):
    made.start()
    made.propose("00")
    made.begin("00")
    made.epoch("00", 0, 1.0)
    with open(made.trial("00").path, "ab") as file:
        file.write(b'{"event": "epoch", "attempt": 1, "epo')
    assert sync(made, uri).history("00", "loss") == [(0, 1.0)]
    made.epoch("00", 1, 0.5)
    assert sync(made, uri).history("00", "loss") == [(0, 1.0), (1, 0.5)]


def test_a_new_attempt_takes_the_place_of_the_one_before(made, uri):
    made.start()
    made.propose("00", micro=32, steps=2)
    made.begin("00", attempt=1)
    made.epoch("00", 0, 9.0, attempt=1)
    tracker = Tracker(made.folder, uri)
    tracker.sync()
    made.propose("00", micro=16, steps=4)
    made.begin("00", attempt=2)
    made.epoch("00", 0, 1.0, attempt=2)
    tracker.sync()
    made.end("00")
    runs = sync(made, uri)
    assert runs["00"].data.params["micro_batch_size"] == "16" and runs.history("00", "loss") == [(0, 1.0)]


def test_a_trial_that_failed_before_it_was_proposed_has_its_run(made, uri):
    made.start()
    made.trial("07").append("ended", status="failed", reason="the build function raised", traceback="Traceback ...")
    runs = sync(made, uri)
    assert runs["07"].info.status == "FAILED" and runs["07"].info.run_name == "trial 07"
    assert "build function" in runs["07"].data.tags["accumtune.reason"]
    assert runs["parent"].data.tags["accumtune.trials_failed"] == "1"


def test_executions_of_one_trial_have_curves_of_their_own(made, uri):
    made.start()
    made.propose("00")
    made.begin("00")
    made.epoch("00", 0, 1.0, execution=0)
    made.epoch("00", 0, 2.0, execution=1)
    runs = sync(made, uri)
    assert runs.history("00", "loss") == [(0, 1.0)] and runs.history("00", "execution_1/loss") == [(0, 2.0)]


def test_a_search_that_was_stopped_and_goes_on(made, uri):
    made.start()
    made.propose("00")
    made.begin("00")
    made.finish("interrupted", "stopped by the user")
    runs = sync(made, uri)
    assert runs["00"].info.status == runs["parent"].info.status == "KILLED"
    assert runs["parent"].data.tags["accumtune.reason"] == "stopped by the user"
    made.journal.append("search_resumed")
    made.begin("00", attempt=2)
    runs = sync(made, uri)
    assert runs["00"].info.status == runs["parent"].info.status == "RUNNING"
    assert "accumtune.reason" not in runs["parent"].data.tags
    made.end("00")
    made.finish()
    runs = sync(made, uri)
    assert runs["00"].info.status == runs["parent"].info.status == "FINISHED"


def test_odd_names_and_long_values_arrive(made, uri):
    made.start()
    made.trial("00").append(
        "proposed", trial_id="00", number=0, hyperparameters={"../a*b": "x" * 7000, "lr|rate": 1e-300}
    )
    made.begin("00")
    logs = {"größe/%": 1.0, "updates": 7.0, "huge": math.inf, "low": -math.inf}
    made.trial("00").append("epoch", attempt=1, execution=0, epoch=0, logs=logs)
    made.end("00", "failed", reason="r" * 9000, traceback="t" * 50_000, objective=math.nan)
    runs = sync(made, uri)
    assert len(runs["00"].data.params) == 2 and len(runs["00"].data.params["a_b"]) == 6000
    metrics = runs["00"].data.metrics
    assert metrics["updates"] == 30 and metrics["epoch_updates"] == 7.0
    assert metrics["huge"] == -metrics["low"] > 1e308
    assert len(runs.text("00", "traceback.txt")) == 50_000
    before = dump(uri)
    assert sync(made, uri) and dump(uri) == before


class Interrupted(Exception):
    """Stands for anything that ends a sync in the middle."""


WRITES = [
    "create_experiment", "create_run", "log_batch", "set_tag", "log_inputs", "log_text", "log_artifact",
    "set_terminated", "update_run", "set_experiment_tag", "delete_run",
]  # fmt: skip


def test_a_sync_that_ends_anywhere_is_completed_by_the_next(finished, new_uri, monkeypatch):
    from mlflow import MlflowClient

    report(finished)
    expected = sync(finished, new_uri()).content()
    writes = {"left": 0}

    def counted(name):
        original = getattr(MlflowClient, name)

        def call(*arguments, **keywords):
            writes["left"] -= 1
            if writes["left"] < 0:
                raise Interrupted
            return original(*arguments, **keywords)

        return call

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, counted(name))
    # Every moment at first, then steps that meet all kinds of moments.
    moments = 0
    for allowed in [*range(8), *range(8, 1000, 13)]:
        uri = new_uri()
        writes["left"] = allowed
        try:
            Tracker(finished.folder, uri).sync()
        except TrackingError:
            moments += 1
        else:
            break
        writes["left"] = 10**9
        assert sync(finished, uri).content() == expected, f"interrupted at write {allowed}"
    assert moments > 10


def test_a_killed_process_leaves_what_the_next_completes(finished, new_uri):
    report(finished)
    expected = sync(finished, new_uri()).content()
    uri = new_uri()
    script = "import sys; from accumtune.tracking.mlflow import Tracker; Tracker(sys.argv[1], sys.argv[2]).sync()"
    process = subprocess.Popen([sys.executable, "-c", script, str(finished.folder), uri])
    # Kill it when the first trial is there.
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        while connection.execute("select count(*) from runs").fetchone()[0] < 2 and process.poll() is None:
            time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sync(finished, uri).content() == expected


def test_the_background_brings_all_without_being_asked(made, uri):
    made.start()
    tracker = Tracker(made.folder, uri, interval_seconds=0.05)
    assert tracker.parent_run_id is None
    tracker.start()
    made.complete("00", 0)
    wait_until(lambda: Runs(uri).by_id.get("00") is not None)
    made.complete("01", 1)
    made.finish()
    report(made)
    assert tracker.stop() == ""
    runs = Runs(uri)
    assert runs["01"].data.metrics["best_val_loss"] == 0.5 and runs["parent"].info.status == "FINISHED"
    assert tracker.parent_run_id == runs["parent"].info.run_id
    assert Tracker(made.folder, uri).parent_run_id == tracker.parent_run_id, "known without asking the store"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_dead_server_harms_nothing(finished, uri):
    address = f"http://me:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(finished.folder, address, interval_seconds=0.05)
    tracker.start()
    message = tracker.stop()
    assert read_cache(finished.folder)["tracking_uri"] == address.replace("me:secret@", ""), "where to sync to, later"
    assert "accumtune sync" in message and "Nothing is lost" in message and "secret" not in message
    assert tracker.parent_run_id is None and tracker.ui_address() == ""
    with pytest.raises(TrackingError, match="does not answer") as error:
        tracker.sync()
    assert "secret" not in str(error.value)
    assert len(sync(finished, uri).by_id) == 6


def test_a_silent_server_does_not_hold_up_the_end(finished):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        tracker = Tracker(finished.folder, f"http://127.0.0.1:{server.getsockname()[1]}", stop_seconds=0.2)
        tracker.start()
        assert "takes too long" in tracker.stop()


def test_a_server_that_was_silent_for_long_is_not_waited_for(finished, monkeypatch):
    """However long an answering one would be: without that, this test would take an hour."""
    monkeypatch.setattr(tracking, "_SILENCE_SECONDS", 0.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        tracker = Tracker(finished.folder, f"http://127.0.0.1:{server.getsockname()[1]}", stop_seconds=3600)
        tracker.start()
        assert "takes too long" in tracker.stop()


def test_who_is_heard_is_not_silent(monkeypatch):
    now = iter([0.0, 5.0, 7.0, 9.0, 11.0])
    monkeypatch.setattr(reaching.time, "monotonic", lambda: next(now))
    pulse = reaching.Pulse(is_local=False)  # 0 s
    assert pulse.silent_seconds() == 5.0

    class Client:
        number = 3

        def answer(self, value, *, fails=False):
            if fails:
                raise OSError
            return value

    listening = reaching.Listening(Client(), pulse)
    with pytest.raises(OSError):
        listening.answer(1, fails=True)
    assert listening.answer(1) == 1 and listening.number == 3  # 7 s
    assert pulse.silent_seconds() == 2.0
    assert reaching.Pulse(is_local=True).silent_seconds() == 0.0, "a file is slow at worst"


@pytest.mark.parametrize("scheme", ["http", "postgresql+psycopg", "mysql+pymysql"])
def test_a_dead_store_is_known_at_once_whatever_its_kind(scheme):
    """SQLAlchemy's retries would take minutes."""
    with pytest.raises(TrackingError, match="does not answer") as error:
        reaching.check_reachable(f"{scheme}://me:secret@127.0.0.1:{free_port()}/mlflow")
    assert "secret" not in str(error.value)


def test_a_wiped_store_gets_everything_again(finished, new_uri):
    uri, other = new_uri(), new_uri()
    tracker = Tracker(finished.folder, uri)
    tracker.sync()
    expected = Runs(uri).content()
    for run in Runs(uri).by_id.values():
        Runs(uri).client.delete_run(run.info.run_id)
    tracker.sync()
    assert Runs(uri).content() == expected
    Runs(uri).client.delete_experiment(tracker.experiment_id)
    tracker.sync()
    assert Runs(uri).experiment.lifecycle_stage == "active"
    assert sync(finished, other).content() == expected


def test_a_removed_database_is_noticed(made, uri):
    made.start()
    tracker = Tracker(made.folder, uri, interval_seconds=3600)
    tracker.sync()
    os.remove(uri.removeprefix("sqlite:///"))
    with pytest.raises(TrackingError, match="was removed"):
        tracker._replay.run(is_fresh=False)


def test_runs_that_are_there_twice_become_one(finished, uri):
    runs = sync(finished, uri)
    tags = {"accumtune.search_id": finished.search_id, "accumtune.trial_id": "00"}
    runs.client.create_run(runs.experiment.experiment_id, tags=tags)
    assert "best_val_loss" in sync(finished, uri)["00"].data.metrics


def test_two_searches_at_once_into_one_store(tmp_path, finished, uri):
    other = MadeSearch(tmp_path / "searches" / "other", search_id="beef" * 8, name=finished.name).start()
    other.complete("00", objective=0.25)
    trackers = [Tracker(made.folder, uri) for made in (finished, other)]
    threads = [threading.Thread(target=tracker.sync) for tracker in trackers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tracker in trackers:
        tracker.sync()
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (experiment,) = [it for it in client.search_experiments() if it.name == "made"]
    runs = client.search_runs([experiment.experiment_id])
    tags = [run.data.tags for run in runs]
    found = sorted(f"{it['accumtune.search_id'][:4]} {it.get('accumtune.trial_id', '')}" for it in tags)
    ours = ["f00d ", "f00d 00", "f00d 01", "f00d 02", "f00d 03", "f00d infeasible_0000"]
    assert found == ["beef ", "beef 00", *ours]


def test_two_syncs_of_one_search_take_turns(finished, uri, monkeypatch):
    import fcntl

    from accumtune.tracking import mlflow as module

    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.2)
    with open(finished.folder / "tracking.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrackingError, match="Another process"):
            Tracker(finished.folder, uri).sync()
    Tracker(finished.folder, uri).sync()


def test_no_tracking_is_no_tracking(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(finished.folder, False)
    tracker.start()
    tracker.sync()
    assert tracker.stop() == "" == tracker.ui_command() == tracker.ui_address() and tracker.parent_run_id is None
    assert not (tmp_path / "mlruns").exists()


def test_the_users_own_mlflow_is_left_as_it_was(finished, new_uri, monkeypatch):
    import mlflow

    own, uri = new_uri(), new_uri()
    # What is set here is unset for the tests that follow.
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    mlflow.set_tracking_uri(own)
    level = logging.getLogger("mlflow").level
    with mlflow.start_run() as run:
        sync(finished, uri)
        assert mlflow.active_run().info.run_id == run.info.run_id
        assert mlflow.get_tracking_uri() == own and mlflow.get_registry_uri() == own
    assert logging.getLogger("mlflow").level == level
    assert Runs(own).experiment is None


def test_no_password_reaches_the_store(made, uri):
    made.start()
    made.propose("00")
    made.begin("00")
    secret = "postgresql://me:hunter2@db/x?password=hunter2"
    made.end("00", "failed", reason=f"cannot reach {secret}", traceback=f"in {secret}", objective=None)
    (made.folder / "trial_00" / "log.txt").write_text(f"trying {secret}\n")
    made.finish("failed", f"cannot reach {secret}")
    runs = sync(made, uri)
    assert {"traceback.txt", "log.txt"} <= runs.artifacts("00")
    assert not any("hunter2" in line for line in dump(uri))
    assert "hunter2" not in runs.text("00", "traceback.txt") + runs.text("00", "log.txt")


def test_how_to_look_at_it(finished, tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(browsing.shutil, "which", lambda name: f"/usr/bin/{name}")
    tracker = Tracker(finished.folder)
    assert tracker.ui_command() == "mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --port 5000"
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(empty_store.read_bytes())
    tracker.sync()
    number = tracker.experiment_id
    assert re.fullmatch(
        rf"http://127.0.0.1:5000/#/experiments/{number}/runs\?workflowType=machine_learning&viewStateShareKey=\w+",
        tracker.ui_address(),
    )
    assert (tmp_path / "mlruns" / "artifacts").is_dir()
    # In a virtual environment that is not active, the program is called by its path.
    monkeypatch.setattr(browsing.shutil, "which", lambda name: None)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mlflow").touch()
    monkeypatch.setattr(browsing.sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert tracker.ui_command(81).startswith(".venv/bin/mlflow ui ") and tracker.ui_command(81).endswith("--port 81")
    server = Tracker(finished.folder, "http://me:secret@host:5000/")
    assert server.ui_command() == "" and server.ui_address() == "", "nothing is known of that server yet"


@pytest.fixture
def start_server(tmp_path):
    processes = []

    def start(port):
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
            "--artifacts-destination", str(tmp_path / "served"), "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1",
        ]  # fmt: skip
        log = open(tmp_path / "server.log", "ab")
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        processes.append(process)
        wait_until(lambda: _answers(port), 120)
        return process

    yield start
    for process in processes:
        stop_server(process)


def stop_server(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port):
    import urllib.request

    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def test_a_server_that_hangs_and_comes_back(made, start_server, tmp_path, empty_store, capfd):
    (tmp_path / "server.db").write_bytes(empty_store.read_bytes())
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    process = start_server(port)
    made.start()
    made.complete("00", 0)
    tracker = Tracker(made.folder, uri, interval_seconds=0.05, stop_seconds=1.0)
    tracker.start()
    wait_until(lambda: "log.txt" in Runs(uri).artifacts("00") if Runs(uri).by_id.get("00") else False)
    os.killpg(process.pid, signal.SIGSTOP)  # it takes connections and never answers
    made.complete("01", 1)
    made.finish()
    report(made)
    assert "accumtune sync" in tracker.stop()
    assert capfd.readouterr() == ("", ""), "nothing of MLflow's talk between the lines of the search"
    os.killpg(process.pid, signal.SIGCONT)
    runs = sync(made, uri)
    assert set(runs.by_id) == {"parent", "00", "01"} and runs["parent"].info.status == "FINISHED"
    assert runs.artifacts("parent") == {"note.md", "candidates.csv", "pareto.png"}
    assert len(runs.history("01", "loss")) == 3
    assert Tracker(made.folder, uri).ui_command() == "" and str(port) in Tracker(made.folder, uri).ui_address()
