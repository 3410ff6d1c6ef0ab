"""Fixtures of exactness: tests run on the backend of KERAS_BACKEND, in float64 throughout."""

import os

os.environ.setdefault("JAX_ENABLE_X64", "1")

import pytest
from precision import let_keras_compute_in_float64, set_precision


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Uses float64, where a difference is an error and not rounding."""
    let_keras_compute_in_float64(monkeypatch.setitem)
    set_precision("float64")
    yield
    set_precision("float32")


@pytest.fixture(autouse=True)
def rows_are_gathered_ahead(monkeypatch):
    """Exactness is shown with a thread that gathers rows, which small batches would do without."""
    from accumtune.accumulation.data import row_indices

    monkeypatch.setattr(row_indices, "LEAST_BYTES_AHEAD", 0)
    monkeypatch.setattr(row_indices, "may_gather_ahead", True)
