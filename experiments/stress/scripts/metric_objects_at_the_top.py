"""Metric objects, callbacks and data as globals of the script; callbacks go into the search."""

import keras
import keras_tuner as kt
import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
x, y = digits.images[..., None].astype("float32") / 16, digits.target
x_train, y_train, x_val, y_val = x[:600], y[:600], x[600:800], y[600:800]

METRICS = [keras.metrics.SparseCategoricalAccuracy(name="accuracy"), keras.metrics.SparseTopKCategoricalAccuracy(3)]
stop_early = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2)


def build_model(hp):
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    for i in range(hp.Int("layers", 1, 2)):
        model.add(keras.layers.Dense(hp.Choice(f"units_{i}", [16, 32]), activation="relu"))
        model.add(keras.layers.Dropout(0.2))
    model.add(keras.layers.Dense(10, activation="softmax"))
    rate = hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=METRICS)
    return model


tuner = kt.RandomSearch(
    build_model, objective="val_accuracy", max_trials=2, directory="searches", project_name="digits"
)
tuner.search(x_train, y_train, epochs=2, validation_data=(x_val, y_val), callbacks=[stop_early], verbose=0)
tuner.results_summary()
best = tuner.get_best_models(num_models=1)[0]
accuracy = np.mean(best.predict(x_val, verbose=0).argmax(-1) == y_val)
assert len(tuner.oracle.trials) == 2 and abs(accuracy - tuner.oracle.get_best_trials(1)[0].score) < 0.02
