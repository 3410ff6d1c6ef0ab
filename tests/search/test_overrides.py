"""Subclasses of a tuner: every method that may be overridden is called, or refused."""

import keras_tuner
import numpy as np
import pytest
from made_tuner import X, Y, make
from models import build_fixed

import accumtune
from accumtune.errors import SearchError
from accumtune.search.subclassing.overrides import HONOURED_OF_ORACLE, HONOURED_OF_TUNER, refuse_overridden
from accumtune.search.subclassing.own_run_trial import OwnRunTrial
from accumtune.search.trial.trial_result import TrialResult
from accumtune.worker.transport.payload import load_payload
from accumtune.worker.transport.task_directory import SearchDirectory


def public(kind):
    return [name for name in dir(kind) if not name.startswith("_")]


def with_own(base, name):
    return type("Mine", (base,), {name: lambda self, *args, **kwargs: None, "__module__": "script"})


@pytest.mark.parametrize("name", public(keras_tuner.Tuner))
def test_each_method_of_a_tuner_is_honoured_or_refused(name):
    kind = with_own(accumtune.RandomSearch, name)
    if name in HONOURED_OF_TUNER:
        refuse_overridden(kind, keras_tuner.oracles.RandomSearchOracle)
        return
    with pytest.raises(SearchError, match=f"overrides {name}.*\nExpected: .*\nFix: "):
        kind(build_fixed, objective="val_loss")


@pytest.mark.parametrize("name", public(keras_tuner.Oracle))
def test_each_method_of_an_oracle_is_honoured_or_refused(name):
    oracle = with_own(keras_tuner.oracles.RandomSearchOracle, name)
    if name in HONOURED_OF_ORACLE:
        refuse_overridden(accumtune.Tuner, oracle)
        return
    with pytest.raises(SearchError, match=f"overrides {name}.*\nExpected: .*\nFix: "):
        refuse_overridden(accumtune.Tuner, oracle)


def test_what_is_no_method_of_keras_tuner_s_is_the_subclass_s_own():
    assert {*HONOURED_OF_TUNER} <= {*public(keras_tuner.Tuner)}
    assert {*HONOURED_OF_ORACLE} <= {*public(keras_tuner.Oracle)}
    for name in ("_helper", "helper"):
        refuse_overridden(with_own(accumtune.RandomSearch, name), keras_tuner.oracles.RandomSearchOracle)
    with pytest.raises(SearchError, match="_build_and_fit_model"):
        refuse_overridden(with_own(accumtune.Tuner, "_build_and_fit_model"), keras_tuner.Oracle)
    with pytest.raises(SearchError, match="oracle=.invalid"):
        accumtune.Tuner(oracle="invalid", hypermodel=build_fixed)


class Recording(accumtune.RandomSearch):
    """Overrides what a Keras Tuner user overrides, as the guides do."""

    calls: list = []

    def run_trial(self, trial, *args, **kwargs):
        self.calls.append("run_trial")
        kwargs["epochs"] = trial.hyperparameters.Int("passes", 2, 3)
        kept = trial.hyperparameters.Choice("kept", [16, 32])
        (history,) = super().run_trial(trial, X[:kept], Y[:kept], **kwargs)
        assert len(history.history["loss"]) == len(history.epoch) == kwargs["epochs"]
        return {"score": min(history.history["loss"]) + 1}

    def on_search_begin(self):
        self.calls.append("on_search_begin")

    def on_search_end(self):
        self.calls.append(f"on_search_end {len(self.get_best_hyperparameters(9))}")

    def on_trial_begin(self, trial):
        super().on_trial_begin(trial)
        self.calls.append("on_trial_begin")

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        self.calls.append(f"on_trial_end {trial.status} {trial.score > 1}")

    def pre_create_trial(self):
        self.calls.append("pre_create_trial")

    def get_state(self):
        return {"calls": len(self.calls)}

    def set_state(self, state):
        self.calls.append(f"set_state {state['calls'] > 0}")


def test_a_subclass_s_methods_are_called_around_the_trials(tmp_path):
    arguments = {
        "objective": keras_tuner.Objective("score", "min"), "micro_batch_sizes": (4,), "accumulation_steps": (2,),
        "memory_budget": None, "search_over": "pairs", "max_trials": 2,
    }  # fmt: skip
    tuner = make(tmp_path, Recording, build_fixed, **arguments)
    tuner.search(X, Y, verbose=0)
    each = ["pre_create_trial", "on_trial_begin", "run_trial", "on_trial_end COMPLETED True"]
    assert tuner.calls == ["on_search_begin", *each, *each, "pre_create_trial", "on_search_end 2"]
    trials = tuner.record().trials
    for trial, known in zip(trials, tuner.oracle.trials.values(), strict=True):
        assert len(trial.epochs) == trial.hyperparameters["passes"] == known.hyperparameters.values["passes"]
        assert trial.updates == trial.hyperparameters["passes"] * trial.hyperparameters["kept"] // 8
        assert trial.objective_value == known.score > 1
    assert {"passes", "kept"} <= {hp.name for hp in tuner.oracle.get_space().space}
    config = tuner.get_best_config()
    assert config.fit_arguments()["epochs"] == config.hyperparameters["passes"]
    again = make(tmp_path, Recording, build_fixed, **arguments)
    assert again.calls[-1] == "set_state True" and again.search_over == "pairs"


class FakeTrial:
    trial_id = "0"
    hyperparameters = keras_tuner.HyperParameters()


def own(files, run_trial, result=None, given=((X,), {"y": Y, "epochs": 1})):
    trained = []

    def train(trial, overrides, payload_file):
        other = None
        if payload_file is not None:
            payload = load_payload(payload_file)
            other = payload["fit_args"], payload["fit_kwargs"]
        trained.append((dict(overrides), other))
        return result or TrialResult("completed", {"units": 4}, metrics={"val_loss": 2.0})

    runner = OwnRunTrial(
        lambda trial, *args, **kwargs: run_trial(lambda *a, **k: runner.train(trial, a, k), *args, **kwargs),
        dict(zip(("fit_args", "fit_kwargs"), given, strict=True)), keras_tuner.Objective("val_loss", "min"), files,
    )  # fmt: skip
    return lambda overrides=(): runner(FakeTrial(), dict(overrides), train), trained


@pytest.fixture
def files(tmp_path):
    return SearchDirectory(tmp_path)


def test_plain_values_go_on_top_of_the_search_s_and_other_data_instead_of_them(files):
    for changed in ({"y": Y[:8]}, {"callbacks": [1]}):
        run, trained = own(files, lambda train, *a, **k: train(*a, **{**k, **changed}))  # noqa: B023
        assert run().metrics == {"val_loss": 2.0}
        ((overrides, ((x,), everything)),) = trained
        assert overrides == {} and (x == X).all()
        expected = {"y": Y, "epochs": 1, **changed}
        assert everything.keys() == expected.keys()
        assert all(np.array_equal(everything[name], value) for name, value in expected.items())
    run, trained = own(files, lambda train, *a, **k: train(*a, **{**k, "epochs": 7}))
    run()
    assert trained == [({"epochs": 7}, None)]
    run, trained = own(files, lambda train, *a, **k: train(*a, **{**k, "epochs": 7}))
    run({"epochs": 3, "initial_epoch": 1})
    assert trained == [({"epochs": 3, "initial_epoch": 1}, None)]  # Hyperband's own, as in Keras Tuner


@pytest.mark.parametrize(
    "run_trial, words",
    [
        (lambda train, *a, **k: 1.0, "super"),
        (lambda train, *a, **k: [train(*a, **k), train(*a, **k)], "second call"),
        (lambda train, *a, **k: train(*a, **k, batch_size=32), "batch_size=32"),
        (lambda train, *a, **k: [train(*a, **k), "a text"][1], "a text"),
        (lambda train, *a, **k: [train(*a, **k), {"loss": 1.0}][1], "val_loss"),
    ],
)
def test_a_run_trial_that_cannot_be_honoured_is_refused(files, run_trial, words):
    with pytest.raises(SearchError, match=words) as caught:
        own(files, run_trial)[0]()
    assert caught.value.expected and caught.value.fix


def test_endings_of_a_run_trial(files):
    assert own(files, lambda train, *a, **k: [train(*a, **k), 0.5][1])[0]().metrics == {"val_loss": 0.5}
    assert own(files, lambda train, *a, **k: [train(*a, **k), None][1])[0]().metrics == {"val_loss": 2.0}
    failed = TrialResult("failed", {}, reason="boom")
    assert own(files, lambda train, *a, **k: train(*a, **k)[0], failed)[0]() == failed
    raised = own(files, lambda train, *a, **k: train(*a, **k)[5])[0]()
    assert raised.status == "failed" and raised.reason == "run_trial raised IndexError: list index out of range"
