"""Metrics that are one number per batch equal those of plain Keras at the effective batch."""

import keras
import numpy as np
import pytest
from equality import BACKEND, assert_exact, dense, numbers, regression, sequences, train
from keras import layers, ops
from keras.src.backend import get_keras_mask
from promises import holds

from accumtune.accumulation import accumulate
from accumtune.accumulation.losses import batch_metrics
from accumtune.accumulation.patched_attributes import replaced


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
        return dense(
            metrics=[f1, number_mean, distance, keras.losses.dice, LargestError(), "mae"], weighted_metrics=["mse"]
        )()

    weights = np.random.default_rng(3).uniform(0.1, 2, 21)
    plain = assert_exact(build, regression(sample_weight=weights))
    assert len(set(plain.history["largest"])) == 2  # it says something


@holds(METRICS)
@pytest.mark.parametrize("has_own_metrics", [True, False])
def test_several_outputs_and_validation(has_own_metrics):
    """Also the losses of outputs, of which TensorFlow logs a mean over batches: 8, 8 and 5 samples."""

    def build():
        inputs = keras.Input((4,))
        one, other = layers.Dense(2, name="one")(inputs), layers.Dense(2, name="other")(inputs)
        model = keras.Model(inputs, {"one": one, "other": other})
        own = [f1] if has_own_metrics else []
        model.compile("sgd", {"one": "mse", "other": "mse"}, metrics={"one": own, "other": [*own, "mae"]})
        return model

    targets = {"one": numbers(21, 2, seed=1), "other": numbers(21, 2, seed=2)}
    data = {"x": numbers(21, 4), "y": targets}
    data["validation_data"] = (data["x"], targets)
    plain = train(build, data)
    assert "val_one_loss" in plain.history
    for size in (1, 3):
        history = train(build, data, micro_batch_size=size).history
        assert history.keys() == plain.history.keys()
        for name, values in plain.history.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-6, err_msg=name)


def test_what_is_a_mean_over_samples_already_does_not_wait(monkeypatch):
    kept = []
    monkeypatch.setattr(batch_metrics, "_joined", lambda given: kept.append(given))
    declared = LargestError()
    declared.samples_are_independent = True
    train(dense(metrics=[distance, "mae", declared]), regression(8), micro_batch_size=3)
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
    data = regression(validation_data=(numbers(21, 4), numbers(21, 2, seed=1)))
    model = accumulate(dense(metrics=[f1])(), 3)
    with replaced(model, {"_accumtune_metric_batch_size": batch_size}):
        found = model.fit(**data, batch_size=8, verbose=0).history["val_f1"]
    expected = [model.evaluate(*data["validation_data"], batch_size=size, verbose=0)[1] for size in (batch_size, 3)]
    assert found == [pytest.approx(expected[0], rel=1e-6)] != [pytest.approx(expected[1], rel=1e-6)]


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return self.x[part], self.y[part]


class PreparesItsData(keras.Sequential):
    def fit(self, x, y, batch_size=None, validation_data=None, **kwargs):
        return super().fit(Batches(x, y, batch_size), validation_data=Batches(*validation_data, 10), **kwargs)


class OwnTestStep(keras.Sequential):
    """As Keras's guide has it; on JAX a step is written otherwise."""

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(self.compute_loss(y=y, y_pred=y_pred))
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics if metric.name != "loss"}


VALIDATION = numbers(21, 4, seed=5), numbers(21, 2, seed=6)


def endless(size=5):
    """Validation reads two batches of it in each epoch."""
    while True:
        for index in range(4):
            part = slice(index * size, (index + 1) * size)
            yield VALIDATION[0][part], VALIDATION[1][part]


@holds(METRICS)
@pytest.mark.parametrize(
    "cls, validation",
    [
        (keras.Sequential, lambda: {"validation_data": VALIDATION}),
        (keras.Sequential, lambda: {"validation_data": VALIDATION, "validation_batch_size": 5}),
        (keras.Sequential, lambda: {"validation_data": Batches(*VALIDATION, 10)}),
        (keras.Sequential, lambda: {"validation_data": endless(), "validation_steps": 2}),
        (PreparesItsData, lambda: {"validation_data": VALIDATION}),
        pytest.param(
            OwnTestStep,
            lambda: {"validation_data": VALIDATION},
            marks=pytest.mark.skipif(BACKEND == "jax", reason="its steps take and give the state"),
        ),
    ],
    ids=["arrays", "arrays-at-a-size", "batches", "endless", "own-fit", "own-test-step"],
)
def test_a_validation_gives_metrics_whole_batches_and_reads_its_data_once(cls, validation):
    def build():
        model = cls([keras.Input((4,)), layers.Dense(2)])
        model.compile("sgd", "mse", metrics=[f1, LargestError(), distance, "mae"])
        return model

    plain, ours = (train(build, regression() | validation(), micro_batch_size=size).history for size in (None, 3))
    assert "val_largest" in plain and ours.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-6, err_msg=name)


@holds(METRICS)
def test_what_is_evaluated_beside_a_fit_keeps_its_own_batches():
    """By a callback and by hand: neither waits for more, nor leaves anything behind."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            x, y = VALIDATION
            seen.append(self.model.test_on_batch(ops.convert_to_tensor(x[:5]), ops.convert_to_tensor(y[:5])))
            seen.append(self.model.evaluate(x, y, batch_size=5, verbose=0))

    def results(size):
        seen.clear()
        data = regression(validation_data=VALIDATION, callbacks=[Looks()])
        history = train(dense(metrics=[f1, LargestError()]), data, micro_batch_size=size).history
        return [*history["val_largest"], *np.ravel(seen)]

    np.testing.assert_allclose(results(3), results(None), rtol=1e-6)


# What is easily lost


class Masked(keras.metrics.Metric):
    """A mean over batches of the entries that its predictions' mask leaves."""

    def __init__(self, name="masked", **kwargs):
        super().__init__(name=name, **kwargs)
        self.mean = keras.metrics.Mean()

    def update_state(self, y_true, y_pred, sample_weight=None):
        mask = get_keras_mask(y_pred)
        self.mean.update_state(ops.sum(ops.cast(mask, "float32")) if mask is not None else -1.0)

    def result(self):
        return self.mean.result()


@pytest.mark.skipif(BACKEND == "jax", reason="training of Keras on JAX loses the masks of predictions")
def test_masks_come_along():
    def build():
        model = keras.Sequential([keras.Input((5,)), layers.Embedding(6, 3, mask_zero=True), layers.Dense(2)])
        model.compile("sgd", "mse", metrics=[Masked()])
        return model

    data = {"x": sequences(), "y": numbers(21, 5, 2)}
    data["validation_data"] = (data["x"], data["y"])
    plain, ours = (train(build, data, micro_batch_size=size).history for size in (None, 3))
    assert min(plain["masked"]) > 8
    for name in ("masked", "val_masked"):
        np.testing.assert_allclose(ours[name], plain[name], rtol=1e-6)


def test_windows_whose_micro_batches_differ_in_shape_say_so():
    model = keras.Sequential([keras.Input((None, 4)), layers.Dense(2)])
    model.compile("sgd", "mse", metrics=[number_mean])
    accumulate(model, accumulation_steps=2)
    batches = ((numbers(4, length, 4), numbers(4, length, 2)) for length in (3, 5))
    with pytest.warns(UserWarning, match="number_mean.*by itself"):
        model.fit(batches, steps_per_epoch=1, verbose=0)


class Interruption(Exception):
    pass


def test_an_interrupted_window_leaves_no_outputs_behind(monkeypatch):
    model = accumulate(dense(metrics=[f1])(), 3)
    x, y = map(ops.convert_to_tensor, (numbers(8, 4), numbers(8, 2, seed=1)))
    model.train_on_batch(x, y)
    before = model.get_weights()
    (expected,) = model.train_on_batch(x, y)[1:]
    model.set_weights(before)
    taken = batch_metrics.WholeWindow.take

    def interrupted(self, outputs):
        taken(self, outputs)
        raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(batch_metrics.WholeWindow, "take", interrupted)
        model.train_on_batch(-x, y)
    model.set_weights(before)
    assert model.train_on_batch(x, y)[1] == pytest.approx(expected)


def test_an_interrupted_validation_leaves_no_outputs_behind():
    class Interrupts(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise Interruption

    model, (x, y) = accumulate(dense(optimizer=lambda: keras.optimizers.SGD(0.0), metrics=[f1])(), 3), VALIDATION
    expected = model.fit(**regression(), batch_size=8, verbose=0, shuffle=False).history["f1"]
    data = regression() | {"batch_size": 8, "verbose": 0, "shuffle": False}
    with pytest.raises(Interruption):
        model.fit(**data, validation_data=(-x, y), callbacks=[Interrupts()])
    found = model.fit(**data, validation_data=VALIDATION).history
    assert found["f1"] == [pytest.approx(expected[0])]
    assert found["val_f1"] == [pytest.approx(model.evaluate(x, y, batch_size=8, verbose=0)[1])]
