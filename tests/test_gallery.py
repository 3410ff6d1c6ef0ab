"""Each search of the gallery runs in a small form, and its last lines show the intended result."""

import gzip
import os
import re
import subprocess
import sys

import forked
import numpy as np
import pytest
from running import EXPERIMENTS, run_experiment

TINY = ("--trials", "1", "--epochs", "1", "--samples", "48")
SCRIPTS = {
    "tabular.py": "Effective batch",
    "language_model.py": "bits per byte",
    "segmentation.py": "Micro-batches that were run",
    "autoencoder.py": "gradients of its train_step are, over samples, a mean",
    "fine_tuning.py": "largest micro-batch",
    "fashion_mnist.py": "Ghost batch: ",
    "docstrings.py": "a mean of micro-batches' losses",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One folder for all: an MLflow store, which takes seconds to create, and Fashion-MNIST's files as Keras has them.

    The pictures are noise: nothing is downloaded.
    """
    shared = tmp_path_factory.mktemp("gallery")
    folder = shared / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        labels = random.integers(0, 10, 64, "uint8").tobytes()
        pictures = random.integers(0, 256, (64, 28, 28), "uint8").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pictures))
    return shared


@pytest.mark.slow
@pytest.mark.parametrize("script, words", SCRIPTS.items())
def test_a_search_of_the_gallery_runs_and_says_what_it_found(script, words, tmp_path, shared, monkeypatch):
    if script == "fine_tuning.py":
        pytest.importorskip("keras_hub", reason="pip install keras-hub, for the fine-tuning search alone")
    run = forked.run
    if script == "fashion_mnist.py":
        monkeypatch.setenv("KERAS_HOME", str(shared))  # which Keras reads when it is imported
        run = subprocess.run
    output = run_experiment(tmp_path, script, *TINY, "--tracking-uri", f"sqlite:///{shared}/mlflow.db", run=run)
    assert "[1/1]   → val_" in output and "Why:" in output and words in output
    assert list(tmp_path.glob("mlruns/searches/*/best_config.json"))


def test_the_gallery_is_described_and_its_scripts_are_short():
    described = (EXPERIMENTS / "README.md").read_text()
    for script in (*SCRIPTS, "digits.py"):
        assert f"python experiments/{script}" in described, f"{script} is not in experiments/README.md"
        assert len((EXPERIMENTS / script).read_text().splitlines()) < 150
    pictures = re.findall(r"!\[.+\]\((pictures/.+)\)", described)
    assert len(pictures) == len(SCRIPTS)
    assert all((EXPERIMENTS / picture).stat().st_size < 100_000 for picture in pictures)


def test_the_gpu_benchmark_says_so_where_there_is_no_gpu(tmp_path):
    """An empty PATH hides nvidia-smi where there is one."""
    done = forked.run(
        [sys.executable, str(EXPERIMENTS / "benchmarks" / "engine" / "gpu.py"), "--json", str(tmp_path / "gpu.json")],
        env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout
    assert '"rows": []' in (tmp_path / "gpu.json").read_text()
