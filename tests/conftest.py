"""Fixtures for all tests: a process that starts trials, small models and data."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest
from running import DIGITS, run_experiment


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A finished digits search: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, run_experiment(folder, *DIGITS)


@pytest.fixture(scope="session")
def executor():
    """One fork server for the whole session: starting it imports the framework."""
    from accumtune.trials.executors import LocalExecutor

    with LocalExecutor(os.environ["KERAS_BACKEND"]) as executor:
        yield executor
