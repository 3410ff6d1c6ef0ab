"""Chooses the size to run next, to find out how much really runs under the budget. Pure arithmetic.

A prediction is of what a step asks for. How much more the allocator needs when it is nearly full (its free memory is
in pieces) is not in it, and where a step cannot be rehearsed it is not known without running there. So the largest
size is bracketed, between what has run and what has not, or certainly would not; few tries, since each costs a process,
a trace and perhaps a failure.
"""

from __future__ import annotations

from accumtune.memory.prediction.profile import HEADROOM, LARGEST_EXTRAPOLATION, MIB, Profile

# How much of what could still be possible has to have run. A rehearsal says what is possible within a few MiB, so that
# one more try is worth it: where most of a budget is parameters, `HEADROOM` alone costs 0.07 of the largest that runs.
ENOUGH = 0.95
ENOUGH_REHEARSED = 0.97
# What the allocator is expected to need beyond the prediction.
_EXPECTED_WASTE = 0.03
# How much of a limit the real step may need beyond the rehearsed one; less than `REHEARSED_MARGIN` leaves, so that
# nothing larger than what has run is promised.
_REHEARSAL_ERROR = 0.015
MOST_TRIES, MOST_FAILURES = 7, 3


def next_to_run(profile: Profile, budget_bytes: int, accumulation_steps: int, largest_size: int) -> int | None:
    """The size to run next under the budget, or None where the largest that runs is known well enough.

    Args:
        profile: what was measured so far.
        budget_bytes: the limit.
        accumulation_steps: of the updates that run.
        largest_size: no larger one is of interest.
    """
    ran, failed = profile.bracket(accumulation_steps, budget_bytes)
    if ran == 0:
        return None
    highest = min(largest_size, LARGEST_EXTRAPOLATION * ran)
    if len({m.micro_batch_size for m in profile.measurements if m.is_feasible}) == 1:
        possible = min(highest, 2 * ran)  # one size tells nothing of the slope
    else:
        # A rehearsal is asked about the limit it will run under, for a few MiB more say nothing of it.
        limit = (1 - HEADROOM) * budget_bytes if profile.is_rehearsed else budget_bytes
        possible = _largest_below(profile, accumulation_steps, limit, highest)
    if failed is not None:
        possible = min(possible, failed - 1)
    enough = ENOUGH_REHEARSED if profile.is_rehearsed else ENOUGH
    if possible <= ran or ran >= enough * possible:
        return None
    if failed is not None:
        return (ran + possible + 1) // 2
    if profile.is_rehearsed:
        limit = (1 - HEADROOM - _REHEARSAL_ERROR) * budget_bytes
    else:
        limit = budget_bytes / (1 + HEADROOM + _EXPECTED_WASTE) - MIB
    cautious = _largest_below(profile, accumulation_steps, limit, possible)
    # Near the limit all peaks can be alike, so that the prediction moves along with what has run: no small steps there.
    return cautious if enough * cautious > ran else possible


def _largest_below(profile: Profile, steps: int, limit_bytes: float, highest: int) -> int:
    """The largest size up to `highest` that is expected to run under the limit; 0 where none is."""
    if profile.is_rehearsed:
        return profile.largest_rehearsed(steps, limit_bytes, highest)
    fitting, failing = 0, highest + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if profile.predict_peak_memory(middle, steps) <= limit_bytes:
            fitting = middle
        else:
            failing = middle
    return fitting
