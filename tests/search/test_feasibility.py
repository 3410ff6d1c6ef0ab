"""An effective batch becomes the fastest pair that fits."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from accumtune.accumulation.batch_pair import BatchPair
from accumtune.search.feasibility import (
    effective_batch_sizes,
    fastest,
    feasible_pairs,
    next_smaller_pair,
    pair_for_proposal,
    training_key,
)


@dataclass
class Linear:
    """A model that takes `slope` bytes per sample of a micro-batch, and is faster with larger micro-batches."""

    slope: int = 1
    overhead: float = 1.0

    def fits(self, micro_batch_size, accumulation_steps, budget_bytes):
        return self.slope * micro_batch_size <= budget_bytes

    def predict_throughput(self, micro_batch_size, accumulation_steps=1):
        return micro_batch_size / (self.overhead + 0.01 * micro_batch_size)


sizes = st.sets(st.integers(1, 200), min_size=1, max_size=5)


def test_effective_batches_are_all_products_once():
    assert effective_batch_sizes((8, 16), (1, 2, 4)) == (8, 16, 32, 64)


def test_the_fastest_that_fits():
    assert pair_for_proposal(Linear(), 256, (8, 16, 32, 64), budget_bytes=40) == BatchPair(32, 8)


def test_more_steps_than_any_list_names_when_memory_demands_it():
    assert pair_for_proposal(Linear(), 256, (64, 128), budget_bytes=10) == BatchPair(8, 32)


def test_not_even_one_sample_fits():
    assert pair_for_proposal(Linear(slope=100), 256, (64, 128), budget_bytes=10) is None


def test_equally_fast_pairs_take_the_smaller_one():
    pairs = [BatchPair(8, 8), BatchPair(16, 4), BatchPair(32, 2)]
    assert fastest(Linear(overhead=0.0), pairs) == BatchPair(8, 8)


def test_slower_in_large_micro_batches_is_believed():
    class Cached(Linear):
        def predict_throughput(self, micro_batch_size, accumulation_steps=1):
            return {16: 100.0, 32: 120.0, 64: 90.0}.get(micro_batch_size, 1.0)

    assert pair_for_proposal(Cached(), 256, (16, 32, 64), budget_bytes=10**9) == BatchPair(32, 8)


def test_a_searched_micro_batch_that_does_not_fit_becomes_the_largest_that_does():
    assert pair_for_proposal(Linear(), 256, (8, 16, 32, 64), 40, proposed_micro_batch_size=64) == BatchPair(32, 8)
    assert pair_for_proposal(Linear(), 256, (8, 16, 32, 64), 40, proposed_micro_batch_size=16) == BatchPair(16, 16)
    assert pair_for_proposal(Linear(), 256, (64,), 40, proposed_micro_batch_size=64) is None


def test_after_a_surprise_the_next_smaller_one():
    assert next_smaller_pair(BatchPair(64, 4), (8, 16, 64)) == BatchPair(16, 16)
    assert next_smaller_pair(BatchPair(8, 3), (8,)) == BatchPair(6, 4)
    assert next_smaller_pair(BatchPair(8, 3), (8,), only_listed=True) is None
    assert next_smaller_pair(BatchPair(1, 24), (8,)) is None


@given(sizes, sizes, st.integers(1, 300))
def test_a_realised_pair_makes_the_effective_batch_and_fits(micro, steps, budget):
    for effective in effective_batch_sizes(micro, steps):
        pair = pair_for_proposal(Linear(), effective, sorted(micro), budget)
        assert pair is not None
        assert pair.effective_batch_size == effective
        assert pair.micro_batch_size <= budget
        listed = [size for size in micro if effective % size == 0 and size <= budget]
        assert not listed or pair.micro_batch_size in listed
        assert pair in feasible_pairs(Linear(), effective, sorted(micro), budget)


def test_what_counts_as_the_same_training():
    one = {"effective_batch_size": 64, "micro_batch_size": 8, "accumulation_steps": 8, "width": 4}
    two = {"width": 4, "effective_batch_size": 64, "micro_batch_size": 16, "accumulation_steps": 4}
    assert training_key(one, is_batch_coupled=False) == training_key(two, is_batch_coupled=False)
    assert training_key(one, is_batch_coupled=True) != training_key(two, is_batch_coupled=True)
    assert training_key({**one, "width": 5}, False) != training_key(one, False)
