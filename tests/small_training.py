"""A training of one second that draws random numbers, for tests that interrupt and resume it."""

import keras
import numpy as np

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(40, 6)).astype("float32")
Y = (X[:, :1] * X[:, 1:2] > 0).astype("float32")
EPOCHS = 8


def build(hp):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.05), loss=keras.losses.BinaryCrossentropy(from_logits=True))
    return model
