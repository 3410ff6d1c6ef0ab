"""A store while its search is running, or is stopped and resumed."""

from made_search import report
from stored_runs import Runs, sync, wait_until

from accumtune.tracking.mlflow.tracker import Tracker


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
