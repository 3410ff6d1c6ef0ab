"""What a tuner refuses before anything runs."""

import keras_tuner
import pytest

import accumtune
from accumtune.errors import SearchError


def tuner(tmp_path, **arguments):
    return accumtune.RandomSearch(
        lambda hp: None, objective="val_loss", max_trials=1, directory=tmp_path, tracking_uri=False, **arguments
    )


@pytest.mark.parametrize(
    "name, advice",
    [
        ("memory_limit", "did you mean memory_budget?"),
        ("micro_batch_size", "did you mean micro_batch_sizes?"),
        ("epochs", "those of `fit` go to search()"),
        ("zzz", "leave zzz out"),
    ],
)
def test_an_argument_that_no_tuner_takes_is_named_with_the_one_it_resembles(name, advice, tmp_path):
    with pytest.raises(SearchError, match=f"Received {name}=") as caught:
        tuner(tmp_path, **{name: 1})
    assert advice in str(caught.value)


def test_keras_tuner_alone_would_not_say_what_to_do():
    with pytest.raises(ValueError, match="Unrecognized") as caught:
        keras_tuner.RandomSearch(lambda hp: None, objective="val_loss", memory_limit=1)
    assert "memory_budget" not in str(caught.value)
