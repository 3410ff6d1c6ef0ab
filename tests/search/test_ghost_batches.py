"""The choice of a search's ghost batch."""

import pytest

from accumtune.accumulation.batch_pair import BatchPair
from accumtune.errors import BatchSizeError, SearchError
from accumtune.search import ghost_batches
from accumtune.search.feasibility import effective_batch_sizes, feasible_pairs, next_smaller_pair


@pytest.mark.parametrize(
    "micro, steps, largest, left_out",
    [
        ((8, 16, 32, 64, 128), (1, 2, 4, 8, 16), 32, []),
        ((2, 8, 32), (4, 16), 32, []),
        ((2, 4, 8), (1, 2), 8, []),
        ((64, 128), (1, 2), 32, []),
        ((24, 48), (1, 2), 24, []),
        ((40, 80), (1, 2), 20, []),
        ((12, 24), (2, 3), 12, []),  # 24 would lose 36
        ((4, 6, 8), (1, 2), 8, [12]),  # as no number of 8 and more keeps it
        ((37, 74), (1, 2), 37, []),
    ],
)
def test_auto_is_the_largest_up_to_32_that_keeps_all_effective_batches(micro, steps, largest, left_out):
    """A smaller effective batch is one group."""
    effective = effective_batch_sizes(micro, steps)
    assert ghost_batches.chosen(micro, effective, lambda size: True) == largest
    assert [size for size in effective if size not in ghost_batches.realised(effective, largest)] == left_out


def test_auto_is_the_largest_that_fits_and_the_smallest_where_none_does():
    effective = effective_batch_sizes((2, 4, 8), (1, 2))
    assert ghost_batches.chosen((2, 4, 8), effective, lambda size: size <= 4) == 4
    assert ghost_batches.chosen((2, 4, 8), effective, lambda size: False) == 1


def test_a_smaller_effective_batch_is_one_micro_batch():
    pairs = {size: feasible_pairs(AllFit(), size, (2, 8, 32), None, ghost_batch_size=32) for size in (8, 32, 64)}
    assert pairs == {8: [BatchPair(8, 1)], 32: [BatchPair(32, 1)], 64: [BatchPair(32, 2)]}
    assert next_smaller_pair(BatchPair(8, 1), (2, 8, 32), ghost_batch_size=32) is None


def test_what_a_search_says_of_it():
    (text,) = ghost_batches.line(32, "auto", (8, 32, 48, 64))
    assert "the largest up to 32" in text
    assert "Smaller effective batches are one group: 8." in text and "left out: 48." in text
    assert "the largest" not in ghost_batches.line(32, 32, (32,))[0] and ghost_batches.line(None, "auto", (32,)) == []


@pytest.mark.parametrize("asked", [0, -8, 2.0, True, "16", "pairs"])
def test_what_is_no_ghost_batch(asked):
    with pytest.raises(BatchSizeError, match="ghost_batch_size"):
        ghost_batches.check(asked, (8, 16))


def test_a_ghost_batch_that_divides_no_micro_batch():
    assert ghost_batches.check(8, (4, 16)) == 8
    with pytest.raises(BatchSizeError, match=r"ghost_batch_size=32 and micro_batch_sizes=\(8, 16\)"):
        ghost_batches.check(32, (8, 16))


def test_a_hyperparameter_of_the_same_name():
    ghost_batches.refuse_own(["width"])
    with pytest.raises(SearchError, match="hyperparameter 'ghost_batch_size'"):
        ghost_batches.refuse_own(["width", "ghost_batch_size"])


class AllFit:
    def fits(self, micro_batch_size, accumulation_steps, budget_bytes):
        return True


def test_micro_batches_are_multiples_of_the_ghost_batch():
    """Also those that are not listed."""
    listed, others = (
        [pair.micro_batch_size for pair in feasible_pairs(AllFit(), 96, sizes, None, ghost_batch_size=8)]
        for sizes in ((4, 8, 16), (5,))
    )
    assert listed == [8, 16] and others == [8, 16, 24, 32, 48, 96]
    assert next_smaller_pair(BatchPair(16, 6), (4, 8, 16), ghost_batch_size=8) == BatchPair(8, 12)
    assert next_smaller_pair(BatchPair(8, 12), (4, 8, 16), ghost_batch_size=8) is None
    assert next_smaller_pair(BatchPair(8, 12), (4, 8, 16)) == BatchPair(4, 24)  # the negative control
