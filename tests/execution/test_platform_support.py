"""Functions that need Linux raise an error at once on other systems; all others work there."""

import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = """
import os, signal, sys
import keras, keras_tuner, numpy as np
for name in ("fork", "sched_getaffinity", "setpgid", "killpg", "memfd_create", "sysconf", "waitstatus_to_exitcode"):
    delattr(os, name)
for name in ("SIGKILL", "SIGCHLD", "SIGPIPE", "SIGBUS"):
    delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
sys.platform = PLATFORM
import accumtune, accumtune.cli
from accumtune import errors

def build(hp):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
model = accumtune.accumulate(build(None), micro_batch_size=2)
model.fit(x, y, batch_size=8, verbose=0)
assert accumtune.batch_coupled_layers(model) == []
sys.path.insert(0, TESTS)
from made_config import config_of
config_of(hyperparameters={}).save("config.json")
assert accumtune.load_config("config.json").build(build) is not None
for start in (
    lambda: accumtune.RandomSearch(build, objective="loss", max_trials=1),
    lambda: accumtune.profile(build, x, y),
    lambda: accumtune.AccumulationHyperModel(build, memory_budget="1GiB"),
):
    try:
        start()
    except errors.WorkerError as error:
        assert "Linux" in str(error) and "WSL 2" in str(error), error
    else:
        raise AssertionError(start)
print("as promised")
"""


@pytest.mark.slow
def test_accumulation_works_elsewhere_and_a_search_says_what_it_needs(tmp_path):
    tests = Path(__file__).parents[1] / "config"
    script = ELSEWHERE.replace("PLATFORM", repr("win32")).replace("TESTS", repr(str(tests)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert "as promised" in done.stdout, done.stderr[-2000:]
