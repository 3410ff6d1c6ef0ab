"""Fixtures for all tests: a process that starts trials, small models and data."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# The README's main job on a smaller setting.
DIGITS = ("digits.py", "--trials", "3", "--epochs", "2")


def run_experiment(folder, script, *arguments):
    """Runs a script of `experiments/` in a folder and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *arguments], cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
