"""Computes the Pareto front of candidates, and chooses one of them by a policy.

Pure functions. A candidate whose objective is NaN, infinite or missing is never chosen and never on the front. An
unknown peak counts as the largest, an unknown throughput as the slowest.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accumtune.errors import NoResultError, SearchError
from accumtune.memory.budget import format_bytes

# How far from the best objective a policy may choose, in tolerances. Whoever asks for "memory" or "throughput" accepts
# a worse objective for it, but not any: 5 % at the default tolerance of 1 %.
_REACH = {"quality": 1.0, "memory": 5.0, "throughput": 5.0, "balanced": 10.0}


@dataclass(frozen=True)
class Candidate:
    """A configuration with what it achieves and what it costs.

    Args:
        objective: the best value of the search's objective; None or NaN where there is none.
        peak_memory_bytes: measured, or predicted by the profile where `is_trained` is false.
        throughput_samples_per_second: likewise.
        micro_batch_size: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update.
        effective_batch_size: samples per update.
        hyperparameters: all of them, these three included.
        trial_id: the trial that trained it, or that trained the same effective batch.
        is_trained: whether this pair was trained. If not, its objective is that of the same effective batch in another
            pair.
        memory_source: what measured the peak.
        is_measured: whether memory and speed were measured in a run under the budget, a whole training or a few
            updates; otherwise they are predicted.
    """

    objective: float | None
    peak_memory_bytes: float | None
    throughput_samples_per_second: float | None
    micro_batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    hyperparameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trial_id: str = ""
    is_trained: bool = True
    memory_source: str | None = None
    is_measured: bool = False


@dataclass(frozen=True)
class Choice:
    """The candidate that a policy chose, and one sentence on why."""

    candidate: Candidate
    reason: str
    policy: str = ""


Policy = str | Callable[[Sequence[Candidate]], Candidate]


def pareto_front(candidates: Iterable[Candidate], direction: str = "min") -> list[Candidate]:
    """Returns the candidates that no other beats: at least as good in all three criteria and better in one.

    Args:
        candidates: any number of them.
        direction: of the objective, `"min"` or `"max"`.

    Returns:
        The front, best objective first. Candidates that are equal in all three criteria are all on it, or none.
    """
    # Kung, Luccio and Preparata (1975): sorted by the first criterion, only an earlier candidate can dominate, so
    # a staircase of the other two decides in O(n log n). 2,000 trials x 5 micro-batch sizes take milliseconds.
    costs = sorted(((_costs(it, direction), it) for it in _usable(candidates)), key=lambda item: _order(*item))
    peaks: list[float] = []  # ascending, ...
    slowness: list[float] = []  # ... and the smallest slowness at that peak or a smaller one, descending
    front: list[Candidate] = []
    previous, was_on_front = None, False
    for cost, candidate in costs:
        if cost != previous:
            _, peak, slow = cost
            position = bisect.bisect_right(peaks, peak)
            was_on_front = position == 0 or slowness[position - 1] > slow
            if was_on_front:
                end = position
                while end < len(peaks) and slowness[end] >= slow:
                    end += 1
                peaks[position:end], slowness[position:end] = [peak], [slow]
            previous = cost
        if was_on_front:
            front.append(candidate)
    return front


def select(
    candidates: Iterable[Candidate],
    policy: Policy = "quality",
    tolerance: float = 0.01,
    direction: str = "min",
    objective_name: str = "objective",
) -> Choice:
    """Chooses the candidate to train with.

    The first three policies consider only candidates near the best objective and break ties by the other criteria.
    Throughputs within `tolerance` of each other count as equal, because they are measured: otherwise 0.1 % more speed
    could cost twice the memory.

    - `"quality"`: within `tolerance` of the best objective, the fastest, then the smallest peak.
    - `"memory"`: within five times `tolerance`, the smallest peak, then the fastest.
    - `"throughput"`: within five times `tolerance`, the fastest, then the smallest peak.
    - `"balanced"`: the knee of the front within ten times `tolerance`: the candidate nearest to the ideal point, which
      has the best value of each criterion (objective linear, memory and throughput as logarithms).
    - a callable gets all usable candidates, best objective first, and returns one of them.

    Args:
        candidates: trained ones, and untrained ones with the objective of the trial that they belong to.
        policy: one of the above.
        tolerance: as a share of the best objective's value; 0 accepts only the best. If the best is near zero, as a
            share of a hundredth of the candidates' median.
        direction: of the objective, `"min"` or `"max"`.
        objective_name: its name in the reason.

    Raises:
        NoResultError: no candidate has an objective.
        SearchError: the policy or the tolerance is unknown, or the callable returned something else.
    """
    _check(policy, tolerance, direction)
    usable = sorted(_usable(candidates), key=lambda candidate: _order(_costs(candidate, direction), candidate))
    if not usable:
        raise NoResultError(
            "There is no candidate with a finite objective.",
            "at least one completed trial whose objective is a number",
            "read the reasons of the failed trials (tuner.results_summary(), or the MLflow page), then search again.",
        )
    if callable(policy):
        return _choose_by(policy, usable)
    scale = _scale(usable)
    near = [it for it in usable if _regret(it, usable[0], direction) <= _REACH[policy] * tolerance * scale]
    if policy == "balanced":
        chosen = _knee(pareto_front(near, direction), direction)
    elif policy == "memory":
        chosen = min(near, key=lambda it: (_peak(it), _slowness(it), _order(_costs(it, direction), it)))
    else:
        fastest = max(-_slowness(it) for it in near)
        quick = [it for it in near if -_slowness(it) >= fastest * (1 - tolerance) or _slowness(it) == -fastest]
        chosen = min(quick, key=lambda it: (_peak(it), _slowness(it), _order(_costs(it, direction), it)))
    share = _REACH[policy] * tolerance
    return Choice(chosen, _reason(policy, chosen, near, len(usable), share, usable[0], objective_name), policy)


def _knee(front: Sequence[Candidate], direction: str) -> Candidate:
    def unit(values: list[float]) -> list[float]:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        width = high - low or 1.0
        return [(value - low) / width if math.isfinite(value) else 1.0 for value in values]

    axes = (
        unit([_costs(it, direction)[0] for it in front]),
        unit([math.log(_peak(it)) if _peak(it) > 0 else 0.0 for it in front]),
        unit([-math.log(-_slowness(it)) if _slowness(it) < 0 else math.inf for it in front]),
    )
    # Rounded, so that the choice does not hang on the last bit of a logarithm.
    distances = [round(math.hypot(*point), 9) for point in zip(*axes, strict=True)]
    return front[min(range(len(front)), key=lambda index: (distances[index], index))]


def _choose_by(policy: Callable[[Sequence[Candidate]], Candidate], usable: list[Candidate]) -> Choice:
    name = getattr(policy, "__name__", type(policy).__name__)
    chosen = policy(list(usable))
    if not any(chosen is candidate or chosen == candidate for candidate in usable):
        raise SearchError(
            f"The policy {name} returned {chosen!r}.",
            "one of the candidates that it was given",
            "return an element of the list, for example min(candidates, key=...).",
        )
    return Choice(chosen, f"{name} chose it among {_count(len(usable))}.", name)


def _reason(
    policy: str, chosen: Candidate, near: list[Candidate], total: int, share: float, best: Candidate, name: str
) -> str:
    if total == 1:
        return "It is the only candidate with a result."
    value = f"{name} {chosen.objective:.4g}"
    percent = f"{100 * share:.3g} %"
    if len(near) == 1:
        return f"It has the best {value} of {_count(total)}, and no other comes within {percent} of that."
    merit = {
        "quality": f"the fastest ({_speed(chosen)})",
        "memory": f"the one with the smallest peak memory ({_memory(chosen)})",
        "throughput": f"the fastest ({_speed(chosen)})",
        "balanced": f"the best compromise of {name}, memory and speed ({_memory(chosen)}, {_speed(chosen)})",
    }[policy]
    rank = "which is the best" if chosen.objective == best.objective else f"the best being {best.objective:.4g}"
    return (
        f"It is {merit} of the {len(near)} candidates, out of {total}, within {percent} of the best {name}; "
        f"its {name} is {chosen.objective:.4g}, {rank}."
    )


def _count(number: int) -> str:
    return f"{number} candidate" if number == 1 else f"{number} candidates"


def _memory(candidate: Candidate) -> str:
    return "unknown memory" if math.isinf(_peak(candidate)) else format_bytes(_peak(candidate))


def _speed(candidate: Candidate) -> str:
    return "unknown speed" if math.isinf(_slowness(candidate)) else f"{-_slowness(candidate):,.0f} samples/s"


def _usable(candidates: Iterable[Candidate]) -> list[Candidate]:
    return [it for it in candidates if it.objective is not None and math.isfinite(it.objective)]


def _costs(candidate: Candidate, direction: str) -> tuple[float, float, float]:
    """Returns the three criteria, smaller being better."""
    objective = float(candidate.objective if candidate.objective is not None else math.nan)
    return (-objective if direction == "max" else objective, _peak(candidate), _slowness(candidate))


def _peak(candidate: Candidate) -> float:
    peak = candidate.peak_memory_bytes
    return math.inf if peak is None or math.isnan(peak) else float(peak)


def _slowness(candidate: Candidate) -> float:
    throughput = candidate.throughput_samples_per_second
    return math.inf if throughput is None or math.isnan(throughput) else -float(throughput)


def _order(costs: tuple[float, float, float], candidate: Candidate) -> tuple[Any, ...]:
    """Returns a total order that does not depend on the order in which the candidates came."""
    sizes = (candidate.effective_batch_size, -candidate.micro_batch_size)
    others = repr(sorted(candidate.hyperparameters.items(), key=lambda item: item[0]))
    return (costs, not candidate.is_trained, sizes, candidate.trial_id, others)


def _regret(candidate: Candidate, best: Candidate, direction: str) -> float:
    return _costs(candidate, direction)[0] - _costs(best, direction)[0]


def _scale(usable: list[Candidate]) -> float:
    values = [abs(float(it.objective)) for it in usable if it.objective is not None]
    return max(values[0], 0.01 * statistics.median(values))


def _check(policy: Policy, tolerance: float, direction: str) -> None:
    if not callable(policy) and policy not in _REACH:
        names = ", ".join(f'"{name}"' for name in _REACH)
        raise SearchError(
            f"Received policy={policy!r}.", f"{names}, or a callable", 'use "quality" for the best objective.'
        )
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise SearchError(
            f"Received tolerance={tolerance!r}.", "a share of the best objective, 0 or more", "use tolerance=0.01."
        )
    if direction not in ("min", "max"):
        raise SearchError(f"Received direction={direction!r}.", '"min" or "max"', 'use "min" for a loss.')
