"""Why a task failed, in one line."""

import keras
import numpy as np
import pytest

from accumtune.errors import SearchError
from accumtune.worker.training import _results
from accumtune.worker.transport.outcome import reason_of


class Refusing(keras.layers.Layer):
    def call(self, x):
        raise ValueError(f"only four features, received {x.shape[-1]}")


def fails(layers, x, y):
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(Exception) as caught:
        model.fit(x, y, verbose=0)
    return reason_of(caught.value)


def test_the_reason_is_the_cause_and_not_where_it_was_met():
    with pytest.raises(ValueError) as caught:
        Refusing()(np.zeros((2, 3)))
    assert str(caught.value).startswith("Exception encountered when calling")
    assert reason_of(caught.value) == "ValueError: only four features, received 3 (in Refusing.call())"


def test_the_reason_of_an_error_inside_a_graph():
    reason = fails([keras.layers.Dense(2, activation="softmax")], np.zeros((4, 3)), np.array([0, 1, 7, 0]))
    assert "7" in reason and "range" in reason and "Graph execution" not in reason


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (KeyError("units"), "KeyError: 'units'"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("Exception encountered when calling A.call().\n\n"), "ValueError: Exception encountered"),
    ],
)
def test_other_reasons(error, reason):
    assert reason_of(error).startswith(reason) and "\n" not in reason_of(error)


def test_what_fit_may_return():
    import keras_tuner

    objective = keras_tuner.Objective("val_loss", "min")
    history = keras.callbacks.History()
    history.history, history.epoch = {"loss": [3.0, 2.0], "val_loss": [2.0, 3.0]}, [0, 1]
    assert _results(history, objective, False) == ({"loss": 3.0, "val_loss": 2.0}, 0)
    assert _results(0.5, objective, False) == ({"val_loss": 0.5}, 0)
    for returned in (None, "done", {"accuracy": 1.0}, history.history["loss"] and object()):
        with pytest.raises(SearchError, match="HyperModel.fit.*\nExpected: .*\nFix: "):
            _results(returned, objective, False)
    del history.history["val_loss"]
    with pytest.raises(SearchError, match="reports loss"):
        _results(history, objective, False)
    assert _results(history, objective, True) == ({"loss": 2.0}, 1)
