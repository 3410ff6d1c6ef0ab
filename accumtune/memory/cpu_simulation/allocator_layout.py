"""How TensorFlow's allocator is laid out on a CPU before anything trains: one region, and a shelf of small chunks.

In a file of its own, without TensorFlow, because the simulated allocator begins with the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from accumtune.memory.cpu_simulation.allocator import ALIGNMENT, FIRST_REGION_BYTES, MIB, Allocator

# Sizes in bytes, and how many of each, where those of one size come to no more than this part of a budget. A network of
# two hundred layers holds some thousand small tensors: the rest of them would lie between its activations.
SHELF = ((1024, 1024), (4096, 512), (16384, 128), (65536, 32), (262144, 8))
SHELF_SHARE = 1 / 64
# Before them come chunks of the smallest size, which a graph's constants take for good, some 300 to 3,000: with what
# keeps these chunks apart, up to this part of a budget.
CONSTANTS_SHARE = 1 / 64
CONSTANTS = 128  # ... cut at once
MOST_CONSTANTS = 64 * CONSTANTS
# Of a process without a limit; what does not fit there gets further regions.
LARGEST_REGION_BYTES = 2048 * MIB


def region_bytes(budget_bytes: int | None, total_bytes: int) -> int:
    """How much the allocator is made to take as one region.

    Pages that nobody touches take no memory. What asks for a region needs memory itself, hence TensorFlow's first one
    is there before; to ask for more than is left would be refused, after 10 s. The allocator's own table takes a
    thirty-second of a region, in real memory.
    """
    if budget_bytes is None:
        return min(total_bytes // 2, LARGEST_REGION_BYTES)
    return budget_bytes - FIRST_REGION_BYTES


def constant_chunks(budget_bytes: int | None) -> int:
    """How many chunks of the smallest size are cut, a multiple of `CONSTANTS`."""
    if budget_bytes is None:
        return MOST_CONSTANTS
    wanted = int(budget_bytes * CONSTANTS_SHARE / (2 * ALIGNMENT)) // CONSTANTS * CONSTANTS
    return min(MOST_CONSTANTS, max(CONSTANTS, wanted))


def shelf_chunks(budget_bytes: int | None) -> Iterator[int]:
    """The other sizes that are cut, in bytes."""
    for chunk_bytes, most in SHELF:
        count = most if budget_bytes is None else min(most, int(budget_bytes * SHELF_SHARE) // chunk_bytes)
        yield from itertools.repeat(chunk_bytes, count)


def opened_allocator(budget_bytes: int | None) -> Allocator:
    """The simulated allocator as `tensorflow_setup` leaves the real one."""
    allocator = Allocator(None if budget_bytes is None else budget_bytes // MIB * MIB)
    allocator.allocate(1)
    region = allocator.allocate(region_bytes(budget_bytes, 2 * LARGEST_REGION_BYTES) // MIB * MIB)
    if region is not None:
        allocator.free(region)
    shapes = [allocator.allocate(1) for _ in (1, *SHELF)]
    whole = allocator.allocate(2 * CONSTANTS)
    allocator.cut_shelf([*[ALIGNMENT] * constant_chunks(budget_bytes), *shelf_chunks(budget_bytes)])
    for chunk in (whole, *shapes):
        if chunk is not None:
            allocator.free(chunk)
    return allocator
