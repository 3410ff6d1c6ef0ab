"""Chooses the size to run next, to confirm the largest micro-batch that runs under the budget. Pure arithmetic.

A prediction is the memory that a step asks for. A nearly full allocator needs more, because its free memory is
fragmented; if the step cannot be rehearsed, only running it shows how much. So the largest size is bracketed between
sizes that have run and sizes that have failed or would. There are few tries, because each costs a process, a trace and
perhaps a failure.
"""

from __future__ import annotations

from accumtune.memory.prediction.profile import HEADROOM, LARGEST_EXTRAPOLATION, MIB, Profile

# The search ends when the largest size that has run is this share of the largest possible one. A rehearsal knows that
# one within a few MiB, so one more try is worth it: if most of a budget is parameters, `HEADROOM` alone costs 0.07.
ENOUGH = 0.95
ENOUGH_REHEARSED = 0.97
# The share that the allocator is expected to need beyond the prediction.
_EXPECTED_WASTE = 0.03
# The share of a limit that the real step may need beyond the rehearsed one. Less than `REHEARSED_MARGIN`, so that no
# larger size than the one that has run is predicted to fit.
_REHEARSAL_ERROR = 0.015
MOST_TRIES, MOST_FAILURES = 7, 3


def next_to_run(profile: Profile, budget_bytes: int, accumulation_steps: int, largest_size: int) -> int | None:
    """Returns the size to run next under the budget, or None once the largest that runs is known well enough.

    Args:
        profile: the measurements so far.
        budget_bytes: the limit.
        accumulation_steps: of the updates that run.
        largest_size: the largest size of interest.
    """
    ran, failed = profile.bracket(accumulation_steps, budget_bytes)
    if ran == 0:
        return None
    highest = min(largest_size, LARGEST_EXTRAPOLATION * ran)
    if len({m.micro_batch_size for m in profile.measurements if m.is_feasible}) == 1:
        possible = min(highest, 2 * ran)  # one size does not show the slope
    else:
        # Sizes are confirmed under a limit that is lower by `HEADROOM`; a rehearsal needs that exact limit.
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
        limits = [(1 - HEADROOM - _REHEARSAL_ERROR) * budget_bytes]
    else:
        limits = [budget_bytes / (1 + HEADROOM + _EXPECTED_WASTE) - MIB, (1 - HEADROOM) * budget_bytes]
    for limit in limits:
        cautious = _largest_below(profile, accumulation_steps, limit, possible)
        # Near the limit the prediction may rise with each size that has run: avoid small steps.
        if enough * cautious > ran:
            return cautious
    return possible


def _largest_below(profile: Profile, steps: int, limit_bytes: float, highest: int) -> int:
    """Returns the largest size up to `highest` that is expected to run under the limit; 0 if there is none."""
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
