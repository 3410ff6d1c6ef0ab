"""A data set's digest tells equal content from other content."""

import numpy as np
import pytest

from accumtune.tracking import digest
from accumtune.tracking.digest import data_digest

X = np.arange(24.0).reshape(4, 6)


def test_equal_content_has_equal_digests():
    assert data_digest(X, None) == data_digest(X.copy(), None)
    assert data_digest(X) == data_digest(np.asfortranarray(X)) and len(data_digest(X)) == 16
    assert data_digest({"a": X, "b": X[:2]}) == data_digest({"b": X[:2], "a": X})


@pytest.mark.parametrize(
    "other",
    [X + 1e-9, X.astype("float32"), X.reshape(6, 4), X[:3], {"x": X}, (X, X), np.array([["text"]], dtype=object)],
)
def test_other_content_has_another(other):
    assert data_digest(other) not in (None, data_digest(X))


def test_what_cannot_be_read_without_running_it_has_none():
    assert data_digest(lambda: X, None) is None


def test_a_large_array_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(digest, "_WHOLE_BYTES", 2**12)
    monkeypatch.setattr(digest, "_PIECES", 4)
    large = np.zeros((1000, 2))
    changed = large.copy()
    changed[-1] = 1.0
    assert data_digest(large) == data_digest(large.copy()) != data_digest(changed)
