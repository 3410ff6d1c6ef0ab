"""The build function's result is checked, and its learning rate is scaled if the user wants that."""

import keras
import keras_tuner
import numpy as np
import pytest

from accumtune import errors
from accumtune.worker.builder import ModelBuilder, scale_learning_rate
from accumtune.worker.identity.memory_signature import describe_model


def build(hp, rate=0.1, units=2, dropout=0.0):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units), keras.layers.Dropout(dropout)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def hyperparameters(**values):
    hp = keras_tuner.HyperParameters()
    hp.values.update(values)
    return hp


@pytest.mark.parametrize("scaling, expected", [(None, 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_the_learning_rate_grows_with_the_effective_batch(scaling, expected):
    builder = ModelBuilder(build, learning_rate_scaling=scaling, base_effective_batch_size=8)
    model = builder.build_plain(hyperparameters(effective_batch_size=32))
    assert float(model.optimizer.learning_rate) == pytest.approx(expected)


def test_schedules_are_scaled_and_keep_their_steps():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100, warmup_target=0.5, warmup_steps=10)
    optimizer = keras.optimizers.Adam(schedule)
    before = [float(schedule(step)) for step in (0, 5, 10, 60)]
    scale_learning_rate(optimizer, 3.0)
    after = [float(optimizer._learning_rate(step)) for step in (0, 5, 10, 60)]
    assert after == pytest.approx([3 * rate for rate in before])


def test_a_schedule_of_ones_own_is_not_scaled_silently():
    class Mine(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

        def get_config(self):
            return {"speed": 3}

    with pytest.raises(errors.ModelError, match="Mine"):
        scale_learning_rate(keras.optimizers.SGD(Mine()), 2.0)


def test_keras_tuner_compile_arguments_override():
    builder = ModelBuilder(build, optimizer=keras.optimizers.Adam(0.5), loss="mae")
    first, second = builder.build_plain(hyperparameters()), builder.build_plain(hyperparameters())
    assert isinstance(first.optimizer, keras.optimizers.Adam) and first.loss == "mae"
    assert first.optimizer is not second.optimizer


def test_what_a_tuner_does_not_override_stays_as_it_was_compiled():
    """As in Keras Tuner, of which `optimizer=` alone had taken the metrics away."""

    def compiled(hp):
        model = build(hp)
        metrics, weighted = [keras.metrics.MeanAbsoluteError(name="off")], ["mse"]
        model.compile("sgd", "mse", loss_weights=[2.0], metrics=metrics, weighted_metrics=weighted, jit_compile=False)
        return model

    x, y = np.ones((4, 3)), np.zeros((4, 2))
    plain = compiled(None)
    model = ModelBuilder(compiled, optimizer=keras.optimizers.Adam(0.5)).build_plain(hyperparameters())
    model.set_weights(plain.get_weights())
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    assert model.evaluate(x, y, return_dict=True, verbose=0) == plain.evaluate(x, y, return_dict=True, verbose=0)
    assert model.jit_compile is False
    model = ModelBuilder(compiled, metrics=[keras.metrics.MeanSquaredError(name="own")]).build_plain(hyperparameters())
    assert {"own", "mse"} < set(model.evaluate(x, y, return_dict=True, verbose=0))
    assert isinstance(model.optimizer, keras.optimizers.SGD)


def signature(**options):
    keras.backend.clear_session()  # layers are named anew, as in the process of each trial
    sample = (np.zeros((1, 3)), np.zeros((1, 1)), None)
    return describe_model(build(None, **options), sample, "CPU:0", {"effective_batch_size": 8})["signature"]


@pytest.mark.slow
def test_a_signature_is_shared_by_models_that_take_the_same_memory():
    assert signature(rate=0.1) == signature(rate=0.2)
    assert signature(dropout=0.3) == signature(dropout=0.5)
    assert signature(units=2) != signature(units=3)
    assert signature(dropout=0.0) != signature(dropout=0.5)
