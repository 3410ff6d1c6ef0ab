"""Attributes that a user sets on objects are still there after a training."""

import keras
import numpy as np
import pytest
from equality import BACKEND, dense, regression

from accumtune.accumulation import accumulate, stop_accumulating
from accumtune.accumulation.patched_attributes import replaced


class Anything:
    def name(self):
        return "the class's"


def test_what_was_there_is_back_and_what_was_not_is_gone():
    plain, own = Anything(), Anything()
    own.name = "the object's"
    for thing, expected in ((plain, {}), (own, {"name": "the object's"})):
        with pytest.raises(KeyError), replaced(thing, {"name": 1}):
            assert thing.name == 1
            raise KeyError
        assert vars(thing) == expected


def test_what_is_put_on_a_layer_is_none_of_its_weights():
    layer, kept = keras.layers.Dense(1), keras.Variable(1.0)
    with replaced(layer, {"kept": kept}):
        assert layer.kept is kept and layer.weights == []
    assert not hasattr(layer, "kept")


@pytest.mark.skipif(BACKEND == "jax", reason="the update on JAX is Keras's own, without state in its objects")
def test_a_training_leaves_what_is_on_the_optimizer_and_on_layers():
    """A debugger's wrappers, each called as without accumulation."""
    model = dense(layers=[keras.layers.BatchNormalization()])()
    targets = [(model.layers[1], "_moments")]
    targets.append((model.optimizer, "assign" if BACKEND == "tensorflow" else "_parallel_update_step"))
    called = []

    def noted(name, method):
        def call(*args, **kwargs):
            called.append(name)
            return method(*args, **kwargs)

        return call

    wrappers = {name: noted(name, getattr(target, name)) for target, name in targets}
    for target, name in targets:
        object.__setattr__(target, name, wrappers[name])
    accumulate(model, 3)
    model.fit(**regression(), batch_size=8, verbose=0)
    assert set(called) == set(wrappers)
    assert all(vars(target)[name] is wrappers[name] for target, name in targets)


def test_a_fit_that_the_model_was_given_is_used_and_stays():
    model, calls = dense()(), []
    keras_fit = model.fit

    def fit(*args, **kwargs):
        calls.append(kwargs)
        return keras_fit(*args, verbose=0, **kwargs)

    object.__setattr__(model, "fit", fit)
    accumulate(model, accumulation_steps=2)
    model.fit(**regression(), batch_size=4)
    assert calls and int(np.asarray(keras.ops.convert_to_numpy(model.optimizer.iterations))) == 3
    assert vars(stop_accumulating(model))["fit"] is fit
