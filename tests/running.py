"""Runs scripts of `experiments/` as a user does."""

import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# The README's main job on a smaller setting.
DIGITS = ("digits.py", "--trials", "3", "--epochs", "2", "--register-as", "digits")


def run_experiment(folder, script, *arguments):
    """Runs a script of `experiments/` in a folder and returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / script), *arguments], cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
