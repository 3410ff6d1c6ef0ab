"""Plays a training at any micro-batch size through in the simulated allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accumtune.memory.cpu_simulation.allocation_trace import Lines, Trace

# How many traces are played through, the largest.
ORDERS = 2
# Requests of no more than this, and than this part of the largest one, come and go in the small chunks of the shelf.
SMALL_BYTES, SMALL_SHARE = 4096, 1024
# How far apart the sizes are that are tried.
STEP = 1.04


class Rehearsal:
    """Says from traces of a model what an update peaks at, and whether it runs under a limit.

    A step's requests come in one order (`operation_order`), but for a graph that cannot run so, and for what
    Python asks for. With the order the peak differs. Each trace has one, so more than one is played through.

    Args:
        traces: of at least two micro-batch sizes.
    """

    def __init__(self, traces: Sequence[Trace]) -> None:
        known = sorted(traces, key=lambda trace: trace.micro_batch_size)
        self._orders = [
            (known[index], Lines.through(known[index], known[index - 1 if index else 1]))
            for index in range(max(0, len(known) - ORDERS), len(known))
        ]
        self._peaks: dict[tuple[int, int | None], list[dict[int, int]] | None] = {}

    def peak_bytes(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int | None = None) -> int | None:
        """The mean peak of an update over the orders that are known; without a budget, where memory is to spare.

        Args:
            micro_batch_size: any size.
            accumulation_steps: of those that were traced.
            budget_bytes: the limit, of which TensorFlow takes whole MiB.

        Returns:
            None where memory runs out in one of the orders.
        """
        key = micro_batch_size, budget_bytes
        if key not in self._peaks:
            self._peaks[key] = self._played(micro_batch_size, budget_bytes)
        peaks = self._peaks[key]
        return None if peaks is None else sum(peak[accumulation_steps] for peak in peaks) // len(peaks)

    def _played(self, micro_batch_size: int, budget_bytes: int | None) -> list[dict[int, int]] | None:
        played = []
        for trace, lines in self._orders:
            requests = lines.at(micro_batch_size)
            ignored = min(SMALL_BYTES, int(requests.max(initial=0)) // SMALL_SHARE)
            peaks = trace.peaks(requests, budget_bytes, ignored)
            if peaks is None:
                return None
            played.append(peaks)
        return played


def largest_before_failure(runs: Callable[[int], bool], smallest: int, highest: int) -> int:
    """The largest size below the first one that does not run, looked for upwards; 0 where the smallest does not.

    A larger one may run again, where its requests happen to fit the pieces of free memory; it is not relied upon.
    """
    if not runs(smallest):
        return 0
    fitting, failing = smallest, highest + 1
    while fitting < highest:
        further = min(highest, max(fitting + 1, int(fitting * STEP)))
        if not runs(further):
            failing = further
            break
        fitting = further
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if runs(middle):
            fitting = middle
        else:
            failing = middle
    return fitting
