"""A search that is killed at any write and resumed has lost nothing and trained nothing twice.

The oracles, session, runner and journals are real; the executor trains nothing, so that every moment can be tested.
`experiments/stress/crash.py` kills real searches at random moments.
"""

import json
from collections import Counter
from concurrent.futures import Future

import keras_tuner
import pytest

from accumtune.errors import SearchDirectoryError, SearchError, SearchFailedError
from accumtune.execution.executors import Outcome
from accumtune.execution.profiling import ModelFacts
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.oracles import state_files
from accumtune.oracles.freeze_thaw_oracle import FreezeThawOracle
from accumtune.oracles.persistent_oracle import make_persistent
from accumtune.search.pruning.trial_curves import trial_curves
from accumtune.search.scheduler import Scheduler
from accumtune.search.session.console import Console
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.tracking.journal import Journal, read_search
from accumtune.worker.transport import task_directory as directories
from accumtune.worker.transport.hyperparameters import appeared
from accumtune.worker.transport.task_directory import SearchDirectory

TRIALS = 4
EPOCHS = 2


SEARCHED = ("effective_batch_size", "learning_rate")


class Killed(BaseException):
    """Nothing in accumtune may handle it, as nothing handles a SIGKILL."""


class Countdown:
    """Ends the search before its n-th durable write."""

    def __init__(self, monkeypatch):
        self.left = None
        self.writes = 0
        monkeypatch.setattr(directories.os, "fsync", lambda descriptor: None)  # this test's disk does not fail
        write, append = directories.write_atomically, Journal.append
        for module in (directories, state_files):
            monkeypatch.setattr(module, "write_atomically", lambda *args: self.tick() or write(*args))
        monkeypatch.setattr(Journal, "append", lambda *args, **fields: self.tick() or append(*args, **fields))

    def tick(self):
        self.writes += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class Profiles:
    def profile(self, space):
        points = [Measurement(size, 1, 1000 * size, 0.01 * size, "made") for size in (4, 8)]
        return Profile(tuple(points), "CPU", "made", signature="s")

    def inspect(self, space):
        """Of a build function that asks for one more hyperparameter at one of the rates."""
        hp = keras_tuner.HyperParameters.from_config(dict(space))
        known, names = len(hp.space), set(hp.values)
        if hp.get("learning_rate") == 0.1:
            hp.Choice("momentum", [0.5, 0.9])
        values = {name: value for name, value in hp.values.items() if name not in names}
        appeared = {"space": hp.get_config()["space"][known:], "values": values}
        parameters = 1000 if hp.get("learning_rate") == 0.1 else 100
        return ModelFacts("s", "CPU", 0, 0, (), "float32", None, appeared, parameters=parameters)

    def learn(self, signature, measurement):
        pass


class Trainings:
    """Reports as a trial's process does, and counts what it has done to the end."""

    backend = "tensorflow"

    def __init__(self, failing=()):
        self.finished = Counter()
        self.saved = Counter()  # epochs of paused trials
        self.failing = failing

    def submit(self, directory, *args, **kwargs):
        _, arguments = directory.read_task()
        hp = keras_tuner.HyperParameters.from_config(arguments["hyperparameters"])
        values = dict(hp.values)
        journal = Journal(directory.journal_file)
        journal.append("started", attempt=arguments["attempt"], pid=1, device="CPU", memory_source="made")
        if values["learning_rate"] == 0.3:  # one more, that is asked for in `fit`
            values["patience"] = hp.Choice("patience", [1, 2])
            journal.append("appeared", **appeared(hp, arguments["hyperparameters"]))
        loss = values["learning_rate"] + values["effective_batch_size"]
        begun = self.saved[directory.path.name]
        epochs = min(max(arguments.get("pause_after", EPOCHS), begun + 1), EPOCHS)
        for epoch in range(epochs):
            journal.append("epoch", attempt=arguments["attempt"], execution=0, epoch=epoch, logs={"val_loss": loss})
        if epochs < EPOCHS:
            self.saved[directory.path.name] = epochs
        if values["learning_rate"] in self.failing:
            outcome = {"status": "failed", "reason": "boom"}
        else:
            result = {
                "metrics": {"val_loss": loss}, "best_epoch": 1, "peak_memory_bytes": 4000, "memory_source": "made",
                "device": "CPU", "seconds_per_update": 0.01, "throughput_samples_per_second": 100.0, "updates": 2,
                "training_seconds": 0.1, "precision_policy": "float32",
                "paused_after_epochs": epochs if epochs < EPOCHS else None,
            }  # fmt: skip
            outcome = {"status": "completed", "result": result}
        directory.write_outcome(outcome)
        assert ("momentum" in values) or values["learning_rate"] != 0.1
        trained = {name: values.get(name) for name in (*SEARCHED, "momentum", "patience")}
        for epoch in range(begun, epochs):
            key = json.dumps({**trained, "epoch": epoch})
            self.finished[directory.path.name, key] += outcome["status"] == "completed"
        future = Future()
        future.set_result(Outcome(**outcome))
        return future

    def close(self):
        pass


ORACLES = {
    "random": lambda space: keras_tuner.oracles.RandomSearchOracle("val_loss", TRIALS, seed=3, hyperparameters=space),
    "bayesian": lambda space: keras_tuner.oracles.BayesianOptimizationOracle(
        "val_loss", TRIALS, num_initial_points=2, seed=3, hyperparameters=space
    ),
    "grid": lambda space: keras_tuner.oracles.GridSearchOracle("val_loss", TRIALS, hyperparameters=space),
    "hyperband": lambda space: keras_tuner.oracles.HyperbandOracle(
        "val_loss", max_epochs=4, factor=2, seed=3, hyperparameters=space
    ),
    "freeze-thaw": lambda space: FreezeThawOracle(
        objective="val_loss", max_trials=TRIALS, seed=3, hyperparameters=space
    ),
}

EVERY = {"random": 1, "grid": 1, "bayesian": 19, "hyperband": 5, "freeze-thaw": 17}


def session(folder, kind, trainings, workers=1, **settings):
    """What `Tuner.search` puts together, loaded from the folder where there is something."""
    space = keras_tuner.HyperParameters()
    space.Choice("effective_batch_size", [4, 8, 16], ordered=True)
    space.Choice("micro_batch_size", [4, 8], ordered=True)
    space.Choice("learning_rate", [0.1, 0.2, 0.3])
    oracle = ORACLES[kind](space)
    oracle._set_project_dir(str(folder.parent), folder.name)
    oracle = make_persistent(oracle)
    oracle.verbose = 0
    state_files.repair_state_files(folder)
    if (folder / "oracle.json").exists():
        oracle.reload()
    oracle.save()
    settings = TrialSettings(None, (4, 8), True, False, 1, 3, "val_loss", None, **settings)
    files = SearchDirectory(folder)
    if kind == "freeze-thaw":
        oracle.epochs, oracle.curve_of = EPOCHS, trial_curves(files, oracle.objective)
    console = Console("val_loss", oracle.max_trials, 0)
    runner = TrialRunner(settings, files, trainings, Profiles())
    return oracle, Scheduler(oracle, runner, files, console, workers=workers)


def told(folder):
    return {t.trial_id: (t.status, dict(t.hyperparameters), t.objective_value) for t in read_search(folder).trials}


@pytest.mark.parametrize("kind", ORACLES)
def test_killed_before_any_write_a_search_comes_to_the_same_end(kind, tmp_path, monkeypatch):
    countdown = Countdown(monkeypatch)
    failing = (0.2,) if kind == "random" else ()
    session(tmp_path / "whole" / "s", kind, Trainings(failing))[1].run()
    expected = told(tmp_path / "whole" / "s")
    assert Counter(status for status, *_ in expected.values())["completed"] >= 2
    writes = countdown.writes
    for moment in range(0, writes, EVERY[kind]):
        folder = tmp_path / f"{moment}" / "s"
        trainings = Trainings(failing)
        countdown.left = moment
        with pytest.raises(Killed):
            session(folder, kind, trainings)[1].run()
        completed = {t.trial_id: t.objective_value for t in read_search(folder).with_status("completed")}
        countdown.left = None
        oracle, resumed = session(folder, kind, trainings)
        resumed.run()
        assert max(trainings.finished.values()) == 1, f"trained twice after write {moment}"
        if kind != "hyperband":  # which continues an earlier training
            assert len({values for _, values in trainings.finished}) == len(trainings.finished), moment
        assert len(oracle.end_order) == len(set(oracle.end_order)) == len(oracle.trials), moment
        assert not oracle.ongoing_trials and {t.status for t in oracle.trials.values()} <= {"COMPLETED", "FAILED"}
        now = told(folder)
        assert {name: now[name][2] for name in completed} == completed, moment
        if kind in ("random", "grid"):  # the others may draw anew
            assert now == expected, moment


@pytest.mark.parametrize("name", ["oracle.json", "trial_1/trial.json", "tuner0.json"])
@pytest.mark.parametrize("kind", ["random", "grid"])
def test_a_truncated_file_is_repaired_and_nothing_is_trained_again(name, kind, tmp_path):
    trainings = Trainings()
    folder = tmp_path / "s"
    journal = Journal(folder / "search.jsonl")
    tuner = {"search_over": "pairs", "batch_coupled_layers": [], "whole_batch_loss": True, "ghost_batch_size": 8}
    tuner["own_train_step"] = "mean"
    journal.append("search_started", search_id="x", **tuner, identity={"validation_batch_size": "8"})
    tuner["has_own_test_step"] = True
    session(folder, kind, trainings)[1].run()
    state_files.write_state(folder / "tuner0.json", tuner)
    before, original = told(folder), json.loads((folder / name).read_text())
    with open(folder / name, "r+") as file:
        file.truncate(len(file.read()) // 2)
    (line,) = state_files.repair_state_files(folder)
    assert name in line and (folder / f"{name}.broken").exists()
    if name == "trial_1/trial.json":
        repaired = json.loads((folder / name).read_text())
        for key in ("trial_id", "status", "score", "best_step"):
            assert repaired[key] == original[key]
        assert repaired["hyperparameters"]["values"] == original["hyperparameters"]["values"]
    if name == "tuner0.json":
        assert json.loads((folder / name).read_text()) == original
    oracle, resumed = session(folder, kind, trainings)
    resumed.run()
    assert told(folder) == before and max(trainings.finished.values()) == 1
    assert set(oracle.end_order) == set(oracle.trials)


def test_what_cannot_be_repaired_is_named(tmp_path):
    folder = tmp_path / "s"
    session(folder, "random", Trainings())[1].run()
    for name in ("oracle.json", ".oracle.json.previous", "oracle.changes.jsonl"):
        (folder / name).write_text("{")
    with pytest.raises(SearchDirectoryError, match="oracle.json.*cannot be read"):
        state_files.repair_state_files(folder)
    assert (folder / "oracle.json").read_text() == "{"


@pytest.mark.parametrize("kind", ORACLES)
def test_a_hyperparameter_that_appears_later_is_searched_from_then_on(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TRIALS", 4 if kind in ("bayesian", "freeze-thaw") else 40)
    folder = tmp_path / "s"
    oracle, whole = session(folder, kind, Trainings())
    whole.run()
    ran = [values for _, values, _ in told(folder).values()]
    found = {values.get(name) for values in ran for name in ("momentum", "patience")}
    # Four trials, where a Gaussian process takes seconds for each; eleven of Hyperband.
    assert found & {0.9, 2} or kind in ("bayesian", "freeze-thaw")
    if kind in ("random", "grid"):
        assert {values["momentum"] for values in ran if values["learning_rate"] == 0.1} == {0.5, 0.9}
        assert {values["patience"] for values in ran if values["learning_rate"] == 0.3} == {1, 2}
    if kind == "grid":
        for rate, name in ((0.1, "momentum"), (0.3, "patience")):
            assert len({(v["effective_batch_size"], v[name]) for v in ran if v["learning_rate"] == rate}) == 3 * 2
    # Keras Tuner, and the search that goes on, know them too.
    assert {"momentum", "patience"} <= {hp.name for hp in oracle.hyperparameters.space}
    again, _ = session(folder, kind, Trainings())
    assert again.hyperparameters.get_config()["space"] == oracle.hyperparameters.get_config()["space"]


def test_a_search_ends_where_all_there_is_was_trained(tmp_path, monkeypatch):
    """Without coupled layers, micro-batches 4 and 8 are one training: half of the proposals were trained before."""
    monkeypatch.setattr(f"{__name__}.TRIALS", 100)
    session(tmp_path / "s", "random", Trainings())[1].run()
    statuses = Counter(status for status, *_ in told(tmp_path / "s").values())
    assert statuses["completed"] < 48 and 0 < statuses["reused"] < 48


@pytest.mark.parametrize("setting", ["allow_new_entries", "tune_new_entries"])
def test_settings_for_new_hyperparameters_hold(setting, tmp_path):
    oracle, whole = session(tmp_path / "s", "random", Trainings())
    setattr(oracle, setting, False)
    if setting == "allow_new_entries":
        with pytest.raises(SearchError, match="momentum.*\n.*\nFix: "):
            whole.run()
        return
    whole.run()
    ran = [values for _, values, _ in told(tmp_path / "s").values()]
    assert {values["momentum"] for values in ran if values["learning_rate"] == 0.1} == {0.5}
    assert "momentum" not in {hp.name for hp in oracle.hyperparameters.space}


def test_models_above_max_model_size_are_not_trained(tmp_path):
    session(tmp_path / "s", "grid", Trainings(), max_model_size=500)[1].run()
    trials = told(tmp_path / "s").values()
    assert {status for status, values, _ in trials if values["learning_rate"] == 0.1} == {"infeasible"}
    assert {status for status, values, _ in trials if values["learning_rate"] != 0.1} == {"completed"}
    with pytest.raises(SearchFailedError, match="1,000 parameters are more than max_model_size=50"):
        session(tmp_path / "none", "random", Trainings(), max_model_size=50)[1].run()


@pytest.mark.parametrize("trials", [1, 2])
def test_a_search_whose_few_trials_all_failed_raises_also_when_run_again(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TRIALS", trials)
    for _ in range(2):
        with pytest.raises(SearchFailedError, match="boom"):
            session(tmp_path / "s", "random", Trainings(failing=(0.1, 0.2, 0.3)))[1].run()
    assert len(told(tmp_path / "s")) == trials
