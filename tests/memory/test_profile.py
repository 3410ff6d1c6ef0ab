"""The arithmetic of predictions, with made-up measurements of steps whose cost is known."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accumtune.errors import BudgetError
from accumtune.memory.loss_memory import fitted
from accumtune.memory.prediction.exploration import next_probe_size
from accumtune.memory.prediction.profile import Measurement, Profile

MIB = 2**20
ALLOCATOR = "tensorflow allocator"


def measured(size, steps=1, peak_mib=None, seconds=None, limit_mib=None):
    peak = None if peak_mib is None else int(peak_mib * MIB)
    return Measurement(size, steps, peak, seconds, ALLOCATOR, limit_mib and limit_mib * MIB)


def profile_of(*measurements, **arguments):
    return Profile(measurements, device="CPU:0", memory_source=ALLOCATOR, **arguments)


def step_cost(size, steps, floor=60, static=40, slope=3, accumulators=10):
    """A step that behaves as the theory says."""
    return max(floor, static + slope * size) + (accumulators if steps > 1 else 0)


def theoretical(sizes, steps=(1, 2, 4), **cost):
    return profile_of(*(measured(m, k, step_cost(m, k, **cost), k * 0.01 * m + 0.02) for m in sizes for k in steps))


points = st.dictionaries(
    st.tuples(st.integers(1, 512), st.sampled_from([1, 2, 4])), st.integers(1, 4096), min_size=1, max_size=8
)
profiles = st.builds(
    lambda points, sample_bytes: profile_of(
        *(measured(m, k, peak, 0.1 * k) for (m, k), peak in points.items()), sample_bytes=sample_bytes
    ),
    points,
    st.integers(0, 4096),
)
sizes = st.integers(1, 4096)
steps = st.integers(1, 64)


@given(profiles, sizes, sizes, steps, steps)
def test_more_samples_or_more_steps_never_need_less_memory(profile, m1, m2, k1, k2):
    (small, large), (few, many) = sorted((m1, m2)), sorted((k1, k2))
    if few == 1 and 1 not in {m.accumulation_steps for m in profile.measurements}:
        many = few
    assert profile.predict_peak_memory(small, few) <= profile.predict_peak_memory(large, few)
    assert profile.predict_peak_memory(small, few) <= profile.predict_peak_memory(small, many)


@given(profiles, st.integers(1, 8192), steps)
@settings(max_examples=200)
def test_the_largest_that_fits_fits_and_the_next_does_not(profile, budget_mib, steps):
    largest = profile.largest_micro_batch_size(budget_mib * MIB, steps)
    if largest is not None:
        assert profile.fits(largest, steps, budget_mib * MIB)
        predicted = profile.predict_peak_memory(largest, steps)
        assert predicted + profile.margin_bytes(largest, steps) <= budget_mib * MIB
    assert not profile.fits((largest or 0) + 1, steps, budget_mib * MIB)


@given(profiles, steps, st.integers(1, 8192), st.integers(1, 8192))
def test_a_larger_budget_never_fits_less(profile, steps, one, other):
    small, large = sorted((one, other))
    fitting = profile.largest_micro_batch_size(small * MIB, steps) or 0
    assert fitting <= (profile.largest_micro_batch_size(large * MIB, steps) or 0)


@given(profiles)
def test_survives_json(profile):
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@given(st.lists(st.integers(1, 256), min_size=1, max_size=5, unique=True))
def test_measured_points_are_reproduced(sizes):
    profile = theoretical(sizes)
    for m in profile.measurements:
        assert profile.predict_peak_memory(m.micro_batch_size, m.accumulation_steps) == m.peak_memory_bytes


@given(st.integers(1, 2000), steps)
def test_two_sizes_beyond_the_floor_tell_all_larger_ones(size, steps):
    profile = theoretical([1, 16, 64])
    if size >= 16:
        assert profile.predict_peak_memory(size, steps) == pytest.approx(step_cost(size, steps) * MIB, abs=2)
    # Between the floor and the slope the chord is above the truth, never below.
    assert profile.predict_peak_memory(size, steps) >= step_cost(size, steps) * MIB - 2


def test_a_step_that_never_leaves_its_floor_costs_the_floor():
    assert theoretical([1, 4], slope=0).predict_peak_memory(1000) == 60 * MIB


def test_one_group_still_at_its_floor_takes_the_slope_of_the_other():
    profile = profile_of(measured(1, 1, 60), measured(16, 1, 88), measured(1, 4, 100), measured(16, 4, 100))
    assert profile.predict_peak_memory(32, 4) > 120 * MIB


def test_the_window_of_data_is_counted():
    profile = profile_of(measured(4, 1, 50), measured(8, 1, 60), measured(8, 4, 90), sample_bytes=MIB)
    assert profile.predict_peak_memory(8, 4) == 90 * MIB
    assert profile.predict_peak_memory(8, 3) == (90 - 8) * MIB
    # Twice the window while it is cut, before anything runs, and what is left of the 90 if 64 of them were that
    assert profile.predict_peak_memory(8, 100) == (90 - 64 + 2 * 800) * MIB


def test_a_loss_that_compares_all_samples_with_each_other_is_counted():
    """Beside what there is without samples, while no micro-batch runs: it grows with the square of the window."""
    points = measured(4, 2, 50), measured(8, 2, 60)
    profile = profile_of(*points, sample_bytes=2**10, loss_bytes=(2**12, 12, 0))
    assert profile.predict_peak_memory(8, 4) == pytest.approx(profile_of(*points).predict_peak_memory(8, 4), rel=0.01)
    samples = 8 * 512
    loss = 2**12 * samples + 12 * samples**2
    assert profile.predict_peak_memory(8, 512) == pytest.approx(40 * MIB + loss, rel=0.01)
    assert not profile.fits(8, 512, 200 * MIB) and profile.fits(8, 64, 200 * MIB)
    # What such a window has taken says nothing of its micro-batch.
    after = profile.with_measurement(measured(8, 512, 250))
    assert after.predict_peak_memory(8, 4) == profile.predict_peak_memory(8, 4)
    blind = replace(profile, loss_bytes=(0, 0, 0))
    assert blind.fits(8, 512, 200 * MIB) and blind.with_measurement(measured(8, 512, 250)).predict_peak_memory(
        8, 4
    ) > 4 * profile.predict_peak_memory(8, 4)


def test_a_loss_of_all_validation_samples_is_counted_at_every_pair():
    """It takes 60 MiB beside 30 and accumulators of 10, a sample 1 MiB and a pair of samples 12 bytes."""

    def point(size, steps, limit_mib=None):
        return measured(size, steps, max(40, 30 + size, 30 + 60) + 10 * (steps - 1), limit_mib=limit_mib)

    points = [point(size, steps) for size in (4, 8, 40) for steps in (1, 2)]
    profile = profile_of(*points, loss_bytes=(0, 12, 0), validation_bytes=60 * MIB)
    assert profile.predict_peak_memory(4, 2) == 100 * MIB and not profile.fits(4, 2, 90 * MIB)
    assert profile.predict_peak_memory(4, 1024) == pytest.approx((40 + 12 * 16) * MIB, rel=0.01)
    # Otherwise what validation takes would be there beside the loss of a window.
    blind = replace(profile, validation_bytes=0)
    assert blind.predict_peak_memory(4, 1024) == pytest.approx((100 + 12 * 16) * MIB, rel=0.01)
    assert "smaller validation_batch_size" in profile.window.share_of(100 * MIB, 8)
    assert "smaller effective batch" in profile.window.share_of(profile.predict_peak_memory(4, 4096), 4 * 4096)
    # If validation does not fit, nothing does, not even a smaller window.
    failed = profile.with_measurement(measured(4, 8, None, limit_mib=110))
    assert profile.fits(4, 2, 112 * MIB) and not failed.fits(4, 2, 112 * MIB)


def test_what_a_loss_takes_is_told_from_three_batches():
    n = 64
    for per in [(1000, 0, 0), (1000, 12, 0), (0, 12, 0), (0, 0, 4), (0, 12, 4)]:
        peaks = [2**14 + sum(b * (n * k) ** power for power, b in enumerate(per, 1)) for k in (1, 2, 4)]
        found = fitted(n, *peaks)
        assert sum(b * 4096**power for power, b in enumerate(found, 1)) == pytest.approx(
            sum(b * 4096**power for power, b in enumerate(per, 1)), rel=0.1
        )


def test_a_window_that_its_loss_did_not_fit_in_says_nothing_of_the_micro_batch():
    """It rules out windows of as many samples, with any micro-batch, and no smaller one."""
    budget = 200 * MIB
    points = [measured(size, steps, 40 + size, limit_mib=200) for size in (4, 8) for steps in (1, 2)]
    # Predicted 40 + 12 bytes for each of 3,584² pairs: 187 MiB, with margin just within the budget.
    profile = profile_of(*points, sample_bytes=64, loss_bytes=(0, 12, 0), memory_budget_bytes=budget)
    assert profile.fits(8, 440, budget) and profile.is_peak_of_the_loss(8, 440)
    failed = profile.with_measurement(measured(8, 440, None, limit_mib=200))
    assert not failed.fits(8, 440, budget) and not failed.fits(4, 880, budget) and not failed.fits(8, 448, budget)
    assert failed.fits(8, 64, budget) and failed.largest_micro_batch_size(accumulation_steps=2) == (
        profile.largest_micro_batch_size(accumulation_steps=2)
    )
    # Of a loss that nobody could measure, only what has run tells.
    unknown = replace(failed, loss_bytes=(0, 0, 0))
    assert unknown.fits(8, 2, budget) and not unknown.fits(8, 440, budget)
    # Without a window on the device it is the micro-batch.
    assert not replace(unknown, sample_bytes=0).fits(8, 2, budget)


def test_a_window_of_a_micro_batch_that_has_run_fails_for_its_loss_if_that_is_most_of_it():
    """Validation's loss may have made a trial's peak, so that the window's is not seen to be larger than that."""
    points = [measured(16, steps, mib, limit_mib=16) for steps, mib in ((1, 6.5), (2, 9), (16, 12.8))]
    profile = profile_of(*points, loss_bytes=(808, 12, 0), memory_budget_bytes=16 * MIB)
    failed = measured(16, 64, None, limit_mib=16)
    assert profile.is_failure_of_the_loss(failed)
    # The loss of 272 samples is not most of what they take; and without such a loss it is the micro-batch.
    assert not profile.is_failure_of_the_loss(measured(16, 17, None, limit_mib=16))
    assert not replace(profile, loss_bytes=(0, 0, 0)).is_failure_of_the_loss(failed)


def test_quadratic_memory_is_not_promised_too_much_inside_the_measured_range():
    cost = {m: 40 + 0.05 * m * m for m in (1, 8, 64)}
    profile = profile_of(*(measured(m, 1, mib) for m, mib in cost.items()))
    for m in range(1, 65):
        assert profile.predict_peak_memory(m) >= int((40 + 0.05 * m * m) * MIB) - 1


def test_running_out_of_memory_is_remembered():
    profile = theoretical([1, 16]).with_measurement(measured(20, 1, None, limit_mib=300))
    assert profile.fits(16, 1, 300 * MIB)
    # It was predicted to fit: between what ran and what did not, the prediction is not believed any more.
    assert not profile.fits(17, 1, 300 * MIB) and not profile.fits(20, 1, 300 * MIB)
    assert not profile.fits(21, 4, 200 * MIB)
    assert profile.largest_micro_batch_size(300 * MIB) == 16
    assert profile.fits(20, 1, 320 * MIB)  # that says nothing of a larger budget
    out_with_two = theoretical([1, 16]).with_measurement(measured(20, 2, None, limit_mib=300))
    assert out_with_two.fits(20, 1, 300 * MIB) and not out_with_two.fits(20, 3, 300 * MIB)


def test_what_ran_under_a_limit_fits_into_it_without_a_margin():
    profile = theoretical([1, 16])
    assert not profile.fits(16, 4, 98 * MIB)
    profile = profile.with_measurement(measured(16, 4, 98, limit_mib=98))
    assert profile.fits(16, 4, 98 * MIB) and profile.fits(15, 2, 98 * MIB) and not profile.fits(16, 4, 97 * MIB)
    # Every micro-step after the second is like it, unless the data of a longer window are on the device.
    assert profile.fits(16, 64, 98 * MIB)
    assert not replace(profile, sample_bytes=2**16).fits(16, 64, 98 * MIB)


def test_a_trial_that_took_more_than_its_budget_has_not_run_within_it():
    """Without a limit (JAX and torch on a CPU) it may: it is then no proof that the size fits."""
    profile = theoretical([1, 16]).with_measurement(measured(20, 1, 120, limit_mib=110))
    assert not profile.fits(20, 1, 110 * MIB)
    assert profile.with_measurement(measured(20, 1, 120, limit_mib=120)).fits(20, 1, 120 * MIB)


def test_a_trial_refines_the_profile_and_keeps_the_higher_peak():
    profile = theoretical([1, 16]).with_measurement(measured(16, 1, 95, 0.5))
    assert profile.predict_peak_memory(16) == 95 * MIB
    again = profile.with_measurement(measured(16, 1, 90, 0.4))
    assert again.predict_peak_memory(16) == 95 * MIB
    assert len(again.measurements) == len(profile.measurements)


def test_seconds_are_steps_times_a_micro_step_and_one_update():
    profile = theoretical([8, 16, 64])
    for m, k in [(8, 1), (16, 32), (40, 3), (128, 2)]:
        expected = m * k / (k * 0.01 * m + 0.02)
        assert profile.predict_throughput(m, k) == pytest.approx(expected, rel=0.15)
    assert profile.predict_throughput(8, 16) == pytest.approx(8 * 16 / (16 * 0.08 + 0.02), rel=0.02)


def test_no_budget_is_an_error_that_says_so():
    with pytest.raises(BudgetError, match="Pass|budget"):
        theoretical([1, 16]).largest_micro_batch_size()
    with pytest.raises(ValueError, match="ran out of memory"):
        profile_of(measured(1, 1, None)).predict_peak_memory(1)
    assert profile_of(measured(1, 1, None)).largest_micro_batch_size("1GiB") is None


def drive(budget_mib, sizes, **cost):
    """What a driver does: ask, probe under the limit, refit. Returns the sizes probed and the profile."""
    budget = None if budget_mib is None else budget_mib * MIB
    profile, probed = profile_of(memory_budget_bytes=budget), []
    while (size := next_probe_size(profile, budget, sizes)) is not None:
        assert size not in probed
        probed.append(size)
        for k in (1, 2, 4):
            peak = step_cost(size, k, **cost)
            out = budget_mib is not None and peak > budget_mib
            profile = profile.with_measurement(measured(size, k, None if out else peak, 0.1, limit_mib=budget_mib))
            if out:
                break
    return probed, profile


powers = [2**i for i in range(11)]
costs = st.builds(
    lambda static, gradients, slope, accumulators: {
        "static": static, "floor": static * (1 + gradients), "slope": slope, "accumulators": accumulators
    },
    st.integers(1, 500), st.floats(0, 1), st.floats(0.01, 50), st.integers(0, 100),
)  # fmt: skip


@given(costs, st.integers(20, 4000))
@settings(max_examples=200)
def test_probing_ends_soon_and_runs_out_of_memory_at_most_twice(cost, budget_mib):
    probed, profile = drive(budget_mib, powers, **cost)
    failed = [m for m in profile.measurements if not m.is_feasible]
    assert len(probed) <= 8 and len(failed) <= 2
    largest = profile.largest_micro_batch_size(budget_mib * MIB)
    if largest is not None:
        assert step_cost(largest, 1, **cost) <= budget_mib
        # No listed size is given away that fits with room to spare.
        best = max((m for m in powers if 1.13 * step_cost(m, 4, **cost) + 1 <= budget_mib), default=0)
        assert largest >= best


def test_probing_without_a_budget_stops_once_the_slope_shows():
    assert len(drive(None, powers)[0]) <= 4
    assert drive(None, powers, slope=100)[0] == [1, 4]
    assert drive(None, [8, 16])[0][0] == 8


def test_repr_is_for_people():
    assert repr(theoretical([1, 16])) == (
        "Profile(device='CPU:0', memory_source='tensorflow allocator', memory_budget=none, "
        "measured_micro_batch_sizes=(1, 16))"
    )


def crowded(limit_mib=117, sizes=(32, 64, 88, 98, 110)):
    """Peaks of a step that is a line, under a limit: near it the allocator counts all there is, whatever the size."""
    cost = {(m, k): step_cost(m, k, slope=0.64, accumulators=2) for m in sizes for k in (1, 2)}
    peaks = {pair: peak if peak < 0.85 * limit_mib else 0.98 * limit_mib for pair, peak in cost.items()}
    return [measured(m, k, peak, limit_mib=limit_mib) for (m, k), peak in peaks.items()]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_full_limit_says_nothing_of_larger_sizes(steps):
    points = crowded()
    truth = step_cost(180, steps, slope=0.64, accumulators=2) * MIB
    assert profile_of(*points).predict_peak_memory(180, steps) == pytest.approx(truth, rel=0.01)
    # The negative control: taken for what a step asks for, the same peaks mislead.
    plain = [replace(point, memory_limit_bytes=None) for point in points]
    assert profile_of(*plain).predict_peak_memory(180, steps) != pytest.approx(truth, rel=0.03)


def test_what_was_taken_under_a_full_limit_is_needed_for_the_next_one():
    """Nobody knows how much of it the step could have done without."""
    profile = profile_of(*crowded())
    assert profile.fits(110, 2, 117 * MIB)
    assert not profile.fits(98, 2, 110 * MIB)
    assert profile.predict_peak_memory(98, 2) < 0.98 * 117 * MIB
    # Under that very limit it takes it again.
    assert profile.predict_peak_memory(98, 2, "117MiB") == int(0.98 * 117 * MIB)
    assert profile.predict_peak_memory(98, 2, "118MiB") == profile.predict_peak_memory(98, 2)


def test_a_budget_with_ample_room_takes_two_probes():
    assert drive(40_000, [8, 32, 128, 512], slope=1)[0] == [8, 512]
    # The negative controls: with less room, one in between; and with a loss over pairs, no jump to a window of them.
    assert len(drive(2000, [8, 32, 128, 512], slope=1)[0]) == 3
    small = profile_of(measured(8, 1, 10), measured(8, 2, 12), memory_budget_bytes=4000 * MIB)
    assert next_probe_size(small, 4000 * MIB, [8, 32, 512]) == 512
    pairs = replace(small, loss_bytes=(0, 4096, 0))
    assert next_probe_size(pairs, 4000 * MIB, [8, 32, 512]) == 32
