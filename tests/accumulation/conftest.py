"""Runs on whatever KERAS_BACKEND says, in true float64."""

import os

os.environ.setdefault("JAX_ENABLE_X64", "1")

import pytest


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Exactness is tested in float64, where a difference is a mistake and not rounding."""
    let_keras_compute_in_float64(monkeypatch.setitem)
    set_precision("float64")
    yield
    set_precision("float32")


def set_precision(dtype):
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def let_keras_compute_in_float64(set_item):
    """Lifts a rule of Keras on JAX and torch: where dtypes are promoted, float64 becomes float32.

    With it, a model of float64 adds, divides, averages and normalizes in float32, and sums of a batch (a bias's
    gradient, a mean) depend on how they are grouped: plain Keras has no more than 1e-7 then, on either side of a
    comparison. `test_float64_as_keras_has_it` leaves the rule as it is.
    """
    from keras.src.backend.common import dtypes

    set_item(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
