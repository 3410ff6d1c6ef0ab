"""A data set's digest tells equal content from other content."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from scipy.sparse import coo_array, csr_array

from accumtune.tracking import data_digest as digest
from accumtune.tracking.data_digest import data_digest

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


def changed(array, index):
    other = array.copy()
    other[index] = "another"
    return other


TEXTS = np.array([f"text {number}" for number in range(3000)], dtype=object)
INNER = np.empty(2, dtype=object)
INNER[:] = [np.arange(5000.0), [np.arange(5000.0), {"a": np.arange(5000.0)}]]
LABELLED = np.array([(number, str(number)) for number in range(2000)], dtype=[("a", "i8"), ("b", object)])


@pytest.mark.parametrize("index", [0, 1500, 2999])
def test_every_object_of_an_array_counts(index):
    assert data_digest(TEXTS) == data_digest(np.array(TEXTS.tolist(), dtype=object))
    assert data_digest(TEXTS) != data_digest(changed(TEXTS, index))


def test_arrays_within_arrays_count_whole():
    same, other = copy.deepcopy(INNER), copy.deepcopy(INNER)
    other[1][1]["a"][2500] = -1.0
    assert data_digest(INNER) == data_digest(same) != data_digest(other)
    other = copy.deepcopy(LABELLED)
    other["b"][1000] = "another"
    assert data_digest(LABELLED) == data_digest(copy.deepcopy(LABELLED)) != data_digest(other)


def test_sparse_and_masked_arrays_count_whole():
    dense = np.diag(np.arange(1.0, 2001.0))
    other = dense.copy()
    other[1000, 1000] = -1.0
    assert data_digest(csr_array(dense)) == data_digest(coo_array(dense)) != data_digest(csr_array(other))
    masked = np.ma.masked_array(X, X > 3)
    assert data_digest(masked) == data_digest(masked.copy()) not in (data_digest(X), data_digest(X.copy()))
    assert data_digest(np.ma.masked_array(X, X > 4)) != data_digest(masked)


def test_frames_and_tensors_of_parts_count_whole():
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert data_digest(frame) == data_digest(frame.copy()) != data_digest(frame.assign(b=["x", "z"])) is not None
    assert data_digest(frame) != data_digest(frame.rename(columns={"b": "c"}))

    def ragged(last):  # as tf.ragged.constant([[1, 2], [last]]) is
        parts = {"flat_values": np.array([1, 2, last]), "nested_row_splits": (np.array([0, 2, 3]),)}
        return SimpleNamespace(shape=(2, None), dtype="int", **parts)

    assert data_digest(ragged(3)) == data_digest(ragged(3)) != data_digest(ragged(4)) is not None


def test_objects_whose_content_cannot_be_told_have_none():
    assert data_digest(np.array([object(), object()])) is None


def test_what_cannot_be_read_without_running_it_has_none():
    assert data_digest(lambda: X, None) is None


def test_a_large_array_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(digest, "_WHOLE_BYTES", 2**12)
    monkeypatch.setattr(digest, "_PIECES", 4)
    large = np.zeros((1000, 2))
    changed = large.copy()
    changed[-1] = 1.0
    assert data_digest(large) == data_digest(large.copy()) != data_digest(changed)
