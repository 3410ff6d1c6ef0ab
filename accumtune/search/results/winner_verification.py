"""Runs the best candidate before anybody relies on it, and chooses again where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accumtune.search.results.selection import Candidate, Choice

# Each is a process of a second or more. After so many surprises only what has run is trusted.
_MAX_RUNS = 5


def verified_choice(
    candidates: Callable[[], Sequence[Candidate]],
    select: Callable[[Sequence[Candidate]], Choice],
    run: Callable[[Candidate], bool],
) -> Choice:
    """Chooses among candidates whose memory and speed hold in a real run under the budget.

    Args:
        candidates: what is known now; after a run it knows what that measured, and leaves out what did not fit.
        select: the policy.
        run: trains a candidate for a few updates; whether it fitted.
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
            # Whatever the candidates say next, this one is out.
            candidates = _without(candidates, choice.candidate)


def _without(candidates: Callable[[], Sequence[Candidate]], failed: Candidate) -> Callable[[], Sequence[Candidate]]:
    batch = (failed.effective_batch_size, failed.micro_batch_size, failed.trial_id)

    def rest() -> Sequence[Candidate]:
        return [it for it in candidates() if (it.effective_batch_size, it.micro_batch_size, it.trial_id) != batch]

    return rest


def predicted_choice(choice: Choice) -> Choice:
    """Completes a choice where nothing can be run; its reason says so, if that is needed."""
    if choice.candidate.is_measured:
        return _confirmed(choice)
    return _with_clause(choice, "its memory and speed are predicted, as it has not run in this micro-batch")


def _confirmed(choice: Choice) -> Choice:
    # A whole training in this very micro-batch needs no words.
    if choice.candidate.is_trained:
        return choice
    return _with_clause(choice, "a few updates under the budget confirmed its memory and speed")


def _with_clause(choice: Choice, clause: str) -> Choice:
    return replace(choice, reason=f"{choice.reason.removesuffix('.')}; {clause}.")
