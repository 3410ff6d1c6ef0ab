"""Small models with their own `train_step`, like those of Keras's examples, for every backend."""

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


class OwnStep(keras.Model):
    """A step around `objective(data)`: the loss, or a tuple of it and what `track` gets besides.

    `gradients` may change what the optimizer gets, and `after(data)` follows the update.
    """

    def __init__(self, net=None, **kwargs):
        super().__init__(**kwargs)
        self.net = net
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, x, training=False):
        return self.net(x, training=training)

    def objective(self, data):
        x, y = data
        return ops.mean(ops.square(self.net(x, training=True) - y))

    def gradients(self, gradients):
        return gradients

    def after(self, data):
        pass

    def losses_of(self, data):
        found = self.objective(data)
        return found if isinstance(found, tuple) else (found,)

    def track(self, loss):
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def weights_to_train(self):
        return self.trainable_weights

    if BACKEND == "tensorflow":

        def train_step(self, data):
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss, *others = self.losses_of(data)
                scaled = self.optimizer.scale_loss(loss)
            weights = self.weights_to_train()
            gradients = self.gradients(tape.gradient(scaled, weights))
            self.update(gradients, weights)
            self.after(data)
            return self.track(loss, *others)

        def update(self, gradients, weights):
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))

    elif BACKEND == "torch":

        def train_step(self, data):
            import torch

            self.zero_grad()
            loss, *others = self.losses_of(data)
            scaled = self.optimizer.scale_loss(loss)
            (scaled.sum() if scaled.ndim else scaled).backward()
            weights = self.weights_to_train()
            with torch.no_grad():
                gradients = self.gradients([weight.value.grad for weight in weights])
                self.update(gradients, weights)
                self.after(data)
                return self.track(loss, *others)

        def update(self, gradients, weights):
            self.optimizer.apply(gradients, weights)

    else:

        def train_step(self, state, data):
            import jax

            trainable, non_trainable, optimizer, metrics = state

            def loss_of(trainable):
                mapping = [
                    *zip(self.trainable_variables, trainable, strict=True),
                    *zip(self.non_trainable_variables, non_trainable, strict=True),
                    *zip(self.optimizer.variables, optimizer, strict=True),
                ]
                with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                    losses = self.losses_of(data)
                    scaled = self.optimizer.scale_loss(losses[0])
                new = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
                return ops.sum(scaled), (losses, new)

            gradients, (losses, non_trainable) = jax.grad(loss_of, has_aux=True)(trainable)
            gradients = self.gradients(gradients)
            trainable, optimizer = self.update(optimizer, gradients, trainable)
            mapping = [
                *zip(self.trainable_variables, trainable, strict=True),
                *zip(self.non_trainable_variables, non_trainable, strict=True),
                *zip(self.metrics_variables, metrics, strict=True),
            ]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                self.after(data)
                logs = self.track(*losses)
            non_trainable = [scope.get_current_value(variable) for variable in self.non_trainable_variables]
            metrics = [scope.get_current_value(variable) for variable in self.metrics_variables]
            return logs, (trainable, non_trainable, optimizer, metrics)

        def update(self, optimizer, gradients, trainable):
            return self.optimizer.stateless_apply(optimizer, gradients, trainable)


def net(*layers, inputs=4, outputs=3):
    return keras.Sequential(
        [keras.Input((inputs,)), keras.layers.Dense(6, activation="tanh"), *layers, keras.layers.Dense(outputs)]
    )


def data(samples=24, inputs=4, outputs=3):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(samples, inputs)).astype(keras.config.floatx())
    return x, generator.normal(size=(samples, outputs)).astype(keras.config.floatx())
