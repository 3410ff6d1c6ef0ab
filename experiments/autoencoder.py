"""Which batch should a variational autoencoder with its own train_step train with?

As in Keras's example, `train_step` draws from the encoder's distribution and adds up two losses. It needs no change for
accumulation. Before the first trial, accumtune tests the step on a few digits, and prints whether its gradients are
means or sums over samples, or refuses it.

    python experiments/autoencoder.py [--trials 6] [--epochs 12] [--samples 720] [--memory-budget 4MiB]
"""

import gallery  # first: it sets TensorFlow's log level
import keras
import numpy as np
import tensorflow as tf
from keras import ops
from sklearn.datasets import load_digits

import accumtune


class Sampling(keras.layers.Layer):
    """Draws from a normal distribution for each sample."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, mean, log_variance):
        drawn = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * drawn


class Autoencoder(keras.Model):
    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.sampling, self.decoder = encoder, Sampling(), decoder
        self.trackers = [keras.metrics.Mean(name=name) for name in ("loss", "reconstruction", "divergence")]

    @property
    def metrics(self):
        return self.trackers

    def call(self, digits):
        return self.decoder(self.encoder(digits)[0])

    def losses_of(self, digits, training):
        mean, log_variance = self.encoder(digits, training=training)
        drawn = self.sampling(mean, log_variance) if training else mean
        ink = keras.losses.binary_crossentropy(digits, self.decoder(drawn, training=training))
        reconstruction = ops.mean(ops.sum(ink, axis=(1, 2)))
        divergence = -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=1)
        divergence = ops.mean(divergence)
        return reconstruction + divergence, reconstruction, divergence

    def train_step(self, digits):
        with tf.GradientTape() as tape:
            losses = self.losses_of(digits, training=True)
        gradients = tape.gradient(losses[0], self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return self.tracked(losses)

    def test_step(self, digits):
        return self.tracked(self.losses_of(digits, training=False))

    def tracked(self, losses):
        for tracker, loss in zip(self.trackers, losses, strict=True):
            tracker.update_state(loss)
        return {tracker.name: tracker.result() for tracker in self.trackers}


def build_model(hp):
    width, codes = hp.Choice("width", [8, 16]), hp.Choice("codes", [2, 4, 8])
    digits = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")(digits)
    x = keras.layers.Conv2D(2 * width, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Dense(16, activation="relu")(keras.layers.Flatten()(x))
    encoder = keras.Model(digits, [keras.layers.Dense(codes)(x), keras.layers.Dense(codes)(x)])
    code = keras.Input((codes,))
    x = keras.layers.Reshape((4, 4, 2 * width))(keras.layers.Dense(32 * width, activation="relu")(code))
    for filters in (2 * width, width):
        x = keras.layers.Conv2DTranspose(filters, 3, strides=2, padding="same", activation="relu")(x)
    decoder = keras.Model(code, keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))
    model = Autoencoder(encoder, decoder)
    model.compile(keras.optimizers.Adam(hp.Float("learning_rate", 2e-3, 2e-2, sampling="log")))
    return model


def load_data(samples):
    """Digits of 16 x 16 pixels: those to train with, and 360 others."""
    digits = np.kron(load_digits().images / 16.0, np.ones((1, 2, 2)))[..., None].astype("float32")
    return digits[:samples], digits[-360:]


def main():
    parser = gallery.parser(__doc__, trials=6, epochs=12, samples=720, memory_budget="4MiB")
    options = parser.parse_args()

    digits, other_digits = load_data(options.samples)
    tuner = accumtune.BayesianOptimization(
        build_model,
        objective="val_loss",
        seed=1,
        micro_batch_sizes=(8, 16, 32, 64),
        accumulation_steps=(1, 2, 4),
        **gallery.arguments(options, "autoencoder"),
    )
    tuner.search(digits, validation_data=(other_digits,), epochs=options.epochs)
    config = gallery.conclude(tuner, options)

    print(f"\nThe gradients of its train_step are, over samples, a {config.trial['own_train_step']}.")
    found = tuner.get_best_models()[0].evaluate(other_digits, verbose=0, return_dict=True)
    print(f"The best model's loss: {found['reconstruction']:.1f} reconstruction, {found['divergence']:.1f} divergence.")


if __name__ == "__main__":
    main()
