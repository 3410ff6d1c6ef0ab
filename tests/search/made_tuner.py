"""Tuners of small searches, and their data."""

from models import build_plain, data

import accumtune

X, Y = data()


def make(tmp_path, kind=accumtune.RandomSearch, build=build_plain, **kwargs):
    defaults = {
        "objective": "val_loss", "memory_budget": "16MiB", "micro_batch_sizes": (4, 8), "accumulation_steps": (1, 2),
        "tracking_uri": False, "directory": tmp_path, "project_name": "search",
    }  # fmt: skip
    if kind is not accumtune.Hyperband:
        defaults |= {"max_trials": 3, "seed": 1}
    return kind(build, **{**defaults, **kwargs})


def search(tuner, epochs=2, **kwargs):
    tuner.search(X, Y, validation_data=(X, Y), epochs=epochs, verbose=0, **kwargs)
    return tuner
