"""The choice of a search's ghost batch."""

import pytest

from accumtune.accumulation.batch_pair import BatchPair
from accumtune.errors import BatchSizeError, SearchError
from accumtune.search import ghost_batches
from accumtune.search.feasibility import feasible_pairs, next_smaller_pair


@pytest.mark.parametrize(
    "listed, largest", [((8, 16, 32, 64), 32), ((2, 4, 8), 8), ((64, 128), 32), ((24, 48), 24), ((40, 80), 40)]
)
def test_auto_is_32_or_the_largest_listed_micro_batch_below(listed, largest):
    assert ghost_batches.chosen(listed, lambda size: True) == largest


def test_auto_is_the_largest_that_fits_and_the_smallest_where_none_does():
    assert ghost_batches.chosen((2, 4, 8), lambda size: size <= 4) == 4
    assert ghost_batches.chosen((2, 4, 8), lambda size: False) == 2


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
