"""Why a task failed, in one line."""

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.src.engine.objective import create_objective

from accumtune.errors import SearchError
from accumtune.worker.fit_result import result_of
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
    objective = keras_tuner.Objective("val_loss", "min")
    history = keras.callbacks.History()
    history.history, history.epoch = {"loss": [3.0, 2.0], "val_loss": [2.0, 3.0]}, [0, 1]
    assert result_of(history, objective, False) == ({"loss": 3.0, "val_loss": 2.0}, 0)
    assert result_of(0.5, objective, False) == ({"val_loss": 0.5}, 0)
    for returned in (None, "done", {"accuracy": 1.0}, history.history["loss"] and object()):
        with pytest.raises(SearchError, match="HyperModel.fit.*\nExpected: .*\nFix: "):
            result_of(returned, objective, False)
    del history.history["val_loss"]
    with pytest.raises(SearchError, match='no objective, .*\n.*\n.*objective="val_loss"'):
        result_of(history, create_objective(None), False)
    with pytest.raises(SearchError, match="reports loss"):
        result_of(history, objective, False)
    assert result_of(history, objective, True) == ({"loss": 2.0}, 1)


@pytest.mark.parametrize("kind", ["one", "sum"])
def test_with_rare_validations_the_best_epoch_is_one_of_those_that_validated(tmp_path, kind):
    """Keras Tuner pairs the first `val_loss` with the first epoch, and keeps the weights of epochs between."""
    from accumtune.worker.callbacks import LogsOfEpochs, SaveBestEpoch

    objective = keras_tuner.Objective("val_loss", "min")
    if kind == "sum":
        objective = create_objective([objective, keras_tuner.Objective("val_mae", "max")])
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    x, y = np.ones((8, 2)), np.ones((8, 1))

    class Worsening(keras.callbacks.Callback):
        """From its fifth epoch on (3, as the first is 1), each is worse."""

        def on_epoch_end(self, epoch, logs=None):
            if epoch >= 4:
                model.layers[0].kernel.assign(model.layers[0].kernel + 3.0)

    save = SaveBestEpoch(objective=objective, filepath=str(tmp_path / "best.weights.h5"))
    history = model.fit(
        x, y, initial_epoch=1, epochs=7, validation_data=(x, y), validation_freq=2, verbose=0,
        callbacks=[LogsOfEpochs(), save, Worsening()],
    )  # fmt: skip
    assert [epoch for epoch, row in history.rows if "val_loss" in row] == [1, 3, 5]
    metrics, best_epoch = result_of(history, objective)
    values = {epoch: objective.get_value(row) for epoch, row in history.rows if "val_loss" in row}
    assert best_epoch == min(values, key=values.get) == 3
    assert metrics[objective.name] == values[3] and metrics["loss"] == history.history["loss"][2]
    model.load_weights(tmp_path / "best.weights.h5")
    loss, mae = model.evaluate(x, y, verbose=0)
    assert loss - (mae if kind == "sum" else 0) == pytest.approx(values[3], rel=1e-5)
    if kind == "one":
        with pytest.raises(KeyError):
            keras_tuner.src.engine.tuner_utils.convert_to_metrics_dict(history, objective)
    # Epoch 6 did not validate: a pause there has nothing to compare.
    with pytest.raises(SearchError, match="freeze-thaw"):
        result_of(history, objective, is_paused=True)
    rare = keras.callbacks.History()
    rare.history, rare.epoch = {"loss": [1.0]}, [0]
    with pytest.raises(SearchError, match="validation_freq"):
        result_of(rare, objective)
