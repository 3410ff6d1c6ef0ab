"""Hyperband over a tf.data pipeline, with augmentation in the model, early stopping and TensorBoard."""

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf

generator = np.random.default_rng(0)
images = generator.normal(size=(96, 8, 8, 1)).astype("float32")
labels = generator.integers(0, 3, size=96)


def train_data():
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    return data.shuffle(96, seed=1).batch(16).prefetch(tf.data.AUTOTUNE)


def build_model(hp):
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.RandomFlip(), keras.layers.RandomRotation(0.1)])
    for index in range(hp.Int("blocks", 1, 2)):
        model.add(keras.layers.Conv2D(hp.Choice(f"filters_{index}", [2, 4]), 3, activation="relu", padding="same"))
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(3, activation="softmax"))
    model.compile(
        keras.optimizers.Adam(hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


tuner = kt.Hyperband(build_model, objective="val_accuracy", max_epochs=2, factor=2, directory="searches", seed=1)
callbacks = [keras.callbacks.EarlyStopping("val_loss", patience=1), keras.callbacks.TensorBoard("logs")]
tuner.search(train_data(), validation_data=(images, labels), epochs=2, callbacks=callbacks, verbose=0)
tuner.search_space_summary()
tuner.results_summary(2)
best = tuner.get_best_hyperparameters(3)
assert 1 <= len(best) <= 3 and all(1e-4 <= hp.get("learning_rate") <= 1e-2 for hp in best)
trials = tuner.oracle.get_best_trials(2)
for model, trial in zip(tuner.get_best_models(2), trials, strict=True):
    measured = model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]
    assert abs(measured - trial.score) < 1e-5, (measured, trial.score)
