"""A search over models that train in their own way."""

import keras
import numpy as np

import accumtune


def build(hp):
    import tensorflow as tf

    class Stepping(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            gradients = tape.gradient(loss, self.trainable_weights)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
            return {"loss": loss}

    model = Stepping([keras.Input((4,)), keras.layers.Dense(hp.Choice("units", [4, 8])), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def make(tmp_path, build):
    return accumtune.RandomSearch(
        build, objective="val_loss", max_trials=1, memory_budget="1GiB", micro_batch_sizes=(4, 8),
        accumulation_steps=(1, 2), seed=1, directory=tmp_path, project_name="own", tracking_uri=None,
    )  # fmt: skip


def data():
    x = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
    return x, x[:, :1]


def test_a_step_that_is_certified_is_searched_over_effective_batches(tmp_path):
    tuner = make(tmp_path, build)
    x, y = data()
    tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
    assert tuner.search_over == "effective_batch_size" and tuner.batch_coupled_layers == []
    config = tuner.get_best_config()
    assert config.trial["own_train_step"] == "mean"
