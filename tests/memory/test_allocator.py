"""The simulated allocator follows TensorFlow's rules; that it follows TensorFlow itself is in test_rehearsal.py."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accumtune.memory.cpu_simulation.allocator import ALIGNMENT, FIRST_REGION_BYTES, MIB, Allocator
from accumtune.memory.cpu_simulation.allocator_layout import constant_chunks, opened_allocator, shelf_chunks


def opened(region_mib):
    """One region with nothing in it."""
    allocator = Allocator()
    allocator.free(allocator.allocate(region_mib * MIB))
    return allocator


def test_a_request_gets_a_multiple_of_256_bytes():
    allocator = opened(16)
    assert [allocator.allocate(asked).size for asked in (0, 1, 256, 257)] == [256, 256, 256, 512]
    assert allocator.held_bytes == 1280


def test_a_chunk_of_less_than_twice_the_request_is_given_whole():
    for asked_mib, held_mib in ((5, 5), (8, 8), (9, 16)):
        allocator = opened(16)
        assert allocator.allocate(asked_mib * MIB).size == held_mib * MIB
    # Unless that would waste 128 MiB.
    assert opened(512).allocate(300 * MIB).size == 300 * MIB


def test_the_smallest_chunk_that_is_large_enough_is_taken():
    allocator = opened(64)
    chunks = [allocator.allocate(size * MIB) for size in (8, 1, 4, 1, 16)]
    for place in (0, 2, 4):
        allocator.free(chunks[place])
    assert allocator.allocate(3 * MIB).address == chunks[2].address
    assert allocator.allocate(3 * MIB).address == chunks[0].address


def test_free_neighbours_become_one():
    allocator = opened(16)
    chunks = [allocator.allocate(4 * MIB) for _ in range(4)]
    for place in (0, 2, 1):
        allocator.free(chunks[place])
    assert allocator.allocate(12 * MIB).address == chunks[0].address
    assert allocator.held_bytes == allocator.peak_bytes == 16 * MIB


def test_memory_in_pieces_runs_out_before_it_is_used_up():
    allocator = Allocator(16 * MIB)
    chunks = [allocator.allocate(MIB) for _ in range(14)]
    for chunk in chunks[::2]:
        allocator.free(chunk)
    assert allocator.held_bytes == 7 * MIB
    assert allocator.allocate(6 * MIB) is None


def test_a_limit_is_one_region_beside_the_first():
    allocator = opened_allocator(64 * MIB)
    set_aside = allocator.held_bytes
    assert set_aside < MIB
    assert allocator.allocate(64 * MIB - FIRST_REGION_BYTES - 8 * MIB) is not None
    assert allocator.allocate(8 * MIB) is None


@pytest.mark.parametrize("budget_mib", [8, 120, None])
def test_small_chunks_stay_apart(budget_mib):
    """Freed side by side, they would be one large one: a small request would cut what a large one needs next."""
    budget_bytes = budget_mib and budget_mib * MIB
    wanted = Counter([ALIGNMENT] * constant_chunks(budget_bytes) + list(shelf_chunks(budget_bytes)))
    found = Counter(size for size, _, _ in opened_allocator(budget_bytes)._free)
    # But for one beside what they were cut from, and one where a region ends.
    assert all(found[size] >= count - 2 for size, count in wanted.items())
    assert found.total() <= wanted.total() + 3  # what the first region has left, and the other one


@given(st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(0, 10)), max_size=60))
def test_what_is_held_is_what_was_given_and_not_taken_back(steps):
    allocator, held = Allocator(64 * MIB), []
    for size, place in steps:
        if held and place < len(held):
            allocator.free(held.pop(place))
        chunk = allocator.allocate(size)
        if chunk is not None:
            assert chunk.size >= size
            held.append(chunk)
        assert allocator.held_bytes == sum(chunk.size for chunk in held) <= allocator.peak_bytes <= 64 * MIB
        spans = sorted((chunk.address, chunk.address + chunk.size) for chunk in held)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for chunk in held:
        allocator.free(chunk)
    assert allocator.held_bytes == 0
