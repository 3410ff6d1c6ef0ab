"""Compares accumulated training with plain training: everything that a training changes."""

from dataclasses import dataclass, field

import keras
import numpy as np

import accumtune.accumulation as accumulation

BACKEND = keras.backend.backend()

FLOAT64 = 1e-9
FLOAT32 = 1e-5

REDUCTIONS = ("sum", "sum_over_batch_size", "mean_with_sample_weight")

SAMPLES, EFFECTIVE = 21, 8  # windows of 8, 8 and 5; micro-batches of 3 leave 3 + 2


@dataclass
class Trained:
    model: keras.Model
    history: dict
    events: list = field(default_factory=list)

    def weights(self):
        return [as_array(v) for v in self.model.variables if "seed" not in v.path]

    def optimizer_state(self):
        return [as_array(v) for v in self.model.optimizer.variables]

    def updates(self):
        return int(as_array(self.model.optimizer.iterations))


class Events(keras.callbacks.Callback):
    """Records what callbacks see: the steps, and the number of updates so far."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(("batch", batch, sorted(logs)))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(("epoch", epoch, sorted(logs), self.params["steps"]))


def as_array(value):
    return np.asarray(keras.ops.convert_to_numpy(value), dtype="float64")


def train(build, data, micro_batch_size=None, accumulation_steps=None, seed=7, **fit):
    """Builds and fits a model, accumulating if one of the two sizes is given."""
    keras.utils.set_random_seed(seed)
    model = build()
    if micro_batch_size or accumulation_steps:
        accumulation.accumulate(model, micro_batch_size, accumulation_steps=accumulation_steps)
    events = Events()
    arguments = {"batch_size": EFFECTIVE, "epochs": 2, "verbose": 0, "shuffle": False} | data | fit
    history = model.fit(callbacks=[events, *arguments.pop("callbacks", ())], **arguments)
    return Trained(model, history.history, events.seen)


def largest_difference(one, other):
    """Returns the largest difference of weights and optimizer state, relative to the value or 1."""
    pairs = zip(one.weights() + one.optimizer_state(), other.weights() + other.optimizer_state(), strict=True)
    return max(float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0)) for a, b in pairs)


def assert_same_training(accumulated, plain, tolerance=FLOAT64, history=True):
    assert accumulated.updates() == plain.updates()
    assert accumulated.events == plain.events
    assert largest_difference(accumulated, plain) <= tolerance
    assert any(np.abs(array).max() > 0 for array in plain.weights() if array.size)
    if history:
        assert accumulated.history.keys() == plain.history.keys()
        for name, values in plain.history.items():
            np.testing.assert_allclose(accumulated.history[name], values, rtol=tolerance * 10, atol=tolerance * 10)


def assert_exact(build, data, micro_batch_sizes=(3,), tolerance=FLOAT64, history=True, **fit):
    """Compares both forms with plain Keras: batches of 8 split into micro-batches, and two batches of 4 joined."""
    plain = train(build, data, **fit)
    for size in micro_batch_sizes:
        assert_same_training(train(build, data, micro_batch_size=size, **fit), plain, tolerance, history)
    joined = train(build, data, accumulation_steps=2, **(fit | {"batch_size": EFFECTIVE // 2}))
    assert_same_training(joined, plain, tolerance, history)
    return plain


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def regression(samples=SAMPLES, **extra):
    return {"x": numbers(samples, 4), "y": numbers(samples, 2, seed=1), **extra}


def weights_with_empty_micro_batches():
    """Sample weights; those of the first micro-batch and of one in the middle are all zero."""
    weights = np.random.default_rng(2).uniform(0.1, 2.0, SAMPLES)
    weights[:4] = 0
    weights[11:14] = 0
    return weights


def sequences(vocabulary=6):
    """Sequences of 5, padded with 0 at the end to very different lengths; one micro-batch is padding throughout."""
    random = np.random.default_rng(4)
    tokens = random.integers(1, vocabulary, (SAMPLES, 5))
    for sample, length in enumerate(random.integers(1, 6, SAMPLES)):
        tokens[sample, length:] = 0
    tokens[8:11] = 0
    return tokens


def dense(loss="mse", optimizer=None, layers=(), **compile):
    """A builder of a small model with two outputs numbers per sample."""

    def build():
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), *layers, keras.layers.Dense(2)]
        )
        model.compile(optimizer() if optimizer else keras.optimizers.SGD(0.1, momentum=0.9), loss, **compile)
        return model

    return build
