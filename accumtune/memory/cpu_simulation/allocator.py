"""Simulates TensorFlow's allocator (BFC: best fit, with coalescing): which chunk each request gets.

A request gets the smallest free chunk that is large enough, and all of it if that is less than twice its size. So the
allocator counts more than was asked for, and the peak of a step depends on the order of its requests. In a check, each
of a real process's 23,433 requests got the same chunk here as in TensorFlow 2.21.

Source: tensorflow, third_party/xla/xla/tsl/framework/bfc_allocator.cc.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

MIB = 2**20
ALIGNMENT = 256
# A free chunk that is larger than a request by this much is split even if it is less than twice as large.
MOST_WASTE_BYTES = 128 * MIB
FIRST_REGION_BYTES = 2 * MIB
UNLIMITED_BYTES = 64 * 1024 * MIB


class Chunk:
    """A piece of a region, with its neighbours in it."""

    __slots__ = ("address", "size", "before", "after", "is_free")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.before: Chunk | None = None
        self.after: Chunk | None = None
        self.is_free = False


class Allocator:
    """Hands out chunks and counts their bytes.

    Args:
        limit_bytes: of all regions together; `None` for TensorFlow's default on a CPU, 64 GiB.

    Attributes:
        held_bytes: of all chunks in use.
        peak_bytes: the largest `held_bytes` since `peak_bytes` was last set.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.held_bytes = 0
        self.peak_bytes = 0
        self._room = UNLIMITED_BYTES if limit_bytes is None else limit_bytes
        self._next_region_bytes = FIRST_REGION_BYTES
        self._next_address = 0
        self._free: list[tuple[int, int, Chunk]] = []  # by size, then by address, which no two share

    def allocate(self, requested_bytes: int) -> Chunk | None:
        """Returns the chunk that a request gets; `None` if memory has run out."""
        size = max(1, -(-requested_bytes // ALIGNMENT)) * ALIGNMENT
        index = bisect.bisect_left(self._free, (size,))
        if index == len(self._free):
            if not self._add_region(size):
                return None
            index = bisect.bisect_left(self._free, (size,))
        chunk = self._free.pop(index)[2]
        chunk.is_free = False
        if chunk.size >= 2 * size or chunk.size - size >= MOST_WASTE_BYTES:
            self._cut(chunk, size)
        self.held_bytes += chunk.size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Frees a chunk and merges it with its free neighbours."""
        self.held_bytes -= chunk.size
        if chunk.after is not None and chunk.after.is_free:
            self._take_out(chunk.after)
            _join(chunk, chunk.after)
        if chunk.before is not None and chunk.before.is_free:
            self._take_out(chunk.before)
            chunk = chunk.before
            _join(chunk, chunk.after)
        self._put_in(chunk)

    def cut_shelf(self, sizes: Iterable[int]) -> None:
        """Allocates small chunks, separated by chunks of the smallest size that stay, and frees them."""
        chunks = []
        for size in sizes:
            chunks.append(self.allocate(size))
            self.allocate(1)
        for chunk in chunks:
            if chunk is not None:
                self.free(chunk)

    def _add_region(self, size: int) -> bool:
        """Adds a region twice as large as the last, or larger if need be; returns whether there is room.

        A region that had to be larger does not count as the next doubling.
        """
        room = self._room // ALIGNMENT * ALIGNMENT
        if size > room:
            return False
        is_larger = size > self._next_region_bytes
        while size > self._next_region_bytes:
            self._next_region_bytes *= 2
        region = Chunk(self._next_address, min(self._next_region_bytes, room))
        self._next_region_bytes *= 1 if is_larger else 2
        self._next_address += region.size + MIB
        self._room -= region.size
        self._put_in(region)
        return True

    def _cut(self, chunk: Chunk, size: int) -> None:
        rest = Chunk(chunk.address + size, chunk.size - size)
        chunk.size = size
        rest.before, rest.after = chunk, chunk.after
        if rest.after is not None:
            rest.after.before = rest
        chunk.after = rest
        self._put_in(rest)

    def _put_in(self, chunk: Chunk) -> None:
        chunk.is_free = True
        bisect.insort(self._free, (chunk.size, chunk.address, chunk))

    def _take_out(self, chunk: Chunk) -> None:
        del self._free[bisect.bisect_left(self._free, (chunk.size, chunk.address))]


def _join(chunk: Chunk, after: Chunk | None) -> None:
    assert after is not None
    chunk.size += after.size
    chunk.after = after.after
    if chunk.after is not None:
        chunk.after.before = chunk
