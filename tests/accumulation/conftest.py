"""Runs on whatever KERAS_BACKEND says; JAX gets its float64."""

import os

os.environ.setdefault("JAX_ENABLE_X64", "1")

import pytest


@pytest.fixture(autouse=True)
def float64():
    """Exactness is tested in float64, where a difference is a mistake and not rounding."""
    set_precision("float64")
    yield
    set_precision("float32")


def set_precision(dtype):
    import keras

    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
