"""A tuner of one's own whose run_trial tunes the number of epochs: the most cited recipe of Keras Tuner."""

import keras
import keras_tuner as kt
import numpy as np

x, y = np.random.default_rng(0).normal(size=(2, 128, 4, 1)).astype("float32")
epochs_trained = []


class MyTuner(kt.RandomSearch):
    def run_trial(self, trial, *args, **kwargs):
        kwargs["epochs"] = trial.hyperparameters.Int("epochs", 2, 3)
        epochs_trained.append(kwargs["epochs"])
        return super().run_trial(trial, *args, **kwargs)


def build_model(hp):
    model = keras.Sequential(
        [keras.Input((4, 1)), keras.layers.LSTM(hp.Choice("units", [4, 8])), keras.layers.Dense(4)]
    )
    model.compile(keras.optimizers.Adam(hp.Choice("learning_rate", [1e-2, 1e-3])), "mse")
    return model


tuner = MyTuner(build_model, objective="val_loss", max_trials=2, directory="searches", overwrite=True)
tuner.search(x, y[..., 0], validation_data=(x, y[..., 0]), verbose=0)
assert len(epochs_trained) >= 2 and set(epochs_trained) <= {2, 3}
assert tuner.get_best_hyperparameters()[0].values["epochs"] in (2, 3)
