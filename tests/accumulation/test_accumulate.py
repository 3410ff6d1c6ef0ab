"""The public functions: arguments that they accept and refuse, and saved models."""

import contextlib
import pickle
import subprocess
import sys
import textwrap

import forked
import keras
import numpy as np
import pytest
from equality import dense, numbers, regression
from running import WITHOUT_ACCUMTUNE

from accumtune.accumulation import (
    Accumulation,
    accumulate,
    accumulation_of,
    stop_accumulating,
)
from accumtune.errors import BatchSizeError, CustomTrainStepError, ModelError, UncompiledModelError


def test_the_same_model_comes_back_and_says_how_it_accumulates():
    model = dense()()
    kind = type(model)
    assert accumulation_of(model) is None
    assert accumulate(model, 8) is model and type(model) is kind
    assert accumulation_of(model) == Accumulation(micro_batch_size=8)
    assert accumulation_of(accumulate(model, accumulation_steps=4)) == Accumulation(accumulation_steps=4)
    assert accumulation_of(stop_accumulating(model)) is None
    assert stop_accumulating(model) is model


def test_importing_loads_no_framework():
    code = "import sys, accumtune.accumulation as a; assert not {'keras','tensorflow','jax','torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [(0,), (-3,), (1.5,), ("8",), (True,), ()])
def test_bad_sizes(arguments):
    with pytest.raises(BatchSizeError, match="Expected"):
        accumulate(dense()(), *arguments)
    with pytest.raises(BatchSizeError):
        accumulate(dense()(), 2, accumulation_steps=2)


def test_uncompiled():
    with pytest.raises(UncompiledModelError, match="compile"):
        accumulate(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), 2)


class OwnFunction(keras.Model):
    def make_train_function(self, force=False):
        return super().make_train_function(force)


def test_own_train_function():
    model = OwnFunction()
    model.compile("sgd", "mse")
    with pytest.raises(CustomTrainStepError, match="compute_loss") as caught:
        accumulate(model, 2)
    assert "OwnFunction" in str(caught.value) and "make_train_function" in str(caught.value)


def test_not_a_model():
    with pytest.raises(ModelError):
        accumulate("model", 2)


def test_an_optimizer_that_accumulates_already():
    model = dense(optimizer=lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))()
    with pytest.raises(ModelError, match="gradient_accumulation_steps"):
        accumulate(model, 2)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
@pytest.mark.parametrize("steps", [2, None])
def test_an_optimizer_that_hands_on_to_one_that_accumulates_already(steps):
    """Chosen by a map it is known at once, by a function only where the optimizer is built."""
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
    with pytest.raises(ModelError, match="gradient_accumulation_steps=2") if steps else contextlib.nullcontext():
        accumulate(dense(optimizer=lambda: keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(inner)))(), 2)
    model = accumulate(dense(optimizer=lambda: keras.optimizers.MultiOptimizer(lambda variable: inner))(), 2)
    with pytest.raises(ModelError, match="gradient_accumulation_steps=2") if steps else contextlib.nullcontext():
        model.fit(**regression(), batch_size=8, verbose=0)


def test_a_loss_without_reduction():
    model = accumulate(dense(keras.losses.MeanSquaredError(reduction=None))(), 3)
    with pytest.raises(ModelError, match="reduction"):
        model.train_on_batch(*regression().values())


# Saved models are plain Keras


def test_what_is_saved_loads_where_accumtune_is_not_installed(tmp_path):
    model = accumulate(dense(optimizer=lambda: keras.optimizers.Adam(0.01))(), 3)
    model.fit(**regression(), batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    np.save(tmp_path / "x.npy", numbers(3, 4))
    code = f"""
        import keras, numpy as np
        from keras.src.backend.common import dtypes
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"      # as in conftest.py, on both sides of the comparison
        keras.config.set_floatx("float64")
        model = keras.saving.load_model(r"{tmp_path / "model.keras"}")
        x = np.load(r"{tmp_path / "x.npy"}")
        np.save(r"{tmp_path / "y.npy"}", model.predict(x, verbose=0))
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 3
        copy = keras.models.clone_model(model)
        copy.load_weights(r"{tmp_path / "model.weights.h5"}")
        np.testing.assert_array_equal(copy.predict(x, verbose=0), np.load(r"{tmp_path / "y.npy"}"))
        model.fit(x, np.zeros((3, 2)), verbose=0)
    """
    forked.run([sys.executable, "-c", WITHOUT_ACCUMTUNE + textwrap.dedent(code)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(numbers(3, 4), verbose=0), rtol=1e-6)


def test_copies_are_plain():
    model = accumulate(dense()(), accumulation_steps=3)
    model.fit(**regression(), batch_size=4, verbose=0)
    for copy in (pickle.loads(pickle.dumps(model)), keras.models.clone_model(model)):
        assert accumulation_of(copy) is None
        assert not {"fit", "make_train_function"} & vars(copy).keys()
    assert "train_function" not in str(model.get_config())
