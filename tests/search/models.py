"""Small models and data for tests of searches."""

import keras
import numpy as np


def data(samples=64, features=16, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(samples, features)).astype("float32")
    return x, (x.sum(axis=1, keepdims=True) > 0).astype("float32")


def dense(width=8, learning_rate=0.1, layers=()):
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(width, activation="relu"), *layers, keras.layers.Dense(1)]
    )
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), loss=keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def build_plain(hp):
    return dense(learning_rate=hp.Choice("learning_rate", [0.1, 0.3]))


def build_fixed(hp):
    return dense()


def build_coupled(hp):
    return dense(layers=(keras.layers.BatchNormalization(),))


def build_renormalized(hp):
    """BatchNormalization that cannot work in groups."""
    return dense(layers=(keras.layers.BatchNormalization(renorm=True, name="mine"),))


def build_correlated(hp):
    """A loss over the batch."""

    def correlation(y_true, y_pred):
        a, b = (values - keras.ops.mean(values) for values in (keras.ops.cast(y_true, "float32"), y_pred))
        return 1 - keras.ops.sum(a * b) / keras.ops.sqrt(keras.ops.sum(a * a) * keras.ops.sum(b * b) + 1e-6)

    model = dense(layers=[keras.layers.Dropout(0.1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=correlation)
    return model


class Subclassed(keras.Model):
    """Has no weights before its first call."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


def build_subclassed(hp):
    model = Subclassed()
    model.compile("sgd", "mse")
    return model


def build_wide(hp):
    return dense(width=hp.Choice("width", [8, 2**20]))


def build_uncompiled(hp):
    return keras.Sequential([keras.Input((16,)), keras.layers.Dense(1)])


def build_nothing(hp):
    dense()
