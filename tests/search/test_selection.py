"""The choice among candidates: properties of the Pareto front and the policies, for any candidates."""

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accumtune.errors import NoResultError, SearchError
from accumtune.search.results.selection import Candidate, pareto_front, select

POLICIES = ["quality", "memory", "throughput", "balanced"]


def candidate(objective=1.0, peak=100.0, throughput=10.0, micro=8, steps=1, **other):
    return Candidate(objective, peak, throughput, micro, steps, micro * steps, {"micro_batch_size": micro}, **other)


def candidates_of(objectives):
    # Few different values, so that ties are frequent.
    numbers = st.sampled_from([1.0, 2.0, 3.0, 7.5, 100.0]) | st.floats(1e-3, 1e6)
    one = st.builds(
        candidate,
        objective=objectives,
        peak=st.none() | numbers,
        throughput=st.none() | numbers,
        micro=st.sampled_from([1, 8, 64]),
        steps=st.sampled_from([1, 4]),
        trial_id=st.sampled_from(["00", "01", "02"]),
        is_trained=st.booleans(),
    )
    return st.lists(one, min_size=1, max_size=12)


GOOD = st.sampled_from([0.0, 0.1, 0.1005, 0.2, 1.0]) | st.floats(1e-6, 1e6)
ANY = GOOD | GOOD.map(lambda value: -value)
DIRECTIONS = st.sampled_from(["min", "max"])


def costs(item, direction):
    sign = -1 if direction == "max" else 1
    peak = math.inf if item.peak_memory_bytes is None else item.peak_memory_bytes
    throughput = -math.inf if item.throughput_samples_per_second is None else item.throughput_samples_per_second
    return (sign * item.objective, peak, -throughput)


def dominates(one, other, direction):
    first, second = costs(one, direction), costs(other, direction)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


@given(candidates_of(ANY), DIRECTIONS)
def test_the_front_is_exactly_what_nothing_dominates(found, direction):
    front = pareto_front(found, direction)
    expected = [item for item in found if not any(dominates(other, item, direction) for other in found)]
    assert sorted(front, key=repr) == sorted(expected, key=repr)
    objectives = [costs(item, direction)[0] for item in front]
    assert objectives == sorted(objectives)


@given(candidates_of(ANY), st.sampled_from(POLICIES), DIRECTIONS, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order(found, policy, direction, rng):
    shuffled = found[:]
    rng.shuffle(shuffled)
    assert select(found, policy, direction=direction) == select(shuffled, policy, direction=direction)


@given(candidates_of(ANY), st.sampled_from(POLICIES), DIRECTIONS, st.integers(-8, 8), st.integers(-8, 8))
def test_the_choice_does_not_depend_on_units(found, policy, direction, power, other_power):
    def in_other_units(item):
        return dataclasses.replace(
            item,
            objective=item.objective * 2.0**power,  # powers of two, so that ties stay ties
            peak_memory_bytes=item.peak_memory_bytes and item.peak_memory_bytes * 2.0**other_power,
            throughput_samples_per_second=item.throughput_samples_per_second
            and item.throughput_samples_per_second * 2.0**power,
        )

    chosen = select(found, policy, direction=direction).candidate
    assert select(map(in_other_units, found), policy, direction=direction).candidate == in_other_units(chosen)


@given(candidates_of(GOOD), st.sampled_from(POLICIES))
def test_maximising_the_negative_is_minimising(found, policy):
    negative = [dataclasses.replace(item, objective=-item.objective) for item in found]
    chosen = select(found, policy).candidate
    mirrored = select(negative, policy, direction="max").candidate
    assert mirrored == dataclasses.replace(chosen, objective=-chosen.objective)


@given(candidates_of(GOOD), st.floats(0, 0.5))
def test_what_the_policies_promise(found, tolerance):
    best = min(item.objective for item in found)
    quality = select(found, "quality", tolerance).candidate
    scale = max(best, 0.01 * statistics.median(item.objective for item in found))
    assert quality.objective <= best + tolerance * scale * (1 + 1e-9)
    # Nothing as good is faster by more than the tolerance.
    speed = quality.throughput_samples_per_second or -math.inf
    assert all(
        (item.throughput_samples_per_second or -math.inf) * (1 - tolerance) <= speed * (1 + 1e-9)
        for item in found
        if item.objective == best
    )
    small = select(found, "memory", tolerance).candidate
    least = small.peak_memory_bytes or math.inf
    assert all((item.peak_memory_bytes or math.inf) >= least for item in found if item.objective == best)


@given(candidates_of(GOOD))
def test_the_compromise_is_on_the_front(found):
    assert select(found, "balanced").candidate in pareto_front(found)


def test_quality_takes_the_fastest_within_the_tolerance_then_the_smallest():
    best = candidate(0.100, peak=100, throughput=10)
    faster = candidate(0.1005, peak=90, throughput=20)
    as_fast_but_smaller = candidate(0.1009, peak=50, throughput=19.9)
    worse = candidate(0.15, peak=1, throughput=99)
    assert select([best, worse], "quality").candidate is best
    assert select([best, faster, worse], "quality").candidate is faster
    assert select([best, faster, as_fast_but_smaller, worse], "quality").candidate is as_fast_but_smaller
    assert select([best, faster, worse], "quality", tolerance=0).candidate is best


def test_memory_and_throughput_give_up_at_most_five_tolerances():
    best = candidate(0.100, peak=100, throughput=10)
    close = candidate(0.104, peak=40, throughput=30)
    far = candidate(0.2, peak=1, throughput=999)
    for policy in ("memory", "throughput"):
        assert select([best, close, far], policy).candidate is close
        assert select([best, close, far], policy, tolerance=0.2).candidate is far


def test_balanced_takes_the_knee():
    costly = candidate(0.100, peak=1000, throughput=10)
    knee = candidate(0.102, peak=110, throughput=9)
    cheap = candidate(0.109, peak=100, throughput=1)
    assert select([costly, knee, cheap], "balanced").candidate is knee


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("objective", [math.nan, math.inf, -math.inf, None])
def test_what_has_no_objective_is_never_chosen(policy, objective):
    broken = candidate(objective, peak=1, throughput=1e9)
    sound = candidate(5.0)
    assert select([broken, sound], policy).candidate is sound
    assert pareto_front([broken, sound]) == [sound]
    with pytest.raises(NoResultError, match="finite objective"):
        select([broken], policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_objective_of_zero_accepts_only_what_is_near_it(policy):
    perfect = candidate(0.0, peak=100, throughput=1)
    bad = candidate(0.5, peak=1, throughput=100)
    assert select([perfect, bad, bad], policy).candidate is perfect
    assert select([perfect], policy).candidate is perfect


def test_without_candidates_there_is_no_choice():
    with pytest.raises(NoResultError):
        select([])
    assert pareto_front([]) == []


def test_a_tie_goes_to_what_was_trained():
    profiled = candidate(micro=64, is_trained=False)
    trained = candidate(micro=8)
    assert select([profiled, trained]).candidate is trained


def test_a_callable_chooses_and_is_named():
    found = [candidate(1.0), candidate(2.0), candidate(math.nan)]

    def worst(candidates):
        assert len(candidates) == 2
        return candidates[-1]

    choice = select(found, worst)
    assert choice.candidate is found[1] and "worst" in choice.reason and choice.policy == "worst"
    with pytest.raises(SearchError, match="returned None"):
        select(found, lambda candidates: None)


@pytest.mark.parametrize(
    "arguments",
    [{"policy": "best"}, {"tolerance": -1}, {"tolerance": math.nan}, {"tolerance": "1"}, {"direction": "up"}],
)
def test_unknown_words_are_refused(arguments):
    with pytest.raises(SearchError) as error:
        select([candidate()], **arguments)
    assert error.value.expected and error.value.fix


@pytest.mark.parametrize("policy", POLICIES)
def test_the_reason_is_one_sentence_with_figures(policy):
    found = [candidate(0.1 + 0.0001 * index, peak=2**20 * (index + 1), throughput=10.0 * index) for index in range(5)]
    choice = select(found, policy, objective_name="val_loss")
    assert "candidates, out of 5, within" in choice.reason and "val_loss" in choice.reason
    assert choice.reason.endswith(".") and "\n" not in choice.reason
    assert "only candidate" in select(found[:1], policy).reason


@settings(deadline=None, max_examples=1)
@given(st.just(0))
def test_ten_thousand_candidates_are_no_burden(seed):
    rng = random.Random(seed)
    found = [candidate(rng.random(), rng.random(), rng.random()) for _ in range(10_000)]
    front = pareto_front(found)
    assert 10 < len(front) < 1000
    assert not any(dominates(other, item, "min") for item in front[:20] for other in found)
