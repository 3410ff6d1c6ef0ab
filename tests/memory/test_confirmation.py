"""The search for the largest size that runs, on made-up steps whose memory under a limit is known."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accumtune.memory.prediction import confirmation
from accumtune.memory.prediction.confirmation import ENOUGH, MOST_FAILURES, MOST_TRIES, next_to_run
from accumtune.memory.prediction.exploration import next_probe_size
from accumtune.memory.prediction.profile import HEADROOM, Measurement, Profile

MIB = 2**20
LARGEST = 1024


def need(size, static, slope, waste=0.0):
    """Returns the smallest limit in MiB; the measured peak is smaller by the allocator's waste."""
    return (static + slope * size) * (1 + waste)


def confirmed(budget_mib, static, slope, waste):
    """As `Profiler` does it: the profile at the end, and how often memory ran out."""

    def run(size, limit_mib):
        fits = need(size, static, slope, waste) <= limit_mib
        peak = int(need(size, static, slope) * MIB) if fits else None
        return Measurement(size, 2, peak, 0.1, "made up", int(limit_mib * MIB))

    budget = budget_mib * MIB
    profile, failures = Profile((), "CPU:0", "made up", memory_budget_bytes=budget), 0
    while (size := next_probe_size(profile, budget, (1, 4, 16, 64, 256))) is not None:
        profile = profile.with_measurement(run(size, budget_mib))
    for _ in range(MOST_TRIES):
        if failures == MOST_FAILURES or (size := next_to_run(profile, budget, 2, LARGEST)) is None:
            break
        measurement = run(size, budget_mib * (1 - HEADROOM))
        failures += not measurement.is_feasible
        profile = profile.with_measurement(measurement)
    return profile, failures


@given(st.integers(5, 400), st.floats(0.5, 20), st.integers(50, 1000), st.floats(0, 0.08))
@settings(max_examples=300)
@example(static=100, slope=4.0, budget_mib=300, waste=0.0)
@example(static=176, slope=1.0, budget_mib=275, waste=0.078125)  # two failures leave too wide a bracket
@example(static=159, slope=0.5, budget_mib=177, waste=0.0234375)  # most of the budget is parameters
@example(static=374, slope=0.5, budget_mib=426, waste=0.078125)  # three failures do, too
def test_what_is_picked_runs_and_is_close_to_the_largest(static, slope, budget_mib, waste):
    profile, failures = confirmed(budget_mib, static, slope, waste)
    assert failures <= MOST_FAILURES
    true_largest = max((m for m in range(1, LARGEST + 1) if need(m, static, slope, waste) <= budget_mib), default=0)
    picked = profile.largest_micro_batch_size(accumulation_steps=2)
    if not true_largest:
        assert picked is None
        return
    if picked is None:  # a hair's breadth
        assert true_largest <= 2
        return
    picked = min(picked, LARGEST)  # no further was looked
    assert need(picked, static, slope, waste) <= budget_mib
    # Room is left below the limit (2 %), and what lies within 5 % of what ran is not looked for, nor one sample.
    lost_to_headroom = HEADROOM * budget_mib / slope / (1 + waste)
    enough = ENOUGH if failures < MOST_FAILURES else 0.6  # the bracket may still be wide
    assert picked >= enough * (true_largest - lost_to_headroom) - 1


def test_where_parameters_fill_the_budget_the_first_try_is_what_the_lower_limit_lets_run():
    """2 % of such a limit are most of the room; larger sizes, up to the full limit, would only fail."""
    profile, _ = confirmed(381, static=367, slope=0.5, waste=0)
    assert profile.largest_micro_batch_size(accumulation_steps=2) == 12


def test_nothing_is_run_where_nothing_ran():
    assert next_to_run(Profile((), "CPU:0", "made up"), 100 * MIB, 2, LARGEST) is None


def test_what_ran_is_enough_where_the_next_would_not_fit():
    ran = Measurement(95, 2, 99 * MIB, 0.1, "made up", 100 * MIB)
    failed = Measurement(98, 2, None, None, "made up", 100 * MIB)
    profile = Profile((ran,), "CPU:0", "made up")
    assert next_to_run(profile.with_measurement(failed), 100 * MIB, 2, LARGEST) is None
    # Negative control: with more room between the two, it goes on.
    far = Measurement(120, 2, None, None, "made up", 200 * MIB)
    wide = Profile((Measurement(95, 2, 99 * MIB, 0.1, "made up", 200 * MIB),), "CPU:0", "made up")
    assert next_to_run(wide.with_measurement(far), 200 * MIB, 2, LARGEST) == 107


def test_where_all_peaks_near_the_limit_are_alike_it_does_not_creep():
    """As a model with a large embedding under 120 MiB, run at 96, 102, 107, 112, 117 and 123: all took 114 MiB."""
    limit_mib = 120 * (1 - HEADROOM)

    def ran(size, *peaks):
        known = zip((1, 2), peaks, strict=False)
        return [Measurement(size, k, int(peak * MIB), 0.1, "made up", int(limit_mib * MIB)) for k, peak in known]

    points = [*ran(1, 62, 74), *ran(4, 62, 74), *ran(16, 64, 74), *ran(64, 78.3, 90.5), *ran(96, 98.7, 114.5)]
    profile, tried = Profile(tuple(points), "CPU:0", "made up", memory_budget_bytes=120 * MIB), []
    while (size := next_to_run(profile, 120 * MIB, 2, LARGEST)) is not None:
        tried.append(size)
        failed = Measurement(size, 1, None, None, "made up", int(limit_mib * MIB))
        for measurement in ran(size, 114.1, 114.5) if size <= 128 else [failed]:
            profile = profile.with_measurement(measurement)
    # In steps of what the last peak leaves of the budget, eight.
    assert len(tried) <= 5 and max(size for size in tried if size <= 128) >= ENOUGH * 128


class Rehearsed(Profile):
    """What a rehearsal would say of a step that is mostly parameters, as a ResNet50's under 560 MiB."""

    is_rehearsed = True

    def largest_rehearsed(self, accumulation_steps, limit_bytes, highest):
        return max(size for size in range(highest + 1) if need(size, 376, 6.66) * MIB <= limit_bytes or size == 0)


@pytest.mark.parametrize(("enough", "is_at_least_090"), [(None, True), (ENOUGH, False)])  # negative control
def test_what_is_rehearsed_is_run_closer_to_what_is_possible(monkeypatch, enough, is_at_least_090):
    if enough:
        monkeypatch.setattr(confirmation, "ENOUGH_REHEARSED", enough)
    points = [Measurement(size, 2, int(need(size, 376, 6.66) * MIB), 0.1, "made up", 560 * MIB) for size in (1, 2, 16)]
    profile, ran = Rehearsed(tuple(points), "CPU:0", "made up", memory_budget_bytes=560 * MIB), 16
    while (size := next_to_run(profile, 560 * MIB, 2, LARGEST)) is not None:
        ran = max(ran, size)  # as what was possible, all of it runs
        peak = int(need(size, 376, 6.66) * MIB)
        profile = profile.with_measurement(Measurement(size, 2, peak, 0.1, "made up", int(560 * (1 - HEADROOM)) * MIB))
    true_largest = max(size for size in range(LARGEST) if need(size, 376, 6.66) <= 560)
    assert (ran > 0.9 * true_largest) == is_at_least_090
