"""With JAX or torch as Keras's backend, nothing needs TensorFlow to be there."""

import os
import subprocess
import sys
import textwrap

import keras
import pytest

# Read by every Python that starts, those of the fork server included.
NO_TENSORFLOW = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] == "tensorflow" else find_spec(name, *more)
"""
SCRIPT = """
import sys
import accumtune, keras, numpy as np

def build_model(hp):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Choice("width", [8])), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 0.001, 0.002)), "mse")
    return model

x, y = np.ones((32, 4), "float32"), np.ones((32, 1), "float32")
tuner = accumtune.RandomSearch(
    build_model, objective="loss", max_trials=1, micro_batch_sizes=(4,), accumulation_steps=(2,), tracking_uri=False
)
tuner.search(x, y, epochs=1)
model = tuner.get_best_config().build(build_model)
model.fit(x, y, batch_size=8, verbose=0)
assert "tensorflow" not in sys.modules
print("TRAINED", tuner.get_best_config().effective_batch_size)
"""


def run(folder, backend):
    (folder / "sitecustomize.py").write_text(textwrap.dedent(NO_TENSORFLOW))
    (folder / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", os.getcwd())])
    return subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": backend},
    )  # fmt: skip


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="for KERAS_BACKEND=jax or torch, as .ci/run has it")
def test_a_search_runs_without_tensorflow(tmp_path):
    done = run(tmp_path, keras.backend.backend())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRAINED 8" in done.stdout


def test_tensorflow_would_be_missed(tmp_path):
    done = run(tmp_path, "tensorflow")
    assert done.returncode != 0 and "No module named 'tensorflow" in done.stderr
