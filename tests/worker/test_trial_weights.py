"""A trial's weights are loaded completely, or an error is raised: never a model with some random weights."""

import json
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from accumtune.config.weights import load_weights as load_weights_of_config
from accumtune.errors import ConfigError
from accumtune.worker.transport.task_directory import TaskDirectory
from accumtune.worker.trial_weights import build_as_trained, load_weights

X = np.arange(12, dtype="float32").reshape(4, 3)


class BuildsItself(keras.Model):
    """Makes its layers in `build`, which leaves their variables to the first call, as Keras's guides do."""

    def build(self, input_shape):
        self.hidden, self.out = keras.layers.Dense(5), keras.layers.Dense(2)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


class OfADict(BuildsItself):
    def call(self, inputs):
        return super().call(keras.ops.concatenate([inputs["a"], inputs["b"]], axis=-1))


class OfTwo(BuildsItself):
    def build(self, a_shape, b_shape):
        super().build(None)

    def call(self, a, b):
        return super().call(keras.ops.concatenate([a, b], axis=-1))


@pytest.mark.parametrize(
    "kind, call",
    [
        (BuildsItself, lambda model: model(X)),
        (OfADict, lambda model: model({"a": X, "b": X})),
        (OfTwo, lambda model: model(X, X)),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), lambda model: model(X)),
    ],
)
def test_a_model_that_is_built_by_its_first_call_gets_its_weights(tmp_path, kind, call):
    trained = kind()
    expected = keras.ops.convert_to_numpy(call(trained))
    files = TaskDirectory(tmp_path)
    trained.save_weights(files.weights_file)
    files.build_config_file.write_text(json.dumps(trained.get_build_config()))
    model = kind()
    build_as_trained(model, files.weights_file)
    load_weights(model, files.weights_file)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(call(model)), expected)


def test_what_cannot_be_built_is_refused(tmp_path):
    trained, file = BuildsItself(), tmp_path / "checkpoint.weights.h5"
    expected = keras.ops.convert_to_numpy(trained(X))
    trained.save_weights(file)
    model = BuildsItself()
    model.build((None, 3))
    model.load_weights(file)  # Keras's own: nothing is loaded, and nothing says so
    assert not np.array_equal(keras.ops.convert_to_numpy(model(X)), expected)
    model = BuildsItself()
    model.build((None, 3))
    with pytest.raises(ValueError, match="has weights for layers that are not built: dense.*, dense"):
        load_weights(model, file)
    with pytest.raises(ConfigError, match="do not fit the model"):
        load_weights_of_config(SimpleNamespace(source={}), model, file, None)
    model(X)
    load_weights(model, file)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(X)), expected)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_an_optimizer_that_is_not_built_is_left_without_a_warning(tmp_path, policy):
    """A trial that is continued builds it first, and gets its state; Keras's own loading warns."""

    def build():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype=policy)])
        adam = keras.optimizers.Adam()
        model.compile(keras.optimizers.LossScaleOptimizer(adam) if policy else adam, "mse")
        return model, adam

    file = tmp_path / "checkpoint.weights.h5"
    trained, _ = build()
    trained.fit(X, np.zeros((len(X), 2)), verbose=0)
    trained.save_weights(file)
    model, adam = build()
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        model.load_weights(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(model, file)
    assert not adam.built
    for one, other in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    model.optimizer.build(model.trainable_variables)
    load_weights(model, file)
    state, expected = (
        [keras.ops.convert_to_numpy(one) for one in it.variables] for it in (model.optimizer, trained.optimizer)
    )
    for one, other in zip(state, expected, strict=True):
        np.testing.assert_array_equal(one, other)
