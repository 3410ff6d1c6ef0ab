"""Arguments that a tuner refuses before anything runs."""

import keras_tuner
import numpy as np
import pytest

import accumtune
from accumtune.errors import DataError, SearchError
from accumtune.search.argument_checks import check_search_arguments


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
        ("pruner", "which RandomSearch does not take"),
        ("pruner", "use a tuner that has it"),
    ],
)
def test_an_argument_that_the_tuner_does_not_take_is_named_with_the_one_it_resembles(name, advice, tmp_path):
    with pytest.raises(SearchError, match=f"Received {name}=") as caught:
        tuner(tmp_path, **{name: 1})
    assert advice in str(caught.value)


def test_keras_tuner_alone_would_not_say_what_to_do():
    with pytest.raises(ValueError, match="Unrecognized") as caught:
        keras_tuner.RandomSearch(lambda hp: None, objective="val_loss", memory_limit=1)
    assert "memory_budget" not in str(caught.value)


class WithItsOwnFit(keras_tuner.HyperModel):
    def fit(self, hp, model, x, y, x_val, y_val, **kwargs):
        return model.fit(x, y, validation_data=(x_val, y_val), **kwargs)


def test_weights_without_a_name_would_be_the_batch_size():
    x, y, weights = [1.0], [2.0], {"out": [3.0]}

    def check(hypermodel, fit_args):
        check_search_arguments(fit_args, {}, hypermodel, keras_tuner.Objective("loss", "min"), False)

    check(lambda hp: None, (x, y))
    check(WithItsOwnFit(), (x, y, x, y))
    with pytest.raises(SearchError, match="of type dict, is the batch_size of model.fit") as caught:
        check(keras_tuner.HyperModel(), (x, y, weights))
    assert "sample_weight=" in caught.value.fix


def test_arrays_that_do_not_belong_together_are_named():
    objective, x, y = keras_tuner.Objective("val_loss", "min"), np.zeros((8, 2)), np.zeros(8)

    def check(*data, validation_data=(x, y), hypermodel=None, **kwargs):
        kwargs["validation_data"] = validation_data
        check_search_arguments(data, kwargs, hypermodel, objective, False)

    check({"a": x, "b": [y, y]}, y, sample_weight=y)
    check(lambda: None, validation_data=(lambda: None, y[:4]))
    check(["texts", "of", "a", "task"], y)
    for data, kwargs, words in (
        ((x, y[:7]), {}, "x, y and sample_weight with arrays of 7 and 8"),
        ((x, y), {"sample_weight": y[:1]}, "x, y and sample_weight with arrays of 1 and 8"),
        ((x[:0], y[:0]), {}, "x, y and sample_weight with arrays of 0"),
        ((x, y), {"validation_data": (x[:0], y[:0])}, "validation_data with arrays of 0"),
        ((x, y), {"validation_data": (x, y, y[:2])}, "validation_data with arrays of 2 and 8"),
    ):
        with pytest.raises(DataError, match=words):
            check(*data, **kwargs)
