"""A HyperModel's own `fit` that sets some arguments gets the others, and trains nothing twice."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from accumtune.accumulation import accumulate
from accumtune.execution.standalone_training import FixedHyperModel

X, Y = np.ones((8, 2)), np.ones((8, 1))


def own_epochs(hp, model, *args, **kwargs):
    return model.fit(*args, epochs=2, **kwargs)


def two_phases(hp, model, *args, **kwargs):
    model.fit(*args, **kwargs)
    return model.fit(*args, epochs=2, **kwargs)


def trained(fit):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    fixed = FixedHyperModel(SimpleNamespace(hypermodel=SimpleNamespace(fit=fit)), 2, effective_batch_size=4)
    return fixed.fit(None, accumulate(model, 2), X, Y, epochs=3, verbose=0), model


def test_its_own_epochs_hold():
    history, model = trained(own_epochs)
    assert len(history.epoch) == 2 and int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 4


def test_a_phase_that_has_trained_is_not_trained_again():
    with pytest.raises(TypeError, match="multiple values"):
        trained(two_phases)
