"""After an interrupted or killed sync, two at once, or a wiped store, the next sync completes the store."""

import json
import os
import signal
import sqlite3
import sys
import threading
import time

import forked
import pytest
from made_search import MadeSearch, report
from stored_runs import Runs, sync

from accumtune.errors import TrackingError
from accumtune.tracking.mlflow.tracker import Tracker
from accumtune.tracking.report.report_files import import_line


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
    script = "import sys\nfrom accumtune.tracking.mlflow.tracker import Tracker\n"
    script += "Tracker(sys.argv[1], sys.argv[2]).sync()"
    process = forked.Popen([sys.executable, "-c", script, str(finished.folder), uri])
    # Kill it when the first trial is there.
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        while connection.execute("select count(*) from runs").fetchone()[0] < 2 and process.poll() is None:
            time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sync(finished, uri).content() == expected


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


def test_the_report_names_the_run_that_is_there(finished, new_uri):
    """Written while the store was out of reach, or before it lost its runs."""
    line = import_line({}, finished.folder / "report")
    source = {"trial_id": "01", "run_id": None, "tracking_uri": None}
    report(finished, note=f"# Answer\n{line}\n", **{"best_config.json": json.dumps({"epochs": 3, "source": source})})
    uris = [new_uri(), new_uri()]  # the second has never heard of it
    for uri, wiped in [(uris[0], False), (uris[0], True), (uris[1], False)]:
        if wiped:
            for run in Runs(uri).by_id.values():
                Runs(uri).client.delete_run(run.info.run_id)
        runs = sync(finished, uri)
        run_id = runs["parent"].info.run_id
        config = json.loads(runs.text("parent", "best_config.json"))
        assert config == {"epochs": 3, "source": {"trial_id": "01", "run_id": run_id, "tracking_uri": uri}}
        load = f'load_config("runs:/{run_id}/best_config.json", tracking_uri="{uri}")'
        expected = f"# Answer\nconfig = accumtune.{load}\n"
        assert runs.text("parent", "note.md") == expected
        assert runs["parent"].data.tags["mlflow.note.content"] == expected
        assert runs["parent"].data.tags["accumtune.best_run_id"] == runs["01"].info.run_id


def test_what_is_left_after_one_run_was_deleted_names_its_successor(finished, uri):
    report(finished, **{"best_config.json": json.dumps({"source": {"trial_id": "01"}})})
    before = sync(finished, uri)
    for name in ("parent", "01"):
        before.client.delete_run(before[name].info.run_id)
        after = sync(finished, uri)
        assert after[name].info.run_id != before[name].info.run_id
        parent = after["parent"]
        assert parent.data.tags["accumtune.best_run_id"] == after["01"].info.run_id
        children = [run for key, run in after.by_id.items() if key != "parent"]
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}


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

    from accumtune.tracking.mlflow import tracker as module

    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.2)
    with open(finished.folder / "tracking.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrackingError, match="Another process"):
            Tracker(finished.folder, uri).sync()
    Tracker(finished.folder, uri).sync()
