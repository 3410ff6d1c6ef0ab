"""The saved view is created if possible, and not changed again after a user has edited it."""

import base64
import json
import zlib

from accumtune.tracking.journal import read_search
from accumtune.tracking.mlflow.saved_view import view_state
from accumtune.tracking.mlflow.tracker import Tracker


def views(uri, name="made"):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    prefix = "mlflow.sharedViewState."
    found = {key: value for key, value in experiment.tags.items() if key.startswith(prefix)}
    return client, experiment.experiment_id, found


def state_of(value):
    packed = json.loads(value)["state"]
    assert packed.startswith("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;"))))


def test_the_view_shows_what_matters(finished, uri):
    tracker = Tracker(finished.folder, uri)
    tracker.sync()
    _, _, found = views(uri)
    ((key, value),) = found.items()
    assert tracker.ui_address().endswith(key.rpartition(".")[2])
    state = state_of(value)
    for column in ("params.`micro_batch_size`", "metrics.`peak_memory_mib`", "metrics.`best_val_loss`",
                   "metrics.`throughput_samples_per_second`", "tags.`accumtune.status`", "params.`width`"):  # fmt: skip
        assert column in state["selectedColumns"]
    assert finished.search_id in state["searchFilter"] and state["orderByKey"] == "metrics.`best_val_loss`"
    assert {chart["type"] for chart in state["compareRunCharts"]} == {"SCATTER", "PARALLEL", "LINE"}
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= sections


def test_axes_are_only_what_every_completed_trial_has(made):
    made.start()
    made.complete("00", 0)
    made.trial("01").append("proposed", trial_id="01", number=1, hyperparameters={"learning_rate": 1, "depth": 3})
    made.end("01")
    search = read_search(made.folder)
    state = view_state(search, search.trials)
    (parallel,) = [chart for chart in state["compareRunCharts"] if chart["type"] == "PARALLEL"]
    assert "learning_rate" in parallel["selectedParams"] and "depth" not in parallel["selectedParams"]
    assert "params.`depth`" in state["selectedColumns"]


def test_a_view_that_a_person_has_edited_or_deleted_is_left_alone(made, uri):
    made.start()
    made.complete("00", 0)
    Tracker(made.folder, uri).sync()
    client, number, found = views(uri)
    (key,) = found
    client.set_experiment_tag(number, key, "edited")
    made.trial("01").append("proposed", trial_id="01", number=1, hyperparameters={"new": 1})
    Tracker(made.folder, uri).sync()
    assert views(uri)[2] == {key: "edited"}
    client.delete_experiment_tag(number, key)
    tracker = Tracker(made.folder, uri)
    tracker.sync()
    assert views(uri)[2] == {} and tracker.ui_address().endswith("workflowType=machine_learning")


def test_the_view_follows_the_search(made, uri):
    made.start()
    made.complete("00", 0)
    Tracker(made.folder, uri).sync()
    made.trial("01").append("proposed", trial_id="01", number=1, hyperparameters={"new": 1})
    Tracker(made.folder, uri).sync()
    (value,) = views(uri)[2].values()
    assert "params.`new`" in state_of(value)["selectedColumns"]


def test_too_many_hyperparameters_for_a_tag_are_no_error(made, uri):
    made.start()
    many = {f"{'long_name_' * 20}{number}": number for number in range(90)}
    made.trial("00").append("proposed", trial_id="00", number=0, hyperparameters=many)
    Tracker(made.folder, uri).sync()
    (value,) = views(uri)[2].values()
    assert len(value) < 20_000
