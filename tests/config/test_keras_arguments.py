"""The closest equivalent in plain Keras, and the differences that are reported with it."""

import keras
import numpy as np
import pytest
from made_config import build_model, config_of, data

CONFIG = config_of(hyperparameters={"width": 4, "learning_rate": 0.05}, fit_options={"shuffle": False})


def trained(optimizer, samples, arguments, accumulate=None):
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    if accumulate:
        accumulate(model)
    model.fit(*data(samples), verbose=0, **arguments)
    return model.get_weights()


def difference(samples, optimizer):
    """The largest between Keras's own accumulation with these arguments, and accumtune."""
    arguments = CONFIG.keras_arguments()
    keras_own = trained(optimizer(**arguments.optimizer), samples, arguments.fit)
    ours = trained(optimizer(), samples, CONFIG.fit_arguments(), CONFIG.accumulate)
    return max(np.abs(a - b).max() for a, b in zip(keras_own, ours, strict=True))


def test_it_reads_as_arguments():
    arguments = CONFIG.keras_arguments()
    assert arguments.optimizer == {"gradient_accumulation_steps": 4}
    assert arguments.fit == {"batch_size": 8, "epochs": 3, "shuffle": False}
    assert arguments.hyperparameters == {"width": 4, "learning_rate": 0.05}
    assert all(text in str(arguments) for text in ("gradient_accumulation_steps=4", "batch_size=8", "- Learning-rate"))
    assert arguments.to_dict()["differences"] == list(arguments.differences)
    # Also without accumulation, where nothing else differs.
    trial = {"not_carried": ["search() was given callbacks: Halving"]}
    alone = config_of(micro_batch_size=32, accumulation_steps=1, hyperparameters={}, trial=trial)
    (difference,) = alone.keras_arguments().differences
    assert "callbacks: Halving" in difference


def test_whole_windows_and_a_constant_rate_are_the_same_training():
    assert difference(128, lambda **own: keras.optimizers.SGD(0.05, **own)) < 1e-5


def test_schedules_run_too_fast_as_is_said():
    def optimizer(**own):
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5), **own)

    def mended(**own):
        decay_steps = 2 * own.get("gradient_accumulation_steps", 1)
        return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.05, decay_steps, 0.5), **own)

    assert difference(128, optimizer) > 1e-3
    # The update reads the rate at the last micro-step of its window: nearly, not exactly, where it should.
    assert difference(128, mended) < difference(128, optimizer) / 3
    assert any("schedules" in text and "decay_steps and warmup_steps by 4" in text
               for text in CONFIG.keras_arguments().differences)  # fmt: skip


def test_an_incomplete_window_makes_no_update_as_is_said():
    assert difference(128 + 8, lambda **own: keras.optimizers.SGD(0.05, **own)) > 1e-3
    assert any("makes no update" in text for text in CONFIG.keras_arguments().differences)


def test_one_step_is_plain_keras():
    whole = config_of(micro_batch_size=32, accumulation_steps=1, hyperparameters={})
    assert whole.keras_arguments().optimizer == {} and whole.keras_arguments().differences == ()
    scaled = config_of(
        micro_batch_size=32, accumulation_steps=1, hyperparameters={}, learning_rate_scaling="sqrt",
        base_effective_batch_size=8,
    )  # fmt: skip
    (difference,) = scaled.keras_arguments().differences
    assert "learning rate by 2 (sqrt" in difference


def test_steps_and_replicas_count_as_keras_counts():
    config = config_of(hyperparameters={}, fit_options={"steps_per_epoch": 5}).for_replicas(2)
    arguments = config.keras_arguments()
    assert arguments.optimizer == {"gradient_accumulation_steps": 2}
    assert arguments.fit["batch_size"] == 16 and arguments.fit["steps_per_epoch"] == 10
    ragged = config_of(accumulation_steps=4, effective_batch_size=30, hyperparameters={}).keras_arguments()
    assert "32 samples instead of 30" in ragged.differences[0]
    coupled = config_of(batch_coupled_layers=["BatchNormalization"]).keras_arguments()
    assert any("BatchNormalization" in text for text in coupled.differences)
    ghosts = config_of(ghost_batch_size=4).keras_arguments()
    assert "all 8 samples of a micro-batch together instead of groups of 4" in ghosts.differences[0]


def test_what_is_called_is_accepted():
    """The names are those of Keras: a build with them trains."""
    arguments = config_of().keras_arguments()
    model = build_model(hyperparameters_of(arguments))
    model.compile(keras.optimizers.Adam(1e-3, **arguments.optimizer), "mse")
    model.fit(*data(64), verbose=0, **arguments.fit)
    assert int(model.optimizer.iterations) == pytest.approx(64 / 32 * 3)


def hyperparameters_of(arguments):
    import keras_tuner

    hp = keras_tuner.HyperParameters()
    hp.values.update(arguments.hyperparameters)
    return hp
