"""A HyperModel whose fit is a training loop of its own, as in keras.io's guide on custom training loops."""

import keras
import keras_tuner as kt
import numpy as np
import tensorflow as tf

generator = np.random.default_rng(0)
x = generator.normal(size=(128, 6)).astype("float32")
y = (x[:, :1] > 0).astype("float32")


class MyHyperModel(kt.HyperModel):
    def build(self, hp):
        layers = [keras.layers.Dense(hp.Choice("units", [4, 8]), activation="relu"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((6,)), *layers])
        model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")), "mse")
        return model

    def fit(self, hp, model, x, y, validation_data, epochs=1, callbacks=None, **kwargs):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(hp.Int("loop_batch_size", 16, 32, step=16))
        loss_of = keras.losses.MeanSquaredError()
        for callback in callbacks:
            callback.set_model(model)
        best = float("inf")
        for epoch in range(epochs):
            for batch, targets in data:
                with tf.GradientTape() as tape:
                    loss = loss_of(targets, model(batch, training=True))
                gradients = tape.gradient(loss, model.trainable_variables)
                model.optimizer.apply(gradients, model.trainable_variables)
            value = float(loss_of(validation_data[1], model(validation_data[0])))
            for callback in callbacks:
                callback.on_epoch_end(epoch, logs={"my_loss": value})
            best = min(best, value)
        return best


tuner = kt.RandomSearch(
    MyHyperModel(), objective=kt.Objective("my_loss", "min"), max_trials=2, directory="searches", overwrite=True
)
tuner.search(x, y, validation_data=(x, y), epochs=2)
tuner.results_summary()
best = tuner.get_best_hyperparameters()[0]
assert best.get("loop_batch_size") in (16, 32)
tuner.hypermodel.build(best).summary()
