"""Searches from one end to the other: real processes, real training, every way a trial can end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from models import build_coupled, build_fixed, build_nothing, build_plain, build_uncompiled, build_wide, data, dense

import accumtune
from accumtune import errors
from accumtune.tracking.journal import Journal, read_search

X, Y = data()
pytestmark = pytest.mark.usefixtures("one_fork_server")


def make(tmp_path, kind=accumtune.RandomSearch, build=build_plain, **kwargs):
    defaults = {
        "objective": "val_loss", "memory_budget": "16MiB", "micro_batch_sizes": (4, 8), "accumulation_steps": (1, 2),
        "tracking_uri": False, "directory": tmp_path, "project_name": "search",
    }  # fmt: skip
    if kind is not accumtune.Hyperband:
        defaults |= {"max_trials": 3, "seed": 1}
    return kind(build, **{**defaults, **kwargs})


def search(tuner, epochs=2, **kwargs):
    tuner.search(X, Y, validation_data=(X, Y), epochs=epochs, verbose=0, **kwargs)
    return tuner


def test_a_search_trains_different_things_within_the_budget_and_resumes(tmp_path):
    tuner = search(make(tmp_path, max_trials=3))
    record = tuner.record()
    trials = record.with_status("completed")
    assert len(trials) == 3 and record.status == "finished"
    for trial in trials:
        assert trial.effective_batch_size == trial.micro_batch_size * trial.accumulation_steps
        assert trial.effective_batch_size in (4, 8, 16)
        assert 0 < trial.peak_memory_bytes <= 16 * 2**20
        assert trial.throughput_samples_per_second > 0
        assert [epoch.epoch for epoch in trial.epochs] == [0, 1]
        assert min(epoch.logs["val_loss"] for epoch in trial.epochs) == pytest.approx(trial.objective_value)
    best = tuner.get_best_hyperparameters()[0].values
    assert {"effective_batch_size", "micro_batch_size", "accumulation_steps", "learning_rate"} == set(best)

    model = tuner.get_best_models()[0]
    best_value = min(trial.objective_value for trial in trials)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(best_value, rel=1e-4)

    config = tuner.get_best_config()
    assert config.hyperparameters == best and config.objective["value"] == pytest.approx(best_value)
    assert config.fit_arguments()["batch_size"] == best["effective_batch_size"]
    assert tuner.pareto_front()
    assert any(not candidate.is_trained for candidate in tuner.candidates())

    # The same script again: nothing is trained twice, and a larger search goes on where it was.
    again = search(make(tmp_path, max_trials=4))
    assert len(again.record().with_status("completed")) == 4
    for trial in again.record().trials[:3]:
        assert sum(event["event"] == "started" for event in Journal(trial.folder / "journal.jsonl").events()) == 1


def test_seed_zero_is_a_seed(tmp_path):
    """Keras Tuner takes it for none."""
    tuners = [make(tmp_path, kind, seed=0, project_name=f"{kind.__name__}{number}")
              for kind in (accumtune.RandomSearch, accumtune.OptunaSearch) for number in range(2)]  # fmt: skip
    assert len({tuner.oracle.seed for tuner in tuners}) == 1
    proposals = [tuner.oracle.create_trial("tuner0").hyperparameters.values for tuner in tuners]
    assert proposals[0] == proposals[1] and proposals[2] == proposals[3]
    stock = [keras_tuner.oracles.RandomSearchOracle(objective="val_loss", seed=0) for _ in range(5)]
    assert len({oracle.seed for oracle in stock}) > 1


def test_data_are_read_from_disk_and_do_not_stay_there(tmp_path):
    search(make(tmp_path, max_trials=1))
    assert not (tmp_path / "search" / "data").exists()
    assert (tmp_path / "search" / "trial_0" / "log.txt").exists()


def test_a_trial_trains_as_plain_keras_would_by_hand(tmp_path):
    """Isolation, memory maps and accumulation change nothing: the same seed gives the same loss."""
    tuner = search(make(tmp_path, build=build_fixed, max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(4,)))
    trial = tuner.record().trials[0]
    assert (trial.micro_batch_size, trial.accumulation_steps) == (4, 4)
    keras.utils.set_random_seed(tuner.oracle.seed)
    history = dense().fit(X, Y, batch_size=16, epochs=2, validation_data=(X, Y), verbose=0).history
    reported = [epoch.logs["val_loss"] for epoch in trial.epochs]
    assert reported == pytest.approx(history["val_loss"], rel=1e-5)


class Misbehaving(keras_tuner.HyperModel):
    """Trials that end in every way there is; in the probes they behave."""

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


def test_one_effective_batch_is_trained_once_also_where_pairs_are_searched(tmp_path):
    tuner = make(
        tmp_path, accumtune.GridSearch, build_fixed, max_trials=None, search_over="pairs", micro_batch_sizes=(4, 8)
    )
    record = search(tuner).record()
    trained = [trial.effective_batch_size for trial in record.with_status("completed")]
    assert sorted(trained) == [4, 8, 16]
    reused = record.with_status("reused")
    assert len(reused) == 3
    sources = {trial.trial_id: trial for trial in record.with_status("completed")}
    for trial in reused:
        assert sources[trial.reused_from].effective_batch_size == trial.effective_batch_size
        assert trial.objective_value == sources[trial.reused_from].objective_value


def test_a_search_ends_where_there_is_nothing_new_to_train(tmp_path):
    tuner = make(
        tmp_path, accumtune.BayesianOptimization, build_plain, max_trials=10, num_initial_points=1,
        micro_batch_sizes=(4,), accumulation_steps=(1,),
    )  # fmt: skip
    record = search(tuner, epochs=1).record()
    rates = [trial.hyperparameters["learning_rate"] for trial in record.with_status("completed")]
    assert sorted(rates) == [0.1, 0.3] and record.status == "finished"
    assert all(trial.reused_from for trial in record.with_status("reused"))


def test_executions_of_a_trial_are_averaged_and_do_not_add_up_in_memory(tmp_path):
    def build(hp):
        return dense(width=2**15)  # its parameters are most of what it takes

    once = search(make(tmp_path, build=build, max_trials=1, project_name="once")).record().trials[0]
    tuner = make(tmp_path, build=build, max_trials=1, project_name="thrice", executions_per_trial=3)
    (trial,) = search(tuner).record().trials
    assert {epoch.execution for epoch in trial.epochs} == {0, 1, 2} and len(trial.epochs) == 6
    best = [min(e.logs["val_loss"] for e in trial.epochs if e.execution == execution) for execution in range(3)]
    assert trial.objective_value == pytest.approx(np.mean(best), rel=1e-6)
    assert trial.peak_memory_bytes <= 1.2 * once.peak_memory_bytes


def test_batch_coupled_models_search_pairs_and_say_so(tmp_path):
    tuner = make(tmp_path, accumtune.GridSearch, build_coupled, max_trials=None)
    assert tuner.search_over == "pairs" and tuner.batch_coupled_layers
    search(tuner)
    record = tuner.record()
    pairs = {(trial.micro_batch_size, trial.accumulation_steps) for trial in record.with_status("completed")}
    assert pairs == {(4, 1), (4, 2), (8, 1), (4, 4), (8, 2)}
    assert any("micro-batch" in text for text in record.advice)


def test_models_too_large_for_the_budget_are_replaced_and_do_not_count(tmp_path):
    record = search(make(tmp_path, build=build_wide, max_trials=3)).record()
    assert len(record.with_status("completed")) == 3
    assert all(trial.hyperparameters["width"] == 8 for trial in record.with_status("completed"))
    for trial in record.with_status("infeasible"):
        assert trial.hyperparameters["width"] == 2**20 and "micro-batch 1" in trial.reason


@pytest.mark.parametrize("kind", [accumtune.RandomSearch, accumtune.GridSearch])
def test_a_budget_in_which_nothing_fits(tmp_path, kind):
    def build(hp):
        return dense(width=2**20)

    with pytest.raises(errors.BudgetTooSmallError, match="16.0 MiB"):
        search(make(tmp_path, kind, build=build))


def test_a_grid_that_begins_with_what_does_not_fit_goes_on(tmp_path):
    def build(hp):
        return dense(width=hp.Choice("width", [2**20, 8]))

    grid = {"micro_batch_sizes": (4,), "accumulation_steps": (1, 2), "max_trials": None}
    record = search(make(tmp_path, accumtune.GridSearch, build, **grid), epochs=1).record()
    endings = [(trial.status, trial.hyperparameters["width"]) for trial in record.trials]
    assert sorted(endings) == sorted([("infeasible", 2**20), ("completed", 8)] * 2)
    assert endings[0] == ("infeasible", 2**20)


def test_hyperband_goes_on_from_earlier_weights(tmp_path):
    tuner = make(tmp_path, accumtune.Hyperband, max_epochs=4, factor=2, seed=2)
    search(tuner)
    promoted = [trial for trial in tuner.record().trials if trial.hyperparameters.get("tuner/trial_id")]
    assert promoted
    for trial in promoted:
        source = next(t for t in tuner.record().trials if t.trial_id == trial.hyperparameters["tuner/trial_id"])
        assert source.effective_batch_size == trial.effective_batch_size
        assert trial.epochs[0].epoch == trial.hyperparameters["tuner/initial_epoch"] > 0
        assert trial.epochs[0].logs["loss"] < source.epochs[0].logs["loss"]
    assert all(not name.startswith("tuner/") for name in tuner.get_best_config().hyperparameters)


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
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_search(tmp_path / "search").with_status("completed")) >= 2:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    completed = read_search(tmp_path / "search").with_status("completed")
    before = {trial.trial_id: trial.objective_value for trial in completed}
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    record = read_search(tmp_path / "search")
    assert len(record.with_status("completed")) == 4 and record.status == "finished"
    for trial in record.trials:
        if trial.trial_id in before:
            assert trial.objective_value == before[trial.trial_id]
            started = [e for e in Journal(trial.folder / "journal.jsonl").events() if e["event"] == "started"]
            assert len(started) == 1


def test_ctrl_c_ends_the_trials_at_once_and_the_search_can_go_on(tmp_path):
    script = tmp_path / "script.py"
    text = SCRIPT.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    script.write_text(text.replace("epochs=2", "epochs=100_000").replace("max_trials=4", "max_trials=1"))
    # A shell's background job, as CI may be, ignores SIGINT and so would its children: a terminal's do not.
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
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
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    (trial,) = read_search(tmp_path / "search").trials
    assert trial.status == "completed" and len(trial.epochs) == 2


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"memory_budget": "two gigabytes"}, errors.BudgetError, "two gigabytes"),
        ({"memory_budget": -1}, errors.BudgetError, "-1"),
        ({"micro_batch_sizes": (0, 8)}, errors.BatchSizeError, "micro_batch_sizes"),
        ({"accumulation_steps": ()}, errors.BatchSizeError, "accumulation_steps"),
        ({"search_over": "batches"}, errors.BatchSizeError, "search_over"),
        ({"learning_rate_scaling": "cubic"}, errors.BatchSizeError, "learning_rate_scaling"),
        ({"build": build_uncompiled}, errors.UncompiledModelError, "compile"),
        ({"build": build_nothing}, errors.BuildError, "None"),
    ],
)
def test_bad_input_says_what_came_what_was_expected_and_how_to_mend_it(tmp_path, arguments, error, words):
    with pytest.raises(error) as caught:
        make(tmp_path, **arguments)
    assert isinstance(caught.value, errors.AccumtuneError)
    assert words in str(caught.value)
    assert "Expected:" in str(caught.value) and "Fix:" in str(caught.value)


def test_live_pipelines_and_batch_sizes_are_refused_before_anything_runs(tmp_path):
    import tensorflow as tf

    tuner = make(tmp_path)
    with pytest.raises(errors.UnsendableDataError, match="function"):
        tuner.search(tf.data.Dataset.from_tensor_slices((X, Y)).batch(4), validation_data=(X, Y))
    with pytest.raises(errors.SearchError, match="batch_size"):
        tuner.search(X, Y, validation_data=(X, Y), batch_size=32)
    with pytest.raises(errors.SearchError, match="validation_data"):
        tuner.search(X, Y)
    assert not list((tmp_path / "search").glob("trial_*"))


def test_pipelines_from_functions_are_cut_to_the_effective_batch(tmp_path):
    def train():
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)

    tuner = make(tmp_path, build=build_fixed, max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(4,))
    tuner.search(train, validation_data=train, epochs=2, verbose=0)
    trial = tuner.record().trials[0]
    updates = [e for e in Journal(trial.folder / "journal.jsonl").events() if e["event"] == "ended"][0]["updates"]
    assert updates == 2 * len(X) // 16
    keras.utils.set_random_seed(tuner.oracle.seed)
    history = dense().fit(X, Y, batch_size=16, epochs=2, shuffle=False, validation_data=(X, Y), verbose=0).history
    assert [epoch.logs["val_loss"] for epoch in trial.epochs] == pytest.approx(history["val_loss"], rel=1e-5)


def test_a_corrupt_search_directory_is_named_and_nothing_is_lost(tmp_path):
    search(make(tmp_path, max_trials=1))
    # From one of the others, the first would be repaired.
    for name in ("oracle.json", ".oracle.json.previous", "oracle.changes.jsonl"):
        file = tmp_path / "search" / name
        file.write_text(file.read_text()[:40])
    with pytest.raises(errors.SearchDirectoryError, match="oracle.json") as caught:
        make(tmp_path)
    assert "overwrite=True" in str(caught.value)
    assert read_search(tmp_path / "search").with_status("completed")
    assert json.loads(json.dumps(read_search(tmp_path / "search").objective_name)) == "val_loss"
    make(tmp_path, overwrite=True)


@pytest.mark.parametrize("memory_budget", [None, "16MiB"])
def test_a_stock_keras_tuner_accepts_the_hypermodel(tmp_path, memory_budget):
    hypermodel = accumtune.AccumulationHyperModel(
        build_plain, memory_budget=memory_budget, micro_batch_sizes=(4, 8), accumulation_steps=(1, 2)
    )
    tuner = keras_tuner.RandomSearch(
        hypermodel, objective="val_loss", max_trials=2, seed=1, directory=tmp_path, project_name="stock"
    )
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0)
    values = tuner.get_best_hyperparameters()[0].values
    assert values["micro_batch_size"] in (4, 8) and values["accumulation_steps"] in (1, 2)
    assert np.isfinite(tuner.oracle.get_best_trials()[0].score)
