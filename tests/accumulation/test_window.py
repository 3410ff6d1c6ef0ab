"""The arithmetic of a window: shares, means and sums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accumtune.accumulation.window import Accumulation, factors, shares, split
from accumtune.errors import BatchSizeError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(st.integers(0, 500), st.integers(1, 600))
def test_micro_batches_cover_the_batch_once_and_in_order(effective, micro):
    parts = split(effective, micro)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(effective))
    assert all(part.stop - part.start == micro for part in parts[:-1])
    assert all(0 < part.stop - part.start <= micro for part in parts)


@given(SIZES)
def test_shares_are_parts_of_one(samples):
    assert sum(shares(samples)) == pytest.approx(1)


@given(SIZES, st.integers(0, 1000))
def test_weighted_means_make_the_mean_of_the_window(samples, seed):
    """Each sample holds some valid tokens; the window's loss is the mean over all of them."""
    random = np.random.default_rng(seed)
    tokens = [list(random.normal(size=random.integers(0, 4) * number)) for number in samples]
    counts = [len(values) for values in tokens]
    means = [np.mean(values) if values else 0.0 for values in tokens]
    together = [value for values in tokens for value in values]
    expected = np.mean(together) if together else 0.0
    parts = zip(shares(samples), factors(samples, counts), means, strict=True)
    assert sum(share * factor * mean for share, factor, mean in parts) == pytest.approx(expected, abs=1e-12)


@given(SIZES)
def test_sums_add_up(samples):
    sums = np.arange(len(samples), dtype=float)
    parts = zip(shares(samples), factors(samples), sums, strict=True)
    assert sum(share * factor * value for share, factor, value in parts) == pytest.approx(sums.sum())


def test_mean_of_means_is_another_number():
    """Negative control: what accumulating (sum of means) / k would give."""
    samples, means = [4, 4, 2], [1.0, 2.0, 9.0]
    assert sum(np.multiply(shares(samples), means)) == pytest.approx(3.0)
    assert np.mean(means) == 4.0


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation_steps"),
    [(None, None), (4, 2), (0, None), (-1, None), (2.0, None), ("8", None), (True, None), (None, 0), (None, 1.5)],
)
def test_sizes_that_make_no_window(micro_batch_size, accumulation_steps):
    with pytest.raises(BatchSizeError) as caught:
        Accumulation.read(micro_batch_size, accumulation_steps)
    assert "Expected:" in str(caught.value) and "Fix:" in str(caught.value)


def test_numpy_integers_are_whole_numbers():
    assert Accumulation.read(np.int64(8), None) == Accumulation(micro_batch_size=8)
