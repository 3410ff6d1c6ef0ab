"""Features of Keras Tuner that work as before: oracles, objectives, callbacks, conditions, Hyperband, pruning."""

import time

import keras
import keras_tuner
import numpy as np
import optuna
import pytest
from models import data, dense

import accumtune
from accumtune.errors import SearchDirectoryError
from accumtune.tracking.journal import Journal

X, Y = data()
COMMON = {
    "memory_budget": "16MiB", "micro_batch_sizes": (4, 8), "accumulation_steps": (1, 2), "tracking_uri": False,
    "project_name": "search",
}  # fmt: skip


def search(tuner, epochs=2, **kwargs):
    tuner.search(X, Y, validation_data=(X, Y), epochs=epochs, verbose=0, **kwargs)
    return tuner


class Alternating(keras_tuner.Oracle):
    """An oracle of the user's own: it knows two proposals."""

    def populate_space(self, trial_id):
        number = len(self.start_order)
        if number >= 2:
            return {"status": "STOPPED"}
        kind = ("relu", "tanh")[number]
        values = {"effective_batch_size": 8, "activation": kind}
        return {"status": "RUNNING", "values": values | ({"width": 16} if kind == "tanh" else {})}


class Conditional(keras_tuner.HyperModel):
    def build(self, hp):
        activation = hp.Choice("activation", ["relu", "tanh"])
        width = 8
        with hp.conditional_scope("activation", ["tanh"]):
            if activation == "tanh":
                width = hp.Int("width", 4, 32)
        model = keras.Sequential(
            [keras.Input((16,)), keras.layers.Dense(width, activation), keras.layers.Dense(1, "sigmoid")]
        )
        model.compile(keras.optimizers.SGD(0.01), "binary_crossentropy", metrics=["accuracy"])
        return model


def test_any_oracle_conditions_callbacks_and_an_objective_to_maximise(tmp_path):
    def make():
        oracle = Alternating(objective=keras_tuner.Objective("val_accuracy", "max"), max_trials=5, seed=1)
        scaling = {"learning_rate_scaling": "sqrt", "base_effective_batch_size": 8}
        return accumtune.Tuner(oracle, Conditional(), directory=tmp_path, **scaling, **COMMON)

    # Its patience ends after the second epoch at the latest: nothing gets better by so much.
    stop = keras.callbacks.EarlyStopping("val_accuracy", mode="max", min_delta=5.0, patience=1)
    tuner = search(make(), epochs=20, callbacks=[stop])
    trials = tuner.record().with_status("completed")
    assert [trial.hyperparameters["activation"] for trial in trials] == ["relu", "tanh"]
    assert ["width" in trial.hyperparameters for trial in trials] == [False, True]
    assert all(len(trial.epochs) == 2 for trial in trials)
    best = max(trial.objective_value for trial in trials)
    assert tuner.oracle.get_best_trials()[0].score == pytest.approx(best)
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0, return_dict=True)["accuracy"] == pytest.approx(best, abs=1e-6)
    config = tuner.get_best_config(tolerance=0)
    assert config.objective["value"] == best and config.base_effective_batch_size == 8
    assert float(config.build(Conditional()).optimizer.learning_rate) == pytest.approx(0.01)  # that of its base


class ReturnsANumber(keras_tuner.HyperModel):
    """Its objective is what `fit` returns, smaller being better."""

    def build(self, hp):
        return dense(learning_rate=hp.Choice("learning_rate", [0.1, 0.3]))

    def fit(self, hp, model, *args, **kwargs):
        model.fit(*args, **kwargs)
        return 100 * hp.get("learning_rate") + (hp.get("effective_batch_size") == 4)


@pytest.mark.slow
def test_an_objective_that_fit_returns(tmp_path):
    tuner = accumtune.GridSearch(ReturnsANumber(), directory=tmp_path, max_trials=None, **COMMON)
    search(tuner, epochs=1)
    values = {(t.effective_batch_size, t.hyperparameters["learning_rate"]): t.objective_value
              for t in tuner.record().with_status("completed")}  # fmt: skip
    expected = {(4, 0.1): 11, (8, 0.1): 10, (16, 0.1): 10, (4, 0.3): 31, (8, 0.3): 30, (16, 0.3): 30}
    assert values == pytest.approx(expected)
    assert tuner.get_best_config().objective["value"] == pytest.approx(10)
    assert tuner.oracle.get_best_trials()[0].score == pytest.approx(10)


def test_rare_validations_and_an_objective_of_two_metrics(tmp_path):
    """The best epoch is one that validated, its weights are kept, and the configuration reproduces the sum."""

    def make(*objectives):
        arguments = {**COMMON, "micro_batch_sizes": (4,), "accumulation_steps": (2,)}
        return accumtune.RandomSearch(
            build_accurate, objective=list(objectives), max_trials=1, seed=1, directory=tmp_path, **arguments
        )

    tuner = search(make("val_loss", keras_tuner.Objective("val_accuracy", "max")), epochs=3, validation_freq=2)
    (trial,) = tuner.record().with_status("completed")
    (logs,) = [epoch.logs for epoch in trial.epochs if "val_loss" in epoch.logs]
    assert trial.best_epoch == 1 and trial.objective_value == logs["val_loss"] - logs["val_accuracy"]
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0, return_dict=True)["loss"] == pytest.approx(logs["val_loss"], rel=1e-5)
    config = accumtune.TrainingConfig.from_json(tuner.get_best_config().to_json())
    assert config.objective["terms"] == {"val_loss": "min", "val_accuracy": "max"}
    assert config.reproduce(build_accurate, X, Y, validation_data=(X, Y)).holds(1e-5, peak_tolerance=0.5)
    with pytest.raises(SearchDirectoryError, match="objective's terms"):
        search(make("val_loss", "val_accuracy", "loss"), epochs=3, validation_freq=2)


def build_accurate(hp):
    model = dense()
    model.compile(model.optimizer, model.loss, metrics=["accuracy"])
    return model


def build_unscaled(hp):
    return dense(width=hp.Choice("width", [4, 8]))


@pytest.mark.slow
def test_advice_is_given_once_also_when_the_search_is_resumed(tmp_path, capsys):
    for trials in (1, 2):
        tuner = accumtune.RandomSearch(
            build_unscaled, objective="val_loss", max_trials=trials, seed=1, directory=tmp_path, **COMMON
        )
        tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=2)
    printed = capsys.readouterr().out
    assert printed.count("learning rate is neither tuned nor scaled") == 1
    assert len(tuner.record().advice) == 1


def build_momentum(hp):
    model = dense(learning_rate=0.02)
    model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 0.005, 0.02)), model.loss)
    return model


@pytest.mark.slow
def test_a_promoted_trial_goes_on_exactly_where_it_was_optimizer_and_all(tmp_path):
    arguments = {**COMMON, "micro_batch_sizes": (4,), "accumulation_steps": (2,)}
    tuner = accumtune.Hyperband(
        build_momentum, objective="val_loss", max_epochs=2, factor=2, seed=2, directory=tmp_path, **arguments
    )
    search(tuner, shuffle=False, callbacks=[keras.callbacks.EarlyStopping("val_loss", patience=50)])
    trials = {trial.trial_id: trial for trial in tuner.record().with_status("completed")}
    promoted = [trial for trial in trials.values() if trial.hyperparameters.get("tuner/trial_id")]
    assert promoted
    trial = promoted[0]
    source = trials[trial.hyperparameters["tuner/trial_id"]]
    assert source.best_epoch == len(source.epochs) - 1  # its best weights are its last
    hp = keras_tuner.HyperParameters()
    hp.values["learning_rate"] = trial.hyperparameters["learning_rate"]
    keras.utils.set_random_seed(tuner.oracle.seed)
    count = source.epochs[-1].epoch + 1 + len(trial.epochs)
    fitted = build_momentum(hp).fit(X, Y, batch_size=8, epochs=count, shuffle=False, validation_data=(X, Y), verbose=0)
    reported = [epoch.logs["val_loss"] for epoch in (*source.epochs, *trial.epochs)]
    assert reported == pytest.approx(fitted.history["val_loss"], rel=1e-4)


class Slow(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        time.sleep(0.3)


def build_hopeless_or_not(hp):
    return dense(learning_rate=hp.Choice("learning_rate", [0.3, 1e-9], ordered=False))


def test_a_hopeless_trial_is_stopped_and_counts_as_trained(tmp_path):
    def make(trials):
        return accumtune.OptunaSearch(
            build_hopeless_or_not, objective="val_loss", max_trials=trials, seed=1, directory=tmp_path,
            pruner=optuna.pruners.ThresholdPruner(upper=0.6, n_warmup_steps=2), workers=2,
            **{**COMMON, "micro_batch_sizes": (4,), "accumulation_steps": (1,)},
        )  # fmt: skip

    tuner = search(make(2), epochs=12, callbacks=[Slow()])
    trials = {trial.hyperparameters["learning_rate"]: trial for trial in tuner.record().trials}
    good, hopeless = trials[0.3], trials[1e-9]
    assert good.status == hopeless.status == "completed" and not good.reason
    assert len(good.epochs) == 12 and 3 <= len(hopeless.epochs) < 12
    assert hopeless.reason.startswith(f"pruned after epoch {len(hopeless.epochs)}")
    assert hopeless.objective_value == min(epoch.logs["val_loss"] for epoch in hopeless.epochs)
    assert tuner.get_best_config().hyperparameters["learning_rate"] == 0.3
    # The same script again: both have been trained, nothing is left.
    again = search(make(2), epochs=12, callbacks=[Slow()])
    for trial in again.record().trials:
        assert sum(event["event"] == "started" for event in Journal(trial.folder / "journal.jsonl").events()) == 1


def test_executions_are_processes_and_the_best_of_them_is_kept(tmp_path):
    arguments = {**COMMON, "micro_batch_sizes": (4,), "accumulation_steps": (1,)}
    tuner = accumtune.RandomSearch(
        dense_model, objective="val_loss", max_trials=1, seed=1, directory=tmp_path, executions_per_trial=3, **arguments
    )
    search(tuner)
    (trial,) = tuner.record().trials
    best = [min(e.logs["val_loss"] for e in trial.epochs if e.execution == number) for number in range(3)]
    assert len(set(best)) == 3 and trial.objective_value == pytest.approx(np.mean(best), rel=1e-6)
    assert trial.updates == 3 * 2 * len(X) // 4
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(min(best), rel=1e-4)


def dense_model(hp):
    return dense()
