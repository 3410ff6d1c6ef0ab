"""Chooses the size to probe next, so that a few probes predict all other sizes. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from accumtune.memory.prediction.profile import LARGEST_EXTRAPOLATION, MARGIN, MIB, Profile

# Once the slope is known, the next probe may be this many times as large.
LARGEST_PROBE_STEP = 8
# A size clearly fits if, even were the whole peak to grow with it, the budget is this many times the peak.
CLEAR_ROOM = 1.5
# A size within this factor of a measured one is not worth a probe.
SMALLEST_PROBE_STEP = 1.2


def next_probe_size(profile: Profile, budget_bytes: int | None, micro_batch_sizes: Sequence[int]) -> int | None:
    """Returns the size to probe next, or `None` when enough is known.

    First the smallest, then larger ones, each at most eightfold (any factor where it clearly fits, or if steps are
    rehearsed), until the largest that should fit is measured. Without a budget, until most of the peak grows with the
    micro-batch, and at most four sizes.

    Args:
        profile: the measurements so far.
        budget_bytes: the limit that the probes run under.
        micro_batch_sizes: the sizes to choose from.
    """
    measured = profile.measured_sizes()
    failed = min((m.micro_batch_size for m in profile.measurements if not m.is_feasible), default=None)
    candidates = [size for size in sorted(set(micro_batch_sizes)) if failed is None or size < failed]
    if not measured:
        # All have failed so far: go halfway down to the smallest.
        return candidates[0 if failed is None else (len(candidates) - 1) // 2] if candidates else None
    if not profile.shows_slope and failed is None and candidates[0] < measured[0]:
        return candidates[0]
    larger = [size for size in candidates if size > measured[-1]]
    if larger and budget_bytes is not None and not profile.shows_slope:
        # If no listed size could fit, twice the measured size shows the slope.
        larger = [size for size in larger if _is_open(profile, size, budget_bytes)]
        double = 2 * measured[0]
        if not larger and (failed is None or double < failed) and _is_open(profile, double, budget_bytes):
            return double
    if budget_bytes is None:
        if len(measured) >= 4 or (len(measured) > 1 and _grows_at(profile, measured[-1])):
            return None
    else:
        larger = [size for size in larger if _is_open(profile, size, budget_bytes)]
    if failed is not None:
        # The prediction was wrong: bisect between the sizes that ran and failed.
        halfway = [size for size in larger if size * size <= measured[-1] * failed] or larger[:1]
        return halfway[-1] if halfway else None
    reach = _reach(profile)
    within_reach = [s for s in larger if s <= reach or _clearly_fits(profile, s, budget_bytes)] or larger[:1]
    return within_reach[-1] if within_reach else None


def _is_open(profile: Profile, size: int, budget_bytes: int | None) -> bool:
    """Returns whether a size could fit. With one measured size, half of the peak is assumed to grow."""
    if budget_bytes is None:
        return True
    measured = profile.measured_sizes()
    if size < SMALLEST_PROBE_STEP * measured[-1]:
        return False
    if not profile.shows_slope:
        if size <= 2 * measured[0] and profile.is_peak_of_validation(measured[0], 1):
            return True  # what grows with the micro-batch is less
        peak = min(m.peak_memory_bytes for m in profile.measurements if m.peak_memory_bytes is not None)
        # Up to twice the size, any room is enough.
        growth = (1 + size / measured[0]) / 2 if size > 2 * measured[0] else 1 + MARGIN
        return peak * growth + MIB <= budget_bytes
    steps = max(m.accumulation_steps for m in profile.measurements)
    if profile.is_rehearsed:
        return profile.largest_rehearsed(steps, budget_bytes, size) == size
    return profile.needed_bytes(size, steps) * (1 + MARGIN) + MIB <= budget_bytes


def _clearly_fits(profile: Profile, size: int, budget_bytes: int | None) -> bool:
    """Returns whether a size fits even if the whole peak grows with it, and with what the whole window takes."""
    largest = profile.measured_sizes()[-1]
    peaks = [m.peak_memory_bytes or 0 for m in profile.measurements if m.micro_batch_size == largest]
    # A loss over pairs of samples grows faster than the micro-batch.
    window_bytes = profile.window.at_once(size * max(m.accumulation_steps for m in profile.measurements))
    needed = CLEAR_ROOM * (max(peaks) * size / largest + window_bytes) + MIB
    return budget_bytes is not None and needed <= budget_bytes


def _reach(profile: Profile) -> float:
    """Returns the largest size that is worth a probe now."""
    largest = profile.measured_sizes()[-1]
    if profile.is_rehearsed:
        return math.inf
    return largest * (LARGEST_PROBE_STEP if profile.is_straight else LARGEST_EXTRAPOLATION)


def _grows_at(profile: Profile, size: int) -> bool:
    """Returns whether most of the peak grows with the micro-batch."""
    return profile.predict_peak_memory(2 * size) > 1.5 * profile.predict_peak_memory(size)
