"""The oracle that pauses trials, on made learning curves."""

import math

import keras_tuner
import numpy as np
import pytest
from keras_tuner.engine.trial import TrialStatus

from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.oracles import optuna_space
from accumtune.oracles.freeze_thaw_oracle import Curve, FreezeThawOracle
from accumtune.oracles.learning_curves import Coordinates, LearningCurves, Observations, expected_improvement
from accumtune.oracles.persistent_oracle import make_persistent

EPOCHS = 4


def space():
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [2**power for power in range(10)], ordered=True)
    hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    hp.Choice("activation", ["relu", "tanh"])
    return hp


def curve(values):
    """The best rate grows with the root of the batch; slow trainings, those of small rates, begin high."""
    batch = math.log2(values["effective_batch_size"] / 64)
    rate = math.log10(values["learning_rate"] / 3e-3) - 0.5 * batch * math.log10(2)
    end = 1 + 0.02 * batch**2 + 0.3 * rate**2 + 0.1 * (values["activation"] == "tanh")
    return [end * (1 + 0.5 * 10 ** (-0.4 * rate) * (1 / epoch - 1 / EPOCHS)) for epoch in range(1, EPOCHS + 1)]


class Drive:
    """Runs trials as a search would; `of` gives a whole curve, or raises as a training fails."""

    def __init__(self, folder, of=curve, trials=20, direction="min", hp=None):
        self.of, self.curves, self.values, self.order = of, {}, {}, []
        oracle = FreezeThawOracle(
            objective=keras_tuner.Objective("val_loss", direction), max_trials=trials, seed=1,
            hyperparameters=hp or space(), max_consecutive_failed_trials=100,
        )  # fmt: skip
        oracle.verbose = 0
        oracle._set_project_dir(str(folder), "search")
        self.oracle = make_persistent(oracle)
        oracle.epochs, oracle.curve_of = EPOCHS, lambda name: self.curves.get(name, Curve())

    def create(self, tuner_id="tuner0"):
        trial = self.oracle.create_trial(tuner_id)
        return trial if trial.status == TrialStatus.RUNNING else None

    def end(self, trial):
        name = trial.trial_id
        self.values[name] = dict(trial.hyperparameters.values)
        try:
            whole = self.of(self.values[name])
        except ArithmeticError:
            return oracles.end_failed(self.oracle, trial, "it diverged")
        except MemoryError:
            assert oracles.replace_infeasible(self.oracle, trial) is not None
            return self.end(trial)
        epochs = self.oracle.pause_after(name) or EPOCHS
        self.curves[name] = Curve(whole[:epochs], epochs < EPOCHS, epochs)
        self.order.append((name, epochs))
        best = max if self.oracle.objective.direction == "max" else min
        oracles.end_completed(self.oracle, trial, {"val_loss": best(whole[:epochs])}, 0)

    def run(self, steps=1000):
        for _ in range(steps):
            if (trial := self.create()) is None:
                break
            self.end(trial)
        return self

    @property
    def trained(self):
        return sum(it.trained for it in self.curves.values())


# A loss; a score between 0 and 1, such as an accuracy; one with either sign, such as a coefficient of determination.
KINDS = {
    "loss": ("min", lambda loss: loss, lambda score: score),
    "score": ("max", lambda loss: 1 / loss, lambda score: 1 / score),
    "signed": ("max", lambda loss: 1.5 - loss, lambda score: 1.5 - score),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_best_with_few_epochs_and_leaves_the_rest_paused(tmp_path, kind):
    direction, shown, loss = KINDS[kind]
    drive = Drive(tmp_path, lambda values: list(map(shown, curve(values))), trials=7, direction=direction).run()
    assert 7 * EPOCHS <= drive.trained < 8 * EPOCHS and len(drive.curves) > 7
    assert min(loss(value) for it in drive.curves.values() for value in it.values) < 1.05
    ended = {name for name, it in drive.curves.items() if not it.is_paused}
    assert 1 <= len(ended) < len(drive.curves)
    # Each trial goes on where it was, up to the next pause.
    assert {epochs for _, epochs in drive.order} <= {1, 2, 3, EPOCHS}
    assert set(drive.oracle.end_order) == set(drive.curves) and not drive.oracle.ongoing_trials


def test_a_search_that_was_killed_decides_as_one_that_was_not(tmp_path):
    whole = Drive(tmp_path / "whole").run(9)
    killed = Drive(tmp_path / "killed").run(6)
    killed.create()  # and the search is killed while that trial runs
    again = Drive(tmp_path / "killed")
    again.curves, again.order = killed.curves, killed.order
    again.oracle.reload()
    again.run(3)
    assert again.order == whole.order and again.values.items() <= whole.values.items()


def test_several_trials_at_once_are_different(tmp_path):
    drive = Drive(tmp_path).run(4)
    running = [drive.create(f"tuner{number}") for number in range(3)]
    assert len({trial.trial_id for trial in running}) == 3
    assert len({str(trial.hyperparameters.values) for trial in running}) == 3


def test_what_fails_or_does_not_fit_is_left(tmp_path):
    def of(values):
        if values["learning_rate"] > 1e-2:
            raise ArithmeticError
        if values["effective_batch_size"] > 128:
            raise MemoryError
        return [math.nan] * EPOCHS if values["effective_batch_size"] == 1 else curve(values)

    drive = Drive(tmp_path, of, trials=9).run()
    statuses = [trial.status for trial in drive.oracle.trials.values()]
    assert 1 <= statuses.count("FAILED") < len(statuses) / 2
    assert min(value for it in drive.curves.values() for value in it.values) < 1.05


def test_a_small_space_is_trained_to_its_end(tmp_path):
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [8, 16], ordered=True)
    drive = Drive(tmp_path, lambda values: curve({**values, "learning_rate": 1e-3, "activation": "relu"}), hp=hp).run()
    assert [len(it.values) for it in drive.curves.values()] == [EPOCHS, EPOCHS] and drive.create() is None


def test_points_near_others_are_in_the_space_and_most_differ_a_little():
    hp = space()
    center = {"effective_batch_size": 64, "learning_rate": 1e-2, "activation": "relu"}
    found = list(optuna_space.near(hp.space, center, 3, 200))
    assert found == list(optuna_space.near(hp.space, center, 3, 200))
    assert all(1e-4 <= it["learning_rate"] <= 1e-1 for it in found)
    close = [it for it in found if 0.3 < it["learning_rate"] / 1e-2 < 3 and 16 <= it["effective_batch_size"] <= 256]
    assert len(close) > 120 and {it["activation"] for it in found} == {"relu", "tanh"}
    gone = {**center, "effective_batch_size": 65}  # no longer listed
    assert len(list(optuna_space.near(hp.space, gone, 3, 5))) == 5


def test_ends_are_predicted_from_a_few_epochs():
    generator = np.random.default_rng(0)
    places = generator.random((12, 2))
    shape = np.array([1 / epoch - 1 / EPOCHS for epoch in range(1, EPOCHS + 1)])
    ends = (places[:, 0] - 0.4) ** 2 + 0.2 * places[:, 1]
    curves = ends[:, None] + (0.3 + 0.2 * places[:, :1]) * shape
    seen = [(row, epoch) for row in range(12) for epoch in range(1, 3 if row > 3 else EPOCHS + 1)]
    rows, epochs = map(np.array, zip(*seen, strict=True))
    values = curves[rows, epochs - 1]
    observed = Observations(places[rows], epochs, rows, values - values.min())
    model = LearningCurves(Coordinates([False, False]), EPOCHS, observed, np.random.default_rng(1))
    means, deviations = model.ends(places)
    error = means.mean(axis=0) + values.min() - ends
    assert np.abs(error[4:]).max() < 0.02 and np.abs(error[:4]).max() < 0.01
    assert (deviations.mean(axis=0)[4:] < 0.1).all()
    far = model.ends(np.array([[2.0, 2.0]]))[1]
    assert far.mean() > 3 * deviations.mean()
    # Nothing better is expected of a point whose end is known to be worse.
    gains = expected_improvement(means, deviations, float(ends.min() - values.min()))
    assert gains[int(ends[:4].argmax())] < 1e-4
