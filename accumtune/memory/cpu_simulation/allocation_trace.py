"""Holds the requests of a few updates to TensorFlow's allocator, and predicts those at another micro-batch size.

The requests of a step are the same at every micro-batch size, in the same order. Each is either constant, or grows
linearly with the micro-batch; two traces show which. The simulated allocator then gives the peak of a size that never
ran, and whether it runs under a limit.
"""

from __future__ import annotations

import base64
import json
import lzma
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from accumtune.memory.cpu_simulation.allocator_layout import opened_allocator

# A request that grows in proportion to the micro-batch has at least this share of that proportion at the smaller size,
# because of rounding.
FASTEST_GROWTH = 0.9


@dataclass(frozen=True)
class Trace:
    """The requests of a process that trained a few updates, from the opening of its device on.

    Args:
        micro_batch_size: samples per micro-step.
        events: a number for each request or return. A request is its bytes, at least 0; a return is -1 minus the index
            of the request whose memory is returned.
        names: of each request: the operation that made it, and its kind.
        phases: `(accumulation_steps, first event)` for each phase of the training. Phases with `accumulation_steps` 0
            do not belong to an update.
    """

    micro_batch_size: int
    events: tuple[int, ...]
    names: tuple[str, ...]
    phases: tuple[tuple[int, int], ...]

    @cached_property
    def requests(self) -> np.ndarray:
        """The bytes of each request."""
        return np.array([event for event in self.events if event >= 0], dtype=np.int64)

    @cached_property
    def groups(self) -> dict[tuple[int, str], list[int]]:
        """The indices of the requests by phase and name, in their order."""
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        starts = [first for _, first in self.phases] + [len(self.events)]
        phase = request = 0
        for number, event in enumerate(self.events):
            while number >= starts[phase]:
                phase += 1
            if event >= 0:
                groups[phase, self.names[request]].append(request)
                request += 1
        return dict(groups)

    @cached_property
    def _requests_of_events(self) -> np.ndarray:
        """The index of the request that each event makes or returns."""
        made = np.cumsum([event >= 0 for event in self.events]) - 1
        events = np.array(self.events, dtype=np.int64)
        return np.where(events >= 0, made, -1 - events)

    @cached_property
    def _is_returned(self) -> np.ndarray:
        returned = np.zeros(len(self.names), dtype=bool)
        returned[[-1 - event for event in self.events if event < 0]] = True
        return returned

    def peaks(self, requests: np.ndarray, budget_bytes: int | None, ignored_bytes: int = 0) -> dict[int, int] | None:
        """Simulates the allocator and returns the peak in bytes by accumulation steps.

        Args:
            requests: the bytes of each request; they replace the recorded ones.
            budget_bytes: the limit.
            ignored_bytes: smaller requests that are returned later are left out, for speed.

        Returns:
            None if memory runs out.
        """
        allocator = opened_allocator(budget_bytes)
        set_aside = allocator.held_bytes
        is_kept = ~((requests <= ignored_bytes) & self._is_returned)
        which = self._requests_of_events
        chunks: dict[int, Any] = {}
        peaks: dict[int, int] = {}
        for (steps, first), (_, end) in zip(self._parts, [*self._parts[1:], (0, len(self.events))], strict=True):
            allocator.peak_bytes = allocator.held_bytes
            for request in which[first:end][is_kept[which[first:end]]].tolist():
                chunk = chunks.pop(request, None)
                if chunk is not None:
                    allocator.free(chunk)
                    continue
                chunk = allocator.allocate(int(requests[request]))
                if chunk is None:
                    return None
                chunks[request] = chunk
            peaks[steps] = max(peaks.get(steps, 0), allocator.peak_bytes)
        return {steps: peak - set_aside for steps, peak in peaks.items() if steps}

    @property
    def _parts(self) -> list[tuple[int, int]]:
        return [(0, 0), *self.phases]

    def to_dict(self) -> dict[str, Any]:
        distinct = sorted(set(self.names))
        number = {name: index for index, name in enumerate(distinct)}
        return {
            "micro_batch_size": self.micro_batch_size,
            "phases": [list(phase) for phase in self.phases],
            "distinct_names": _packed(json.dumps(distinct).encode()),
            "names": _packed(np.array([number[name] for name in self.names], dtype="<i4").tobytes()),
            "events": _packed(np.array(_relative(self.events), dtype="<i8").tobytes()),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trace:
        distinct = json.loads(_unpacked(values["distinct_names"]))
        return cls(
            micro_batch_size=values["micro_batch_size"],
            events=_relative(np.frombuffer(_unpacked(values["events"]), dtype="<i8").tolist()),
            names=tuple(distinct[n] for n in np.frombuffer(_unpacked(values["names"]), dtype="<i4").tolist()),
            phases=tuple((steps, first) for steps, first in values["phases"]),
        )


@dataclass(frozen=True)
class Lines:
    """The requests of a trace as linear functions of the micro-batch, through the same requests of another trace."""

    micro_batch_size: int
    requests: np.ndarray
    slopes: np.ndarray

    @classmethod
    def through(cls, trace: Trace, other: Trace) -> Lines:
        ours = trace.requests
        theirs = ours.copy()
        for key, numbers in trace.groups.items():
            partners = _partners(key[1], numbers, other.groups.get(key, []), trace, other)
            for number, partner in zip(numbers, partners, strict=True):
                if partner is not None:
                    theirs[number] = other.requests[partner]
        size, other_size = trace.micro_batch_size, other.micro_batch_size
        small, large = (theirs, ours) if other_size < size else (ours, theirs)
        # A request that shrinks, or grows faster than the micro-batch: small sizes used another algorithm.
        is_other = (small > large) | (small * max(size, other_size) < FASTEST_GROWTH * large * min(size, other_size))
        slopes = np.where(is_other, 0.0, (ours - theirs) / (size - other_size))
        return cls(size, np.where(is_other, large, ours), slopes)

    def at(self, micro_batch_size: int) -> np.ndarray:
        """Returns the bytes of each request at another micro-batch size."""
        wanted = np.rint(self.requests + self.slopes * (micro_batch_size - self.micro_batch_size))
        requests: np.ndarray = np.maximum(wanted, 0).astype(np.int64)
        return requests


def _partners(
    name: str, numbers: Sequence[int], others: Sequence[int], trace: Trace, other_trace: Trace
) -> list[int | None]:
    """Returns, for each of these requests of a trace, the same request of the other trace, or None.

    Requests of an operation come in the same order. Those without a name are made by Python, in an order that may
    differ: they are matched by a size in proportion to the micro-batch (data), or else by the same size.
    """
    if name:
        return [*others[: len(numbers)], *[None] * (len(numbers) - len(others))]
    free: dict[int, list[int]] = defaultdict(list)
    for other in reversed(others):
        free[int(other_trace.requests[other])].append(other)
    partners: list[int | None] = [None] * len(numbers)
    for numerator, denominator in ((other_trace.micro_batch_size, trace.micro_batch_size), (1, 1)):
        for place, number in enumerate(numbers):
            size, rest = divmod(int(trace.requests[number]) * numerator, denominator)
            if partners[place] is None and not rest and free.get(size):
                partners[place] = free[size].pop()
    return partners


def _relative(events: Sequence[int]) -> tuple[int, ...]:
    """Counts returns from the latest request, so that equal updates are equal numbers. Its own inverse."""
    relative, made = [], 0
    for event in events:
        made += event >= 0
        relative.append(event if event >= 0 else -1 - made - event)
    return tuple(relative)


def _packed(content: bytes) -> str:
    return base64.b64encode(lzma.compress(content)).decode()


def _unpacked(text: str) -> bytes:
    return lzma.decompress(base64.b64decode(text))
