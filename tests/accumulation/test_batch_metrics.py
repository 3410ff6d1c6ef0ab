"""Metrics that are one number per batch equal those of plain Keras at the effective batch."""

import keras
import numpy as np
import pytest
from equality import assert_exact, dense, numbers, regression, train
from keras import layers, ops
from promises import holds

from accumtune.accumulation.losses import batch_metrics


def f1(y_true, y_pred):
    wanted, found = ops.cast(y_true > 0, y_pred.dtype), ops.cast(y_pred > 0, y_pred.dtype)
    return 2 * ops.sum(wanted * found) / (ops.sum(wanted) + ops.sum(found) + 1e-7)


def number_mean(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred))


def distance(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


class LargestError(keras.metrics.Metric):
    """A mean over batches of the largest error in each."""

    def __init__(self, name="largest", **kwargs):
        super().__init__(name=name, **kwargs)
        self.total = self.add_variable((), "zeros", name="total")
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(ops.cast(ops.max(ops.abs(y_true - y_pred)), self.total.dtype))
        self.batches.assign_add(1)

    def result(self):
        return self.total / ops.maximum(self.batches, 1)


METRICS = "metrics that are one number per batch (F1, Dice, R²), on one device"


@holds(METRICS)
def test_numbers_of_a_batch_are_those_of_the_effective_batch():
    def build():
        return dense(metrics=[f1, number_mean, distance, LargestError(), "mae"], weighted_metrics=["mse"])()

    weights = np.random.default_rng(3).uniform(0.1, 2, 21)
    plain = assert_exact(build, regression(sample_weight=weights))
    assert len(set(plain.history["largest"])) == 2  # it says something


@holds(METRICS)
def test_several_outputs_and_validation():
    def build():
        inputs = keras.Input((4,))
        one, other = layers.Dense(2, name="one")(inputs), layers.Dense(2, name="other")(inputs)
        model = keras.Model(inputs, {"one": one, "other": other})
        model.compile("sgd", {"one": "mse", "other": "mse"}, metrics={"one": [f1], "other": [f1, "mae"]})
        return model

    targets = {"one": numbers(21, 2, seed=1), "other": numbers(21, 2, seed=2)}
    data = {"x": numbers(21, 4), "y": targets}
    data["validation_data"] = (data["x"], targets)
    plain = train(build, data)
    for size in (1, 3):
        history = train(build, data, micro_batch_size=size).history
        for name in ("one_f1", "other_f1", "val_one_f1", "val_other_f1", "val_other_mae"):
            np.testing.assert_allclose(history[name], plain.history[name], rtol=1e-6)


def test_what_is_a_mean_over_samples_already_does_not_wait(monkeypatch):
    kept = []
    monkeypatch.setattr(batch_metrics, "_joined", lambda given: kept.append(given))
    train(dense(metrics=[distance, "mae"]), regression(8), micro_batch_size=3)
    assert not kept


class Tracks(keras.Model):
    """Keeps means of its own, of one number per batch, as keras.io's examples do."""

    def __init__(self):
        super().__init__()
        self.out, self.part = layers.Dense(2), keras.metrics.Mean(name="part")

    def call(self, inputs):
        return self.out(inputs)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.part.update_state(ops.mean(ops.square(y - y_pred)))
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "part": self.part.result()}


@holds("means that a model keeps of one number per batch")
def test_means_that_a_model_keeps_itself():
    def build():
        model = Tracks()
        model.compile("sgd", "mse")
        model(numbers(2, 4))
        return model

    assert_exact(build, regression())


@pytest.mark.parametrize("batch_size", [5, 8])
def test_a_validation_at_a_stated_size(batch_size):
    """As in a search: the batches are those of the micro-batch, the metric's are of the size that is stated."""
    model = dense(metrics=[f1])()
    x, y = numbers(21, 4), numbers(21, 2, seed=1)
    expected = model.evaluate(x, y, batch_size=batch_size, verbose=0, return_dict=True)
    with batch_metrics.validating_at(model, batch_size):
        found = model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
    assert found["f1"] == pytest.approx(expected["f1"], rel=1e-6)
    assert model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)["f1"] != pytest.approx(expected["f1"])
