"""A notebook: the cell that searches is run twice, then with more trials."""

import keras
import keras_tuner as kt
import numpy as np

x = np.random.default_rng(0).normal(size=(128, 3)).astype("float32")
y = x.sum(1, keepdims=True)


def build_model(hp):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, kernel_regularizer=hp.Choice("l", ["l1", "l2"]))]
    )
    model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-3, 1e-1, sampling="log")), "mse")
    return model


def cell(trials):
    tuner = kt.RandomSearch(build_model, objective="val_loss", max_trials=trials, seed=5, directory="cells")
    tuner.search(x, y, epochs=1, validation_data=(x, y), verbose=0)
    return {name: trial.score for name, trial in tuner.oracle.trials.items()}


first, again, more = cell(2), cell(2), cell(3)
assert first == again and len(more) == 3 and set(first.items()) <= set(more.items()), (first, again, more)
