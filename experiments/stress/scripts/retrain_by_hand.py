"""Hyperband, then the best model built again by hand and trained on all data, with checkpoints."""

import keras
import keras_tuner as kt
import numpy as np

generator = np.random.default_rng(0)
x = generator.normal(size=(320, 10)).astype("float32")
y = x @ generator.normal(size=(10, 2)).astype("float32")


def build_model(hp):
    model = keras.Sequential([keras.Input((10,))])
    kind = hp.Choice("kind", ["deep", "linear"])
    with hp.conditional_scope("kind", ["deep"]):
        if kind == "deep":
            model.add(keras.layers.Dense(hp.Int("units", 8, 32, step=8), activation="relu"))
    model.add(keras.layers.Dense(2))
    schedule = keras.optimizers.schedules.ExponentialDecay(hp.Float("rate", 1e-3, 1e-1, sampling="log"), 20, 0.9)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), "mse", metrics=["mae"])
    return model


tuner = kt.Hyperband(build_model, objective="val_loss", max_epochs=4, factor=2, seed=3, directory="searches")
tuner.search(x[:256], y[:256], validation_data=(x[256:], y[256:]), verbose=0)
best = tuner.get_best_hyperparameters(1)[0]
model = tuner.hypermodel.build(best)
history = model.fit(x, y, epochs=2, verbose=0, callbacks=[keras.callbacks.ModelCheckpoint("best.keras")])
assert np.isfinite(history.history["loss"]).all()
assert keras.saving.load_model("best.keras").predict(x[:2], verbose=0).shape == (2, 2)
