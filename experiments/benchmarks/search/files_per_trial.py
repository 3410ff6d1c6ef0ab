"""Counts the package's files whose code runs for a trial, in the process of the search.

    python experiments/benchmarks/search/files_per_trial.py

Searches two trials and prints the files whose functions run in `search()`, in any thread; those that run between the
first proposal and the last trial's end have a star.
"""

import sys
import tempfile
import threading
from pathlib import Path

import keras
import numpy as np

import accumtune

PACKAGE = Path(accumtune.__file__).parent


def build_model(hp):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Choice("width", [1, 2]))])
    model.compile("sgd", "mse")
    return model


class Counting(accumtune.RandomSearch):
    """Notes the files that run."""

    def __init__(self, *args, **kwargs):
        self.files, self.files_of_trials = set(), set()
        self.are_trials_running = False
        super().__init__(*args, **kwargs)

    def pre_create_trial(self):
        self.are_trials_running = True
        super().pre_create_trial()

    def on_search_end(self):
        self.are_trials_running = False
        super().on_search_end()

    def note(self, frame, event, argument):
        if event == "call" and frame.f_code.co_name != "<module>":  # a file that is only imported is not passed through
            self.files.add(frame.f_code.co_filename)
            if self.are_trials_running:
                self.files_of_trials.add(frame.f_code.co_filename)


def main():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        tuner = Counting(
            build_model, objective="val_loss", max_trials=2, seed=1, memory_budget="64MiB", micro_batch_sizes=(4, 8),
            accumulation_steps=(1, 2), directory=folder, project_name="counted", tracking_uri=False,
        )  # fmt: skip
        threading.setprofile(tuner.note)
        sys.setprofile(tuner.note)
        try:
            tuner.search(x, y, validation_data=(x, y), epochs=2, verbose=0)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    files = [Path(name) for name in sorted(tuner.files) if Path(name).is_relative_to(PACKAGE)]
    for path in files:
        print(f"{'*' if str(path) in tuner.files_of_trials else ' '} {path.relative_to(PACKAGE)}")
    of_trials = [path for path in files if str(path) in tuner.files_of_trials]
    print(f"{len(files)} files in search(), {len(of_trials)} of them from the first proposal to the last trial's end")


if __name__ == "__main__":
    main()
