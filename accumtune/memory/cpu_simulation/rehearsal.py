"""Simulates a training's memory at any micro-batch size, in the simulated allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accumtune.memory.cpu_simulation.allocation_trace import Lines, Trace

# How many traces are simulated: those of the largest sizes.
ORDERS = 2
# Requests up to this size, and up to the largest one divided by this number, are served by the shelf's small chunks.
SMALL_BYTES, SMALL_SHARE = 4096, 1024
# The factor between two sizes that are tried.
STEP = 1.04


class Rehearsal:
    """Predicts from a model's traces the peak of an update, and whether it runs under a limit.

    A step's requests come in one order (`operation_order`), except in a graph that cannot run in that order, and for
    Python's own requests. The peak depends on the order and each trace has its own, so more than one is simulated.

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
        """Returns the mean peak of an update over the traces' orders, in bytes.

        Args:
            micro_batch_size: any size.
            accumulation_steps: one that was traced.
            budget_bytes: the limit, of which TensorFlow uses whole MiB; None: memory to spare.

        Returns:
            None if memory runs out in one of the orders.
        """
        key = micro_batch_size, budget_bytes
        if key not in self._peaks:
            self._peaks[key] = self._simulated(micro_batch_size, budget_bytes)
        peaks = self._peaks[key]
        return None if peaks is None else sum(peak[accumulation_steps] for peak in peaks) // len(peaks)

    def _simulated(self, micro_batch_size: int, budget_bytes: int | None) -> list[dict[int, int]] | None:
        simulated = []
        for trace, lines in self._orders:
            requests = lines.at(micro_batch_size)
            ignored = min(SMALL_BYTES, int(requests.max(initial=0)) // SMALL_SHARE)
            peaks = trace.peaks(requests, budget_bytes, ignored)
            if peaks is None:
                return None
            simulated.append(peaks)
        return simulated


def largest_before_failure(runs: Callable[[int], bool], smallest: int, highest: int) -> int:
    """Returns the largest size below the first one that does not run, searching upwards; 0 if the smallest does not.

    A still larger size may run by chance, if its requests happen to fit the free chunks; this is not relied upon.
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
