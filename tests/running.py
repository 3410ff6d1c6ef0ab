"""Runs scripts of `experiments/` as a user does."""

import sys
import time
from pathlib import Path

import forked

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# The README's main job on a smaller setting.
DIGITS = ("digits.py", "--trials", "3", "--epochs", "2", "--register-as", "digits")


def run_experiment(folder, script, *arguments, run=forked.run):
    """Runs a script of `experiments/` in a folder and returns what it printed."""
    done = run(
        [sys.executable, str(EXPERIMENTS / script), *arguments], cwd=folder, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Before what must work where accumtune is not installed: no module of it can be imported, nor is there one already.
WITHOUT_ACCUMTUNE = """
import sys
sys.modules.update({name: None for name in ("accumtune", *sys.modules) if name.partition(".")[0] == "accumtune"})
"""


def wait_until_gone(pid, seconds=20.0):
    """Returns whether the process has ended within this time; a zombie, which only waits for its parent, has."""
    deadline = time.monotonic() + seconds
    while is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
