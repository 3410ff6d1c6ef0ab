"""Forecasting a training's result from its epochs so far and from finished trainings."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accumtune.search.pruning.forecast import forecast

SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)


def training(end, gain, shares=SHARES):
    """A loss that ends at `end`, `gain` logarithms below its first epoch's."""
    return [end * math.exp(gain * share) for share in shares]


FINISHED = [training(1.0, 0.5), training(1.3, 0.8)]
ENDS = st.floats(0.3, 3.0)
GAINS = st.floats(0.05, 1.5)
CURVES = st.lists(st.builds(training, ENDS, GAINS), min_size=1, max_size=5)


@given(st.lists(ENDS, min_size=1, max_size=5), ENDS, GAINS, st.floats(0.8, 1.25), st.integers(1, 4))
def test_of_trainings_of_one_shape_and_a_like_gain_the_end_is_known_before_it(ends, end, gain, other, epochs):
    curve = training(end, other * gain)
    found = forecast(curve[:epochs], [training(it, gain) for it in ends])
    assert abs(math.log(found.expected / end)) <= 0.3 * gain * SHARES[epochs - 1] + 1e-9


@given(CURVES, ENDS, GAINS, st.integers(1, 4))
def test_what_becomes_the_best_is_not_called_hopeless(finished, end, gain, epochs):
    best = min(curve[-1] for curve in finished)
    better = training(min(end, 0.98 * best), min(gain, 2 * max(math.log(curve[0] / curve[-1]) for curve in finished)))
    assert not forecast(better[:epochs], finished).is_hopeless


def test_what_is_far_behind_is_hopeless_and_soon():
    assert forecast(training(9.0, 0.5)[:1], FINISHED).is_hopeless
    assert not forecast(training(1.5, 0.5)[:1], FINISHED).is_hopeless
    assert forecast(training(1.5, 0.5)[:4], FINISHED).is_hopeless


def test_who_begins_slowly_is_not_stopped_as_a_median_would():
    slow = training(0.9, 1.2)
    for epochs in (1, 2):
        at_this_epoch = [curve[epochs - 1] for curve in FINISHED]
        assert slow[epochs - 1] > statistics.median(at_this_epoch)  # so a median pruner would stop it
        assert not forecast(slow[:epochs], FINISHED).is_hopeless


@given(CURVES, ENDS, GAINS, st.integers(1, 4), st.floats(0.01, 100))
def test_the_unit_of_a_loss_does_not_matter(finished, end, gain, epochs, unit):
    curve = training(end, gain)[:epochs]
    found = forecast(curve, finished)
    other = forecast([unit * value for value in curve], [[unit * value for value in it] for it in finished])
    assert other.expected == pytest.approx(unit * found.expected)


def scores(curve, scale=1.0, shift=0.0):
    return [scale * (shift - value) for value in curve]


@given(CURVES, ENDS, GAINS, st.integers(1, 4), st.floats(-5, -1), st.floats(0.1, 10))
def test_a_score_to_maximise_is_a_loss_to_minimise(finished, end, gain, epochs, shift, scale):
    """Negative values have no logarithm: neither their zero nor their unit matters."""
    curve = training(end, gain)[:epochs]
    found = forecast(scores(curve), [scores(it) for it in finished], "max")
    moved = forecast(scores(curve, scale, shift), [scores(it, scale, shift) for it in finished], "max")
    assert moved.expected == pytest.approx(scale * (shift + found.expected), abs=1e-6)
    assert found.expected >= max(scores(curve)) - 1e-12  # it keeps the best that it has reached


def test_accuracies_are_maximised():
    finished = [[0.5, 0.7, 0.8, 0.85], [0.4, 0.65, 0.78, 0.84]]
    found = forecast([0.2, 0.25], finished, "max")
    assert found.is_hopeless and 0.25 <= found.expected < 0.6
    assert not forecast([0.45, 0.68], finished, "max").is_hopeless
    assert not forecast([0.2, 0.25], finished, "min").is_hopeless


def test_what_rises_again_ends_with_its_best():
    valley = [1.5, 1.0, 1.2, 1.6]
    assert forecast([2.0, 1.4, 1.7], [valley, valley]).expected == pytest.approx(1.4, rel=0.01)


@pytest.mark.parametrize(
    "values, finished",
    [
        ([1.0], []), ([], FINISHED), ([math.nan], FINISHED), ([1.0], [[math.nan, math.nan]]), ([1.0] * 5, FINISHED),
        ([0.0, 0.0], [[0.0, 0.0, 0.0]]),
    ],
    ids=["none finished", "no epoch", "NaN", "only NaN finished", "no epoch left", "nothing moves"],
)  # fmt: skip
def test_where_nothing_can_be_said_nothing_is(values, finished):
    assert forecast(values, finished) is None


def test_nan_and_early_stops_are_passed_over():
    finished = [[math.nan, *FINISHED[0][1:]], FINISHED[1][:3]]
    found = forecast([math.nan, *training(5.0, 0.5)[1:3]], finished)
    assert found.is_hopeless and found.expected == pytest.approx(5.0, rel=0.2)


def test_where_all_are_alike_a_little_worse_is_not_hopeless():
    """A first training that learned nothing says nothing of the gain of others."""
    flat = [2.302, 2.302, 2.302, 2.302]
    assert not forecast([2.31], [flat]).is_hopeless
