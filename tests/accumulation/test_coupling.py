"""Parts of a model that cannot be exact are reported, and only those."""

import keras
import numpy as np
import pytest
from equality import dense, largest_difference, numbers, regression, train
from keras import layers, ops
from promises import holds

from accumtune.accumulation import accumulate, batch_coupled_layers
from accumtune.errors import ModelError


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
    """A loss of the user's, derived from one of Keras's."""

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
@holds("losses that compare samples, or are one ratio over the batch, with `whole_batch_loss=False`")
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


def test_own_compute_loss_is_reported():
    model = OwnLoss(*[(inputs := keras.Input((2,))), layers.Dense(1)(inputs)])
    model.compile("sgd", "mse")
    assert [item.kind for item in batch_coupled_layers(model)] == ["OwnLoss"]


# Layers and models of a user, tested with data


class Centers(layers.Layer):
    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0, keepdims=True)


class MovingAverage(layers.Layer):
    """As in vector quantizers: a weight that is not trained, but changed by every forward pass."""

    def build(self, shape):
        self.average = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.move(ops.mean(inputs, axis=0))
        return inputs - ops.stop_gradient(self.average)

    def move(self, value):
        self.average.assign(0.9 * self.average + 0.1 * value)


class Block(layers.Layer):
    """Does not couple samples itself, but a layer in it does."""

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


@holds("losses that compare samples, or are one ratio over the batch, with `whole_batch_loss=False`")
def test_losses_along_the_axis_of_the_samples():
    for loss in (keras.losses.CosineSimilarity(axis=0), keras.losses.Dice(axis=(0, 1))):
        assert len(batch_coupled_layers(dense(loss)())) == 1


@holds("losses that compare samples, or are one ratio over the batch, with `whole_batch_loss=False`")
def test_an_axis_from_the_end_may_be_that_of_the_samples():
    """In Keras's own losses and layers; for pictures the same argument leaves each sample alone."""

    def pictures(loss, *inner):
        model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 1), *inner])
        model.compile("sgd", loss)
        return model

    axis = (-2, -1)
    for loss in (keras.losses.Dice(axis=axis), keras.losses.Tversky(axis=-2), keras.losses.CosineSimilarity(axis=-2)):
        assert len(batch_coupled_layers(dense(loss)())) == 1
        assert batch_coupled_layers(pictures(loss)) == []
    for make in (layers.Softmax, layers.UnitNormalization):
        assert [item.kind for item in batch_coupled_layers(dense(layers=[make(axis=-2)])())] == [make.__name__]
        assert batch_coupled_layers(pictures("mse", make(axis=-2))) == []


# Losses whose denominator the data decide: random numbers alone never meet a missing target

MISSING = -777.0


class Settings:
    ignored = 4321


def ratio(values, known):
    known = ops.cast(known, values.dtype)
    return ops.sum(ops.where(known > 0, values, ops.zeros_like(values))) / ops.maximum(ops.sum(known), 1.0)


def known_nan(y_true, y_pred):
    known = ops.logical_not(ops.isnan(y_true))
    return ratio(ops.square(ops.where(known, y_true, ops.zeros_like(y_true)) - y_pred), known)


def known_global(y_true, y_pred):
    return ratio(ops.square(y_true - y_pred), y_true != MISSING)


def known_class(y_true, y_pred):
    return ratio(ops.square(y_true - y_pred), y_true != Settings.ignored)


def by_positives(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred)) / ops.maximum(ops.sum(ops.cast(y_true == 1, y_pred.dtype)), 1.0)


def by_found(y_true, y_pred):
    return ratio(ops.square(y_true - y_pred), y_pred > 0)


def inverse_frequency(y_true, y_pred):
    frequency = ops.mean(y_true, axis=0, keepdims=True)
    return ops.mean(ops.square(y_true - y_pred) / (frequency + 0.1), axis=-1)


def ignored_tokens(y_true, y_pred):
    labels = ops.cast(y_true, "int32")
    values = ops.sparse_categorical_crossentropy(ops.maximum(labels, 0), y_pred, from_logits=True)
    return ratio(values, labels != -100)


class KnownOnly(keras.losses.Loss):
    def __init__(self, missing, **kwargs):
        super().__init__(**kwargs)
        self.missing = missing

    def call(self, y_true, y_pred):
        return ratio(ops.square(y_true - y_pred), y_true != self.missing)


def known_of_each_sample(y_true, y_pred):
    known = ops.cast(y_true != -1, y_pred.dtype)
    return ops.sum(known * ops.square(y_true - y_pred), axis=-1) / ops.maximum(ops.sum(known, axis=-1), 1.0)


def zero_where_missing(y_true, y_pred):
    return ops.mean(ops.where(y_true == MISSING, ops.zeros_like(y_pred), ops.square(y_true - y_pred)))


def weighted_entropy(y_true, y_pred):
    return -ops.mean(2 * y_true * ops.log(ops.clip(y_pred, 1e-7, 1.0)))


def outputs_of(loss, shape=(4,)):
    model = keras.Sequential([keras.Input(shape), layers.Dense(3)])
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize(
    "loss",
    [known_nan, known_global, known_class, by_positives, by_found, inverse_frequency, KnownOnly(-98765.0)],
)
@holds("losses that compare samples, or are one ratio over the batch, with `whole_batch_loss=False`")
def test_a_ratio_of_two_sums_is_found_whatever_marks_a_missing_target(loss):
    assert [item.is_known for item in batch_coupled_layers(outputs_of(loss))] == [True]


@holds("losses that compare samples, or are one ratio over the batch, with `whole_batch_loss=False`")
def test_a_mean_over_the_tokens_that_are_not_ignored():
    assert [item.name for item in batch_coupled_layers(outputs_of(ignored_tokens, (5, 4)))] == ["ignored_tokens"]


@pytest.mark.parametrize("loss", [known_of_each_sample, zero_where_missing, weighted_entropy])
def test_masks_that_stay_within_a_sample_are_no_ratio(loss):
    assert batch_coupled_layers(outputs_of(loss)) == []


def test_the_data_show_what_the_code_does_not():
    def hidden(y_true, y_pred):  # no number that its code mentions marks anything
        return ratio(ops.square(y_true - y_pred), ops.abs(y_true) < np.exp(np.pi * 3))

    x, y = numbers(8, 4), numbers(8, 3)
    y[1:6] = 2 * np.exp(np.pi * 3)
    model = outputs_of(hidden)
    assert [item.name for item in batch_coupled_layers(model, x, y)] == ["hidden"]
    accumulate(model, 4, whole_batch_loss=False).fit(x, y, batch_size=8, verbose=0)
    assert [item.name for item in batch_coupled_layers(model)] == ["hidden"]


# What a loss of one number does with weights


@holds("one number per batch with sample or class weights is refused; one value per sample can be weighted")
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_one_number_per_batch_cannot_be_weighted(reduction):
    class Number(keras.losses.Loss):
        def call(self, y_true, y_pred):
            total = ops.mean if reduction != "sum" else ops.sum
            return total(ops.square(y_true - y_pred))

    weighted = regression(8, sample_weight=np.linspace(0.1, 2, 8))
    build = dense(Number(reduction=reduction))
    with pytest.raises(ModelError, match="one number for its whole batch"):
        train(build, weighted, micro_batch_size=3, epochs=1)
    plain = train(build, weighted, epochs=1)  # a window of one micro-batch is plain Keras
    assert largest_difference(train(build, weighted, micro_batch_size=8, epochs=1), plain) < 1e-12
    assert largest_difference(train(build, regression(8), micro_batch_size=3), train(build, regression(8))) < 1e-9


# Not looked is not exact


class Tokens(keras.Model):
    def __init__(self, mixes, **kwargs):
        super().__init__(**kwargs)
        self.embed, self.drop, self.out = layers.Embedding(9, 4), layers.Dropout(0.3), layers.Dense(2)
        self.mixes = mixes

    def call(self, tokens, training=None):
        hidden = self.drop(ops.mean(self.embed(tokens), axis=1), training=training)
        return self.out(hidden - ops.mean(hidden, axis=0, keepdims=True) if self.mixes else hidden)


def tokens(mixes):
    model = Tokens(mixes)
    model.compile("sgd", "mse")
    return model


@holds("what could not be tested, as unknown (give it data, or declare it)")
@pytest.mark.parametrize("mixes", [True, False])
def test_a_model_over_tokens_is_unknown_until_it_has_data(mixes):
    x, y = np.random.default_rng(0).integers(0, 9, (8, 6)), numbers(8, 2)
    model = tokens(mixes)
    (unknown,) = batch_coupled_layers(model)
    assert not unknown.is_known and "samples_are_independent" in unknown.reason
    assert [item.kind for item in batch_coupled_layers(model, x, y)] == ["Tokens"] * mixes
    trained = accumulate(tokens(mixes), 3)
    trained.fit(x, y, batch_size=8, verbose=0)
    assert [item.kind for item in batch_coupled_layers(trained)] == ["Tokens"] * mixes
    declared = tokens(mixes)
    declared.samples_are_independent = True
    assert batch_coupled_layers(declared) == []


class Noisy(layers.Layer):
    """Draws noise also when it does not train."""

    def __init__(self, mixes, **kwargs):
        super().__init__(**kwargs)
        self.mixes, self.seed = mixes, keras.random.SeedGenerator(1)

    def call(self, inputs):
        noisy = inputs + keras.random.normal(ops.shape(inputs), dtype=inputs.dtype, seed=self.seed)
        return noisy - ops.mean(noisy, axis=0, keepdims=True) if self.mixes else noisy


class Gate(layers.Layer):
    """Mixes samples with a factor that is 0 at first."""

    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, inputs):
        return inputs + self.gate * ops.mean(inputs, axis=0, keepdims=True)


class AddsMean(Noisy):
    def __init__(self):
        super().__init__(False)

    def call(self, inputs):
        self.add(ops.mean(ops.square(inputs)))
        return super().call(inputs)

    def add(self, value):
        self.add_loss(value)


class AddsRatio(AddsMean):
    def add(self, value):
        self.add_loss(ops.sqrt(value))


@pytest.mark.parametrize(
    "layer, is_coupled", [(lambda: Noisy(True), True), (lambda: Noisy(False), False), (Gate, True)]
)
@holds("layers, Lambdas and models of your own that mix samples, or whose forward pass moves variables")
def test_noise_and_zeros_hide_nothing(layer, is_coupled):
    found = batch_coupled_layers(functional(lambda x: layer()(x)))
    assert [item.is_known for item in found] == [True] * is_coupled


class Dropping(AddsMean):
    """As in a variational autoencoder: dropout before the loss that is added, and noise also without training."""

    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs, training=False):
        return super().call(self.dropout(inputs, training=training))


class DroppingRatio(AddsRatio, Dropping):
    pass


class OnlyInTraining(Dropping):
    """What it adds depends on the mask, which depends on the micro-batch: nothing can be compared."""

    def call(self, inputs, training=False):
        inputs = self.dropout(inputs, training=training)
        if training:
            self.add(ops.sqrt(ops.mean(ops.square(inputs))))
        return inputs


LAYERS = [(AddsMean, False), (AddsRatio, True), (Dropping, False), (DroppingRatio, True), (OnlyInTraining, True)]


@pytest.mark.parametrize("layer, is_coupled", LAYERS)
@holds("what a layer adds, where it is no mean over samples")
def test_losses_of_layers_that_add_them_somewhere(layer, is_coupled):
    found = batch_coupled_layers(functional(lambda x: layer()(x)))
    assert [item.kind for item in found] == [layer.__name__] * is_coupled
    assert all(item.is_known for item in found) or layer is OnlyInTraining


def test_a_declaration_counts_for_layers_and_losses():
    def centred(y_true, y_pred):
        return in_batch(y_true, y_pred)

    assert len(batch_coupled_layers(dense(centred)())) == 1
    centred.samples_are_independent = True
    assert batch_coupled_layers(dense(centred)()) == []

    def plain(y_true, y_pred):
        return sample_values(y_true, y_pred)

    plain.samples_are_independent = False
    assert len(batch_coupled_layers(dense(plain)())) == 1
