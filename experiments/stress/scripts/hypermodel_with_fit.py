"""A HyperModel that tunes how it is trained: Keras Tuner's guide, "Tune model training"."""

import keras
import keras_tuner as kt
import numpy as np

generator = np.random.default_rng(0)
x = generator.normal(size=(256, 8)).astype("float32")
y = (x[:, :1] * x[:, 1:2]).astype("float32")


class MyHyperModel(kt.HyperModel):
    def build(self, hp):
        inputs = keras.Input((8,))
        hidden = keras.layers.Dense(hp.Int("units", 8, 32, step=8), activation="relu")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("adam", "mse")
        return model

    def fit(self, hp, model, x, y, **kwargs):
        if hp.Boolean("normalize"):
            x = (x - x.mean(0)) / x.std(0)
        return model.fit(x, y, shuffle=hp.Boolean("shuffle"), epochs=hp.Int("epochs", 1, 3), **kwargs)


tuner = kt.BayesianOptimization(MyHyperModel(), objective="loss", max_trials=3, seed=1, directory="searches")
tuner.search(x, y, verbose=0)
names = set(tuner.get_best_hyperparameters()[0].values)
assert {"units", "normalize", "shuffle", "epochs"} <= names, names
