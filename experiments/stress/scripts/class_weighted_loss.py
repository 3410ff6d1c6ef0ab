"""A loss that closes over a tensor of class weights, and a metric class of one's own."""

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf

generator = np.random.default_rng(0)
x = generator.normal(size=(300, 6)).astype("float32")
y = (x[:, 0] > 1).astype("int32") + (x[:, 1] > 1).astype("int32")
CLASS_WEIGHTS = tf.constant([0.2, 1.0, 3.0])


def weighted_crossentropy(y_true, y_pred):
    values = keras.losses.sparse_categorical_crossentropy(y_true, y_pred)
    return values * tf.gather(CLASS_WEIGHTS, tf.cast(tf.reshape(y_true, [-1]), "int32"))


class RareRecall(keras.metrics.Recall):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(tf.reshape(y_true, [-1]) == 2, tf.argmax(y_pred, -1) == 2, sample_weight)


def build_model(hp):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(hp.Int("units", 8, 16, step=8), activation="relu")])
    model.add(keras.layers.Dense(3, activation="softmax"))
    model.compile(keras.optimizers.RMSprop(1e-2), weighted_crossentropy, metrics=[RareRecall(name="rare")])
    return model


tuner = kt.RandomSearch(build_model, kt.Objective("val_rare", "max"), max_trials=2, directory="searches")
tuner.search(x, y, epochs=3, validation_data=(x, y), verbose=0)
assert 0 <= tuner.oracle.get_best_trials(1)[0].score <= 1
