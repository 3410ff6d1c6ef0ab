"""Configurations, models and data for these tests."""

import numpy as np

from accumtune.config import TrainingConfig

MIB = 2**20


def config_of(**values):
    defaults = {
        "micro_batch_size": 8,
        "accumulation_steps": 4,
        "effective_batch_size": 32,
        "hyperparameters": {"width": 16, "learning_rate": 0.01, "kind": "relu", "wide": True, "micro_batch_size": 8},
        "memory_budget_bytes": 64 * MIB,
        "peak_memory_bytes": 40 * MIB,
        "memory_source": "BFC allocator",
        "throughput_samples_per_second": 1234.5,
        "objective": {"name": "val_loss", "direction": "min", "value": 0.1234},
        "epochs": 3,
        "precision_policy": "float32",
        "backend": "tensorflow",
        "versions": {"keras": "3.15.1"},
        "device": "CPU",
        "data_shapes": {"x": [100, 8], "y": None},
        "policy": "quality",
        "reason": "It is the only candidate.",
        "source": {"experiment": "digits", "run_id": "abc", "tracking_uri": "http://me:secret@host:5000"},
    }
    return TrainingConfig(**defaults | values)


def build_model(hp):
    import keras

    model = keras.Sequential([
        keras.Input((64,)),
        keras.layers.Dense(hp.Int("width", 4, 4096, default=4), activation="relu"),
        keras.layers.Dense(1),
    ])  # fmt: skip
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-4, 1.0, default=1e-3)), "mse")
    return model


def data(samples=256):
    rng = np.random.default_rng(0)
    return rng.normal(size=(samples, 64)).astype("float32"), rng.normal(size=(samples, 1)).astype("float32")


def hyperparameters(config):
    import keras_tuner

    hp = keras_tuner.HyperParameters()
    hp.values.update(config.hyperparameters)
    return hp


def moved_training(configs, floatx):
    """In a process of its own: the weights after the same three epochs with each configuration."""
    import contextlib

    import keras
    import tensorflow as tf

    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    keras.config.set_floatx(floatx)
    x, y = data(72)  # the last window is smaller
    weights = []
    for text in configs:
        config = TrainingConfig.from_json(text)
        keras.utils.set_random_seed(3)
        scope = contextlib.nullcontext()
        if config.replicas > 1:
            scope = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(config.replicas)]).scope()
        with scope:
            model = config.build(build_model)
            model.fit(x.astype(floatx), y.astype(floatx), verbose=0, shuffle=False, **config.fit_arguments(epochs=3))
        weights.append([variable.numpy().tolist() for variable in model.weights])
    return weights
