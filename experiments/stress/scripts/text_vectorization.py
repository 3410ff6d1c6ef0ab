"""Texts as strings: an adapted TextVectorization as a global, used inside the model."""

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf

texts = np.array(["good film", "bad film", "very good", "very bad", "not good at all", "not bad"] * 20, dtype=object)
labels = np.array([1, 0, 1, 0, 0, 1] * 20)

vectorize = keras.layers.TextVectorization(max_tokens=50, output_sequence_length=5)
vectorize.adapt(texts)


def build_model(hp):
    inputs = keras.Input((), dtype=tf.string)
    hidden = keras.layers.Embedding(50, hp.Choice("dimension", [4, 8]))(vectorize(inputs))
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


tuner = kt.RandomSearch(build_model, objective="val_accuracy", max_trials=2, directory="searches")
tuner.search(texts, labels, epochs=1, validation_data=(texts, labels), verbose=0)
assert len(tuner.get_best_hyperparameters(2)) == 2
