"""Journals -> a real MLflow store, read back through its client: everything, exactly once."""

import logging
import math
import os
import posixpath
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_search import report
from stored_runs import Runs, dump, sync

from accumtune.tracking.journal import read_search
from accumtune.tracking.mlflow import run_content
from accumtune.tracking.mlflow import ui as browsing
from accumtune.tracking.mlflow.run_content import clean_name
from accumtune.tracking.mlflow.tracker import Tracker


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
    assert len(runs["00"].data.params) == 2 and max(map(len, runs["00"].data.params.values())) == 6000
    metrics = runs["00"].data.metrics
    assert metrics["updates"] == 30 and metrics["epoch_updates"] == 7.0
    assert metrics["huge"] == -metrics["low"] > 1e308
    assert len(runs.text("00", "traceback.txt")) == 50_000
    before = dump(uri)
    assert sync(made, uri) and dump(uri) == before


def test_two_names_stay_two(made, uri):
    made.start()
    values = {"a|b": 1, "a_b": 2, "a*b": 3, "x" * 300: 4, "x" * 299 + "y": 5, "./a": 6, "a": 7}
    made.trial("00").append("proposed", trial_id="00", number=0, hyperparameters=values)
    made.begin("00")
    made.trial("00").append("epoch", attempt=1, execution=0, epoch=0, logs={"m(1)": 1.0, "m[1]": 2.0, "m_1_": 3.0})
    runs = sync(made, uri)
    params, metrics = runs["00"].data.params, runs["00"].data.metrics
    assert sorted(params.values()) == list("1234567") and (params["a_b"], params["a"]) == ("2", "7")
    assert sorted(metrics.values()) == [1.0, 2.0, 3.0] and metrics["m_1_"] == 3.0


@pytest.mark.parametrize("whole, said", [(True, "True"), (False, "False"), (None, None)])
def test_each_run_says_whether_its_loss_is_that_of_the_whole_batch(made, whole, said):
    made.start(whole_batch_loss=whole)
    made.complete("0")
    search = read_search(made.folder)
    for run in (run_content.search_run(search, {}, None), run_content.trial_run(search.trials[0], search)):
        assert run.params.get("whole_batch_loss") == said


NAMES = st.text(alphabet="aä_|*./\\ -:", max_size=6) | st.text(max_size=4) | st.integers(240, 260).map("n".__mul__)


@given(one=NAMES, other=NAMES)
def test_names_are_such_as_mlflow_takes_and_differ_where_they_differed(one, other):
    for name in (one, other):
        assert re.fullmatch(r"[\w\-.: /]{1,250}", clean_name(name)) and clean_name(clean_name(name)) == clean_name(name)
        assert posixpath.normpath(clean_name(name)) == clean_name(name)
    assert (clean_name(one) == clean_name(other)) == (one == other)


def test_a_run_has_ended_when_its_files_are_there(finished, uri, monkeypatch):
    """Who looks for the finished runs of an experiment, as load_config does, finds the configuration in them."""
    from mlflow import MlflowClient

    report(finished, **{"best_config.json": "{}"})
    seen = []
    for name in ("log_artifact", "log_text"):
        log = getattr(MlflowClient, name)

        def logged(client, run_id, *arguments, log=log):
            seen.append(client.get_run(run_id).info.status)
            return log(client, run_id, *arguments)

        monkeypatch.setattr(MlflowClient, name, logged)
    assert sync(finished, uri)["parent"].info.status == "FINISHED"
    assert len(seen) > 6 and set(seen) == {"RUNNING"}


def test_the_environments_store_is_the_default(finished, new_uri, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    uri = new_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Tracker(finished.folder).sync()
    assert len(Runs(uri).by_id) == 6 and not (tmp_path / "mlruns").exists()
    assert Tracker(finished.folder, f"{uri}x").tracking_uri == f"{uri}x", "an argument comes first"


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    folder = tmp_path / "my searches;" / "$(one)"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my searches;")
    tracker = Tracker(folder, f"sqlite:///{tmp_path}/my store.db")
    assert shlex.split(tracker._sync_command()) == [
        "accumtune", "sync", "$(one)", "--tracking-uri", f"sqlite:///{tmp_path}/my store.db"
    ]  # fmt: skip
    assert shlex.split(tracker.ui_command())[1:] == [
        "ui", "--backend-store-uri", f"sqlite:///{tmp_path}/my store.db", "--port", "5000"
    ]  # fmt: skip


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
    secret = "postgresql://me:a#/?hunter2@db/x?password=hunter2"
    made.end("00", "failed", reason=f"cannot reach {secret}", traceback=f"in {secret}", objective=None)
    # A cut in the middle of the address would leave a part of it that nobody recognizes.
    made.propose("01", 1)
    made.end("01", "failed", reason=f"{'x' * 280} {secret}", objective=None)
    hidden = {"url": secret, "api_key": "hunter2", "note": 'token=hunter2"', "long": "x" * 5980 + secret}
    made.trial("02").append("proposed", trial_id="02", number=2, hyperparameters=hidden)
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
