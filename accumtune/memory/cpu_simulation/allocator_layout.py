"""Defines the layout of TensorFlow's allocator on a CPU before training: one region, and a shelf of small free chunks.

`tensorflow_setup` gives the real allocator this layout, `opened_allocator` the simulated one. No TensorFlow here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from accumtune.memory.cpu_simulation.allocator import ALIGNMENT, FIRST_REGION_BYTES, MIB, Allocator

# The shelf: sizes in bytes, and the largest number of chunks of each; the chunks of one size take at most this share of
# a budget. A network of two hundred layers holds some thousand small tensors, which would otherwise lie between its
# activations.
SHELF = ((1024, 1024), (4096, 512), (16384, 128), (65536, 32), (262144, 8))
SHELF_SHARE = 1 / 64
# Before the shelf come chunks of the smallest size, for a graph's constants, some 300 to 3,000 that are never freed.
# With their separators they take at most this share of a budget.
CONSTANTS_SHARE = 1 / 64
CONSTANTS = 128  # cut by one operation
MOST_CONSTANTS = 64 * CONSTANTS
# Of a process without a limit; TensorFlow adds further regions if need be.
LARGEST_REGION_BYTES = 2048 * MIB


def region_bytes(budget_bytes: int | None, total_bytes: int) -> int:
    """Returns the size of the one region that the allocator is made to take.

    Under a budget, that is all but TensorFlow's first region, which the request itself needs; a larger request would
    be refused, after 10 s. Untouched pages take no memory, but the allocator's own table takes a thirty-second of a
    region.
    """
    if budget_bytes is None:
        return min(total_bytes // 2, LARGEST_REGION_BYTES)
    return budget_bytes - FIRST_REGION_BYTES


def constant_chunks(budget_bytes: int | None) -> int:
    """Returns the number of chunks of the smallest size, a multiple of `CONSTANTS`."""
    if budget_bytes is None:
        return MOST_CONSTANTS
    wanted = int(budget_bytes * CONSTANTS_SHARE / (2 * ALIGNMENT)) // CONSTANTS * CONSTANTS
    return min(MOST_CONSTANTS, max(CONSTANTS, wanted))


def shelf_chunks(budget_bytes: int | None) -> Iterator[int]:
    """Yields the sizes of the shelf's chunks, in bytes."""
    for chunk_bytes, most in SHELF:
        count = most if budget_bytes is None else min(most, int(budget_bytes * SHELF_SHARE) // chunk_bytes)
        yield from itertools.repeat(chunk_bytes, count)


def opened_allocator(budget_bytes: int | None) -> Allocator:
    """Returns a simulated allocator in the state in which `tensorflow_setup` leaves the real one."""
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
