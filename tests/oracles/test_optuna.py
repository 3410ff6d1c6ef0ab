"""OptunaSearch: Optuna's samplers behind Keras Tuner's oracle."""

import math
import sys

import keras_tuner
import optuna
import pytest
from keras_tuner.engine.trial import TrialStatus

import accumtune
from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.oracles import optuna_space
from accumtune.oracles.optuna_oracle import OptunaOracle
from accumtune.oracles.persistent_oracle import make_persistent


@pytest.fixture
def without_torch(monkeypatch):
    """The default sampler is TPE then: a hundred times faster, and all else is the same."""
    monkeypatch.setitem(sys.modules, "torch", None)


def everything():
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [8, 16, 32, 64, 128], ordered=True)
    hp.Choice("activation", ["relu", "tanh", "gelu"])
    hp.Choice("unordered", [3, 1, 2], ordered=False)
    hp.Int("layers", 1, 4)
    hp.Int("units", 8, 40, step=8)
    hp.Int("log_units", 1, 1000, sampling="log")
    hp.Int("doubling", 4, 64, step=2, sampling="log")
    hp.Float("dropout", 0.0, 0.5, step=0.1)
    hp.Float("momentum", 0.0, 1.0)
    hp.Float("learning_rate", 1e-5, 1e-1, sampling="log")
    hp.Float("decay", 0.01, 1.0, sampling="reverse_log")
    hp.Boolean("bias")
    hp.Fixed("seed", 7)
    with hp.conditional_scope("activation", ["relu"]):
        hp.Float("slope", 0.0, 0.3)
        hp.Int("depth", 1, 3)
    with hp.conditional_scope("activation", ["tanh", "gelu"]):
        hp.Int("depth", 5, 9)  # one name, another range
    return hp


def test_every_kind_of_hyperparameter_goes_to_optuna_and_back():
    space = everything().space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(200):
        trial = study.ask()
        values = optuna_space.suggest(space, trial)
        params, distributions = optuna_space.encoded(space, values)
        assert params == pytest.approx(trial.params) and distributions == trial.distributions
        assert values["seed"] == 7 and values["effective_batch_size"] in (8, 16, 32, 64, 128)
        assert values["units"] in range(8, 41, 8) and values["doubling"] in (4, 8, 16, 32, 64)
        assert math.isclose(values["dropout"] * 10, round(values["dropout"] * 10), abs_tol=1e-9)
        assert 0.01 <= values["decay"] <= 1.0 and type(values["bias"]) is bool
        assert ("slope" in values) == (values["activation"] == "relu")
        assert values["depth"] in (range(1, 4) if values["activation"] == "relu" else range(5, 10))
        study.tell(trial, 0.0)


def test_the_effective_batch_has_an_order_and_even_steps_of_its_logarithm():
    def place(size, sizes):
        hp = keras_tuner.HyperParameters()
        hp.Choice("effective_batch_size", sizes, ordered=True)
        params, distributions = optuna_space.encoded(hp.space, {"effective_batch_size": size})
        kind = distributions["effective_batch_size"]
        return (params["effective_batch_size"] - kind.low) / (kind.high - kind.low)

    powers, others = [8, 16, 32, 64, 128], [6, 8, 48, 96]
    assert [place(size, powers) for size in powers] == [0, 0.25, 0.5, 0.75, 1]
    assert [place(size, others) for size in others] == pytest.approx([0, math.log(8 / 6, 16), 0.75, 1])


def make(tmp_path, hp, sampler=None, trials=30, direction="min", seed=1, **kwargs):
    oracle = OptunaOracle(
        sampler, objective=keras_tuner.Objective("val_loss", direction), max_trials=trials, seed=seed,
        hyperparameters=hp, max_consecutive_failed_trials=100, **kwargs,
    )  # fmt: skip
    oracle.verbose = 0
    oracle._set_project_dir(str(tmp_path), "search")
    return make_persistent(oracle)


def drive(oracle, objective, trials, tuner_id="tuner0"):
    """Runs trials as a search would; what `objective` returns or raises is the outcome."""
    proposed = []
    for _ in range(trials):
        trial = oracle.create_trial(tuner_id)
        if trial.status != TrialStatus.RUNNING:
            break
        while True:
            values = dict(trial.hyperparameters.values)
            proposed.append(values)
            try:
                value = objective(values)
            except MemoryError:
                if oracles.replace_infeasible(oracle, trial) is not None:
                    continue
                oracles.end_without_counting(oracle, trial, "it does not fit")
            except ArithmeticError:
                oracles.end_failed(oracle, trial, "it diverged")
            else:
                oracles.end_completed(oracle, trial, {"val_loss": value}, 0)
            break
    return proposed


def bowl():
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [2**power for power in range(10)], ordered=True)
    hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    return hp


def bowl_loss(values):
    rate = math.log10(values["learning_rate"] / 1e-2)
    return 1 + 0.1 * math.log2(values["effective_batch_size"] / 64) ** 2 + rate**2


def check_it_finds_the_best(tmp_path, direction, trials):
    sign = 1 if direction == "min" else -1
    oracle = make(tmp_path, bowl(), trials=trials, direction=direction)
    values = drive(oracle, lambda it: sign * bowl_loss(it), trials)
    assert min(sign * trial.score for trial in oracle.trials.values()) < 1.02
    later = [bowl_loss(it) for it in values[15:]]
    assert sorted(later)[len(later) // 2] < sorted(map(bowl_loss, values[:8]))[4]  # better than at random


@pytest.mark.parametrize("direction", ["min", "max"])
def test_it_finds_the_best_of_a_smooth_objective_in_either_direction(tmp_path, direction, without_torch):
    check_it_finds_the_best(tmp_path, direction, trials=40)


def test_a_gaussian_process_finds_it_sooner(tmp_path):
    pytest.importorskip("torch")
    check_it_finds_the_best(tmp_path, "min", trials=20)


def test_a_search_that_was_killed_goes_on_with_the_same_knowledge(tmp_path):
    whole = drive(make(tmp_path / "whole", bowl()), bowl_loss, 12)
    begun = drive(make(tmp_path / "halves", bowl()), bowl_loss, 10)
    again = make(tmp_path / "halves", bowl())
    again.reload()
    rest = drive(again, bowl_loss, 2)
    assert begun + rest == whole
    # Without what is on the disk it would not have known.
    assert drive(make(tmp_path / "other", bowl(), seed=2), bowl_loss, 2) != rest


def test_nothing_is_proposed_twice_and_a_small_space_ends(tmp_path, without_torch):
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [1, 2, 4], ordered=True)
    hp.Boolean("bias")
    oracle = make(tmp_path, hp, trials=100)
    proposed = drive(oracle, lambda values: values["effective_batch_size"], 100)
    assert len({tuple(it.items()) for it in proposed}) == len(proposed) == 6


def test_what_does_not_fit_is_avoided_and_says_nothing_about_quality(tmp_path, without_torch):
    """Quality rises with the width, memory forbids most widths: the best that fits is found all the same."""
    hp = keras_tuner.HyperParameters()
    hp.Int("width", 1, 64)
    hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")

    def objective(values):
        if values["width"] > 20:
            raise MemoryError
        return -values["width"] + math.log10(values["learning_rate"] / 1e-2) ** 2

    oracle = make(tmp_path, hp, trials=25)
    proposed = drive(oracle, objective, 25)
    completed = [trial for trial in oracle.trials.values() if trial.status == TrialStatus.COMPLETED]
    assert len(completed) == 25 and min(trial.score for trial in completed) < -19
    late = proposed[len(proposed) // 2 :]
    assert sum(values["width"] > 20 for values in late) < len(late) / 2  # at random it would be two thirds


def test_a_region_that_fails_is_left(tmp_path, without_torch):
    def objective(values):
        if values["learning_rate"] > 1e-2:
            raise ArithmeticError
        return -math.log10(values["learning_rate"])  # better and better up to where it diverges

    oracle = make(tmp_path, bowl(), trials=24)
    proposed = drive(oracle, objective, 24)
    late = proposed[12:]
    assert sum(values["learning_rate"] > 1e-2 for values in late) < len(late) / 2
    assert min(t.score for t in oracle.trials.values() if t.status == TrialStatus.COMPLETED) < 2.2


def test_several_trials_at_once_get_different_proposals(tmp_path, without_torch):
    oracle = make(tmp_path, bowl())
    drive(oracle, bowl_loss, 10)
    running = [oracle.create_trial(f"tuner{index}") for index in range(3)]
    assert len({tuple(trial.hyperparameters.values.items()) for trial in running}) == 3
    for trial in reversed(running):  # they end in any order
        oracles.end_completed(oracle, trial, {"val_loss": bowl_loss(trial.hyperparameters.values)}, 0)
    assert len(drive(oracle, bowl_loss, 2)) == 2


def two_choices_of_eight():
    hp = keras_tuner.HyperParameters()
    hp.Choice("effective_batch_size", [2**power for power in range(8)], ordered=True)
    hp.Choice("width", list(range(8)), ordered=True)
    return hp


def test_the_first_trials_are_spread_evenly_over_every_hyperparameter(tmp_path, without_torch):
    def seen(folder, sampler):
        values = drive(make(tmp_path / folder, two_choices_of_eight(), sampler), lambda values: 1.0, 8)
        return [len({it[name] for it in values}) for name in ("effective_batch_size", "width")]

    assert seen("spread", None) == [8, 8]
    assert min(seen("random", optuna.samplers.RandomSampler(seed=0))) < 8


def test_a_spread_space_has_its_conditions_and_goes_on_from_any_point():
    space = everything().space
    points = list(optuna_space.spread(space, 5, 0, 40))
    assert {values["activation"] for values in points} == {"relu", "tanh", "gelu"}
    assert all(("slope" in values) == (values["activation"] == "relu") for values in points)
    assert list(optuna_space.spread(space, 5, 37, 3)) == points[37:]
    assert list(optuna_space.spread(space, 6, 37, 3)) != points[37:]


def test_a_gaussian_process_begins_with_few_trials_and_tpe_with_more(tmp_path, monkeypatch):
    def asked(folder):
        oracle = make(tmp_path / folder, bowl())
        asking = []
        monkeypatch.setattr(oracle, "_default_sampler", lambda: asking.append(1) or optuna.samplers.RandomSampler())
        drive(oracle, bowl_loss, 11)
        return 11 - len(asking)

    pytest.importorskip("torch")
    assert asked("gaussian") == 3
    monkeypatch.setitem(sys.modules, "torch", None)
    assert asked("tpe") == 10


@pytest.mark.parametrize(
    "sampler",
    [optuna.samplers.TPESampler(multivariate=True, group=True, seed=0), optuna.samplers.NSGAIISampler(seed=0)],
    ids=["TPE", "NSGA-II"],
)
def test_any_sampler_can_be_handed_in_and_conditions_hold(tmp_path, sampler):
    oracle = make(tmp_path, everything(), sampler, trials=20)
    proposed = drive(oracle, lambda values: values["momentum"], 20)
    assert len(proposed) == 20
    for values in proposed:
        assert ("slope" in values) == (values["activation"] == "relu")


def test_a_hyperparameter_that_appears_later_had_its_default_before(tmp_path, without_torch):
    oracle = make(tmp_path, bowl())
    drive(oracle, bowl_loss, 9)
    found = bowl()
    found.Float("momentum", 0.0, 0.9, default=0.5)
    oracle.update_space(found)
    proposed = drive(oracle, lambda values: bowl_loss(values) + values["momentum"], 4)
    assert all("momentum" in values for values in proposed)


def test_a_missing_optuna_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(accumtune.errors.SearchError, match=r"pip install 'accumtune\[optuna\]'"):
        accumtune.OptunaSearch(lambda hp: None, objective="val_loss")


def test_the_sampler_is_told_what_a_pruned_trial_would_have_come_to(tmp_path, without_torch):
    oracle = make(tmp_path, bowl())
    oracle.forecast = {"01": 7.0}.get
    drive(oracle, bowl_loss, 2)
    assert oracle._informed_study()._study.trials[1].value == 7.0
    assert oracle.trials["01"].score == bowl_loss(oracle.trials["01"].hyperparameters.values)
    plain = make(tmp_path / "plain", bowl())
    drive(plain, bowl_loss, 2)
    assert plain._informed_study()._study.trials[1].value == plain.trials["01"].score
