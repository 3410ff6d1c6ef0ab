"""Runs on whatever KERAS_BACKEND says, in true float64."""

import os

os.environ.setdefault("JAX_ENABLE_X64", "1")

import pytest
from precision import let_keras_compute_in_float64, set_precision


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Exactness is tested in float64, where a difference is a mistake and not rounding."""
    let_keras_compute_in_float64(monkeypatch.setitem)
    set_precision("float64")
    yield
    set_precision("float32")
