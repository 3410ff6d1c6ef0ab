"""Dictionaries of inputs and of targets, a sample weight, several executions per trial, and TensorBoard."""

import keras
import keras_tuner as kt
import numpy as np

generator = np.random.default_rng(0)
inputs = {"age": generator.uniform(size=(200, 1)).astype("float32"), "city": generator.integers(0, 9, (200, 1))}
targets = {"income": inputs["age"] * 2, "owner": (inputs["city"] > 4).astype("float32")}
weights = {"income": np.ones(200), "owner": generator.uniform(size=200)}


def build_model(hp):
    age, city = keras.Input((1,), name="age"), keras.Input((1,), name="city", dtype="int64")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(9, hp.Choice("dimension", [2, 4]))(city))
    joined = keras.layers.Concatenate()([age, embedded])
    income = keras.layers.Dense(1, name="income")(joined)
    owner = keras.layers.Dense(1, activation="sigmoid", name="owner")(joined)
    model = keras.Model({"age": age, "city": city}, {"income": income, "owner": owner})
    model.compile("adam", {"income": "mse", "owner": "binary_crossentropy"}, metrics={"owner": ["accuracy"]})
    return model


tuner = kt.RandomSearch(
    build_model, kt.Objective("val_owner_loss", "min"), max_trials=2, executions_per_trial=2, directory="searches"
)
tuner.search(
    inputs,
    targets,
    sample_weight=weights,
    epochs=2,
    validation_data=(inputs, targets, weights),
    verbose=0,
    callbacks=[keras.callbacks.TensorBoard("logs")],
)
assert np.isfinite(tuner.oracle.get_best_trials(1)[0].score)
