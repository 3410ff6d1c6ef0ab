"""What cannot be exact is reported, and what can be is not."""

import keras
import numpy as np
import pytest
from equality import dense, largest_difference, regression, train
from keras import layers, ops
from promises import holds

from accumtune.accumulation import batch_coupled_layers


def in_batch(y_true, y_pred):
    similarity = ops.matmul(y_pred, ops.transpose(y_pred))
    return -ops.diagonal(ops.log_softmax(similarity))


def batch_sum(y_true, y_pred):
    return ops.sum(ops.abs(y_true - y_pred))


def batch_mean(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred))


def sample_values(y_true, y_pred):
    return ops.sum(ops.abs(y_true - y_pred), axis=-1)


def class_values(y_true, y_pred):
    return -ops.sum(ops.log(y_pred) * ops.one_hot(y_true, ops.shape(y_pred)[-1]), axis=-1)


class InBatchLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return in_batch(y_true, y_pred)


class DerivedLoss(keras.losses.MeanSquaredError):
    """Keras's in name, the user's in what it does."""

    def call(self, y_true, y_pred):
        return in_batch(y_true, y_pred)


class AddsLoss(layers.Layer):
    def call(self, inputs):
        self.add_loss(ops.sum(inputs))
        return inputs


class OwnLoss(keras.Model):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("loss", ["mse", batch_mean, sample_values, class_values, keras.losses.Dice(axis=-1)])
def test_what_is_exact_is_not_reported(loss):
    inside = [layers.LayerNormalization(), layers.Dropout(0.1), layers.GroupNormalization(1)]
    assert batch_coupled_layers(dense(loss, layers=inside)()) == []


@pytest.mark.parametrize(
    "loss",
    [
        in_batch,
        batch_sum,
        InBatchLoss(),
        DerivedLoss(),
        keras.losses.Dice(),
        keras.losses.Tversky(),
        keras.losses.Circle(),
    ],
)
@holds("losses that compare samples, or are one ratio over the batch")
def test_losses_that_look_at_the_whole_micro_batch(loss):
    model = dense(loss)()
    assert len(batch_coupled_layers(model)) == 1
    if loss is in_batch:
        model.fit(**regression(), batch_size=8, verbose=0)  # built losses are found too
        assert [item.name for item in batch_coupled_layers(model)] == ["in_batch"]


@pytest.mark.parametrize(
    "layer",
    [layers.BatchNormalization, lambda: layers.SpectralNormalization(layers.Dense(2)), AddsLoss],
)
@holds("BatchNormalization and SpectralNormalization work on each micro-batch by itself")
def test_layers_that_look_at_the_whole_micro_batch(layer):
    model = dense(layers=[layer()])()
    (found,) = batch_coupled_layers(model)
    assert found.name == model.layers[1].name and found.reason and found.kind in str(found)


def test_frozen_normalization_is_not_coupled():
    model = dense(layers=[layers.BatchNormalization(trainable=False)])()
    assert batch_coupled_layers(model) == []


@holds("what a layer or a `compute_loss` of your own adds, where it is no mean over samples")
def test_own_compute_loss_is_reported():
    model = OwnLoss(*[(inputs := keras.Input((2,))), layers.Dense(1)(inputs)])
    model.compile("sgd", "mse")
    assert [item.kind for item in batch_coupled_layers(model)] == ["OwnLoss"]


# Layers and models of a user, tried out


class Centers(layers.Layer):
    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0, keepdims=True)


class MovingAverage(layers.Layer):
    """As vector quantizers have it: a weight that is not trained, but moved by every forward pass."""

    def build(self, shape):
        self.average = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.move(ops.mean(inputs, axis=0))
        return inputs - ops.stop_gradient(self.average)

    def move(self, value):
        self.average.assign(0.9 * self.average + 0.1 * value)


class Block(layers.Layer):
    """Is not coupled by itself: what is in it is."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.drop = inner, layers.Dropout(0.5)

    def call(self, inputs, training=None):
        return self.drop(self.inner(inputs))


class CentersItself(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        hidden = self.hidden(inputs)
        return self.out(hidden - ops.mean(hidden, axis=0, keepdims=True))


def functional(body):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(body(inputs)))
    model.compile("sgd", "mse")
    return model


COUPLED = {
    "Centers": lambda x: Centers()(x),
    "MovingAverage": lambda x: MovingAverage()(x),
    "Lambda": lambda x: layers.Lambda(lambda t: t - ops.mean(t, axis=0))(x),
    "Functional": lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "UnitNormalization": lambda x: layers.UnitNormalization(axis=0)(x),
}


@pytest.mark.parametrize("kind", COUPLED)
@holds("layers, Lambdas and models of your own that mix samples, or whose forward pass moves variables")
def test_layers_that_mix_samples(kind):
    """Each is found, and each would make another training."""

    def build():
        return functional(COUPLED[kind])

    model = build()
    assert [item.kind for item in batch_coupled_layers(model)] == [kind]
    before = [ops.convert_to_numpy(v) for v in model.variables]
    batch_coupled_layers(model)
    for one, variable in zip(before, model.variables, strict=True):  # to ask changes nothing
        np.testing.assert_array_equal(one, ops.convert_to_numpy(variable))
    plain, ours = train(build, regression(8), epochs=1), train(build, regression(8), epochs=1, micro_batch_size=3)
    assert largest_difference(ours, plain) > 1e-4


@pytest.mark.parametrize("inner", [Centers, layers.BatchNormalization])
def test_a_block_is_not_reported_beside_what_is_in_it(inner):
    model = functional(lambda x: Block(inner())(x))
    assert [item.kind for item in batch_coupled_layers(model)] == [inner.__name__]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: Block(layers.Dense(3))(x),
        lambda x: layers.Lambda(lambda t: t - ops.mean(t, axis=1, keepdims=True))(x),
        lambda x: ops.concatenate([ops.sort(x), layers.GaussianNoise(0.1)(x)], axis=-1),
        lambda x: x + layers.Dense(4)(x),
    ],
    ids=["block-with-dropout", "lambda", "operations", "shortcut"],
)
def test_layers_that_do_not_mix_samples(body):
    assert batch_coupled_layers(functional(body)) == []


@holds("layers, Lambdas and models of your own that mix samples, or whose forward pass moves variables")
def test_a_model_that_mixes_samples_in_its_own_call():
    model = CentersItself()
    model.compile("sgd", "mse")
    model.fit(**regression(8), verbose=0)  # only then is it known what it takes
    assert [item.kind for item in batch_coupled_layers(model)] == ["CentersItself"]


@holds("recurrent layers with `stateful=True` carry their state from micro-batch to micro-batch")
def test_recurrent_layers_that_carry_their_state():
    model = keras.Sequential([keras.Input((5, 4), batch_size=3), layers.LSTM(2, stateful=True), layers.Dense(1)])
    model.compile("sgd", "mse")
    assert [item.kind for item in batch_coupled_layers(model)] == ["LSTM"]


@holds("losses that compare samples, or are one ratio over the batch")
def test_losses_along_the_axis_of_the_samples():
    for loss in (keras.losses.CosineSimilarity(axis=0), keras.losses.Dice(axis=(0, 1))):
        assert len(batch_coupled_layers(dense(loss)())) == 1
