"""The benchmark of search costs counts correctly: made-up searches, and real tuners on a small record."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import keras_tuner
import numpy as np
import pytest

import accumtune

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "benchmarks" / "search"))

from cost_replay import Run, ours, stock
from cost_tasks import MADE, STOCK, Record, made_record
from unchecked_gaussian import predict, unchecked


@pytest.fixture(scope="module")
def record():
    return replace(made_record(next(iter(MADE))), max_trials=8)


def test_what_a_search_needed_is_what_it_had_spent_by_then():
    run = Run()
    for objective in (3.0, 1.005, 2.0):
        run.spend(seconds=2.0, presentations=10, waited_seconds=0.5)
        run.trained(objective)
    assert run.to_reach(1.01) == (True, 20, 4.0, 3.0)
    assert run.to_reach(0.9) == (False, 30, 6.0, 4.5)  # a miss counts with all that it spent


def test_three_failures_in_a_row_would_have_ended_stocks_search():
    assert Run(failures=[True, True, False, True]).would_have_ended() is False
    assert Run(failures=[False, True, True, True]).would_have_ended() is True


def test_ours_trains_each_thing_once_and_within_the_budget(record):
    run = ours(record, accumtune.RandomSearch, seed=0)
    assert run.failures == [False] * record.max_trials
    assert run.presentations > record.max_trials * record.samples * record.epochs  # the probes' samples too
    assert run.pick <= 1.01 * min(objective for objective, *_ in run.events)


def test_stock_fails_where_memory_is_short_and_waits_for_it(record):
    runs = [stock(record, keras_tuner.RandomSearch, seed) for seed in range(3)]
    failed = [sum(run.failures) for run in runs]
    assert sum(failed) > 0
    for run, count in zip(runs, failed, strict=True):
        assert len(run.failures) == record.max_trials
        waited = record.out_of_memory_seconds - record.start_seconds[STOCK]  # its start is spent, but not waited for
        assert run.waited_seconds == pytest.approx(count * waited)
        assert run.presentations == (record.max_trials - count) * record.samples * record.epochs


@pytest.mark.parametrize("name", MADE)
def test_half_of_the_made_pairs_fit_and_the_best_effective_batch_is_the_named_one(name):
    record = made_record(name)
    assert 0.3 < record.infeasible_share() < 0.6
    points = itertools.product(record.space.effective_batch_sizes, record.space.learning_rates, record.space.widths)
    assert min(points, key=lambda point: record.best_of(*point))[0] == MADE[name]


def test_a_record_is_read_as_it_was_written(tmp_path, monkeypatch, record):
    monkeypatch.setattr("cost_tasks.RECORDS", tmp_path)
    written = replace(record, losses={(8, 1e-3, 32): (0.5, 0.25)}, loss_of=None, name="small")
    written.write()
    assert Record.read("small") == written


def test_an_unchecked_gaussian_process_says_the_same_to_the_last_bit():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    generator = np.random.default_rng(0)
    checked = GaussianProcessRegressor.predict
    for points, dimensions in ((2, 1), (30, 4)):
        x, y = generator.uniform(size=(points, dimensions)), generator.normal(size=points)
        model = GaussianProcessRegressor(Matern(nu=2.5), normalize_y=True, alpha=1e-4, random_state=1).fit(x, y)
        for point in (*generator.uniform(size=(50, 1, dimensions)), x[:1]):
            expected, found = (ask(model, point, return_std=True) for ask in (checked, predict))
            assert all(np.array_equal(*pair) for pair in zip(expected, found, strict=True))
    with unchecked():
        assert GaussianProcessRegressor.predict is predict
    assert GaussianProcessRegressor.predict is checked


def test_a_hopeless_trial_presents_fewer_samples(record):
    pytest.importorskip("optuna")
    whole, stopped = (ours(record, accumtune.OptunaSearch, seed=1, pruner=pruner) for pruner in (None, "forecast"))
    assert len(whole.events) == len(stopped.events) == record.max_trials
    assert stopped.presentations < 0.95 * whole.presentations


def test_paused_trials_share_the_samples_of_whole_trainings(record):
    pytest.importorskip("optuna")
    record = replace(record, max_trials=4)
    whole, frozen = (ours(record, accumtune.OptunaSearch, seed=1, pruner=pruner) for pruner in (None, "freeze-thaw"))
    assert len(whole.events) == record.max_trials < len(frozen.events)
    of_one_training = record.samples * record.epochs
    assert 3 * of_one_training < frozen.presentations < 5.5 * of_one_training  # a few more models are probed
