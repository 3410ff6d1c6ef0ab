"""What a search tells its user before it begins."""

import numpy as np
import pytest

from accumtune.search.console.advice import advice
from accumtune.search.results import search_results as results


def texts(**changes):
    settings = {
        "hyperparameters": ["width", "learning_rate"], "effective_batch_sizes": (8, 64), "learning_rate_scaling": None,
        "batch_coupled_layers": [], "searches_pairs": False,
    }  # fmt: skip
    return advice(**{**settings, **changes})


def test_nothing_to_say():
    assert texts() == []
    assert texts(hyperparameters=["width", "lr"]) == []
    assert texts(hyperparameters=["width"], learning_rate_scaling="sqrt") == []
    assert texts(hyperparameters=["width"], effective_batch_sizes=(64,)) == []


def test_a_fixed_learning_rate_with_many_batches():
    (text,) = texts(hyperparameters=["width", "filters"])
    assert "learning_rate_scaling" in text


def test_coupled_layers_are_named_with_what_follows():
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"], searches_pairs=True)
    assert "bn_1" in text and "are searched too" in text
    (text,) = texts(batch_coupled_layers=["BatchNormalization bn_1"])
    assert "search_over='pairs'" in text


def test_batches_larger_than_the_data_are_told():
    (text,) = texts(effective_batch_sizes=(64, 128, 256, 512), samples=133)
    assert "133 samples" in text and "256, 512" in text and "64" not in text
    assert texts(effective_batch_sizes=(64, 128, 256), samples=133) == []  # one of them is the whole batch, on purpose
    assert texts(effective_batch_sizes=(64, 128, 256), samples=None) == []


@pytest.mark.parametrize(
    "x, samples",
    [
        (np.zeros((5, 2)), 5),
        ({"a": np.zeros((5, 2)), "b": np.zeros(5)}, 5),
        ((np.zeros((5, 2)), {"b": np.zeros(5)}), 5),
        (lambda: 1, None),
        (None, None),
    ],
    ids=["array", "dict", "tuple", "function", "none"],
)
def test_samples_are_counted_where_they_can_be(x, samples):
    assert results.count_samples((x, None), {}) == samples
    assert results.count_samples((x, None), {"validation_split": 0.2}) is None
