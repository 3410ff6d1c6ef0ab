"""Runs the best candidate for a few updates if its memory is only predicted, and chooses again if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accumtune.search.results.selection import Candidate, Choice

# Each run takes a second or more. After so many that do not fit, only measured candidates are considered.
_MAX_RUNS = 5


def verified_choice(
    candidates: Callable[[], Sequence[Candidate]],
    select: Callable[[Sequence[Candidate]], Choice],
    run: Callable[[Candidate], bool],
) -> Choice:
    """Chooses a candidate that was measured in a run under the budget.

    Args:
        candidates: returns the candidates known now, with the measurements of earlier runs.
        select: the policy.
        run: trains a candidate for a few updates and returns whether it fits.
    """
    runs = 0
    while True:
        found = candidates()
        choice = select(found)
        if choice.candidate.is_measured:
            return _confirmed(choice)
        if runs == _MAX_RUNS:
            return _confirmed(select([candidate for candidate in found if candidate.is_measured]))
        runs += 1
        if not run(choice.candidate):
            candidates = _without(candidates, choice.candidate)


def _without(candidates: Callable[[], Sequence[Candidate]], failed: Candidate) -> Callable[[], Sequence[Candidate]]:
    batch = (failed.effective_batch_size, failed.micro_batch_size, failed.trial_id)

    def rest() -> Sequence[Candidate]:
        return [it for it in candidates() if (it.effective_batch_size, it.micro_batch_size, it.trial_id) != batch]

    return rest


def predicted_choice(choice: Choice) -> Choice:
    """Completes a choice that cannot be run; for an unmeasured candidate the reason says so."""
    if choice.candidate.is_measured:
        return _confirmed(choice)
    return _with_clause(choice, "its memory and speed are predicted: it has not run in this micro-batch")


def _confirmed(choice: Choice) -> Choice:
    if choice.candidate.is_trained:
        return choice
    return _with_clause(choice, "a few updates under the budget confirmed its memory and speed")


def _with_clause(choice: Choice, clause: str) -> Choice:
    return replace(choice, reason=f"{choice.reason.removesuffix('.')}; {clause}.")
