"""Runs Keras's own tests that train, with and without accumulation, and compares the outcomes.

FOLDER holds Keras's unpacked source distribution, of the version that is installed:

    pip download --no-deps --no-binary :all: keras==3.15.1 && tar xzf keras-3.15.1.tar.gz
    python experiments/stress/keras_tests.py keras-3.15.1 [--micro-batch-sizes 2 3] [--only trainers]

Set KERAS_BACKEND for another backend than TensorFlow. Needs pytest and the packages that Keras's tests import. Exits
with 1 if a test passes only without accumulation and no reason is documented below.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import suites
from common import keep, parser
from keras_tests_plugin import training_tests

# What trains a model: the trainer, models, callbacks, layers with a training check, optimizers.
ONLY = ("/trainers/", "/models/", "/callbacks/", "/layers/", "/optimizers/")
DOCUMENTED = {
    "BackupAndRestoreCallbackTest::test_be": "it counts forward passes, of which an update has one per micro-batch",
    "BackupAndRestoreCallbackTest::test_backup_corrupted": "it counts forward passes, as test_best_case_epoch",
    "SwapEMAWeightsTest::test_swap_ema_weights": "it compares losses of evaluate() and of fit's validation to the last "
    "bit; the latter runs in micro-batches, whose losses are added up in another order",
    "MelSpectrogramTest::test_mel_spectrogram_basics": "its first axis is time and not samples: a sequence of 16,000 "
    "numbers with targets of 80 rows, which is refused",
    "TestTrainer::test_retracing": "a train_step of the model's own is tried on samples before the first window (21 to "
    "26 traces, and none after it); on TensorFlow that refuses the test's model where its one ReLU is dead",
}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("folder", type=Path, help="Keras's unpacked source distribution")
    made.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[2, 3])
    made.add_argument("--only", nargs="+", default=ONLY, help="parts of the paths of the test files to run")
    made.add_argument("--timeout-seconds", type=float, default=3600, help="of each run")
    options = made.parse_args()

    files = suites.test_files(options.folder.resolve(), options.only)
    files = [file for file in files if training_tests(file)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(variant: str) -> dict[str, dict[str, str]]:
            return suites.run(files, "keras_tests_plugin", variant, folder, options.timeout_seconds)

        untouched = run("")
        changed = {variant: run(variant) for variant in (f"micro-batch {size}" for size in options.micro_batch_sizes)}
    result = suites.report(untouched, changed, DOCUMENTED)
    keep(options.json, result)
    return 1 if result["undocumented"] else 0


if __name__ == "__main__":
    sys.exit(main())
