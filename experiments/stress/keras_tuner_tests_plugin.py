"""pytest's part of `keras_tuner_tests.py`: accumtune's tuners stand where Keras Tuner's stood."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from typing import Any

from suites import VARIANT, Recorder

TUNERS = ("Tuner", "RandomSearch", "BayesianOptimization", "Hyperband", "GridSearch")
# What accumtune's tuners are given beside a test's own arguments: small batches, and no MLflow.
DEFAULTS = {"tracking_uri": False, "micro_batch_sizes": (8,), "accumulation_steps": (2, 4)}


def pytest_configure(config: Any) -> None:
    recorder = Recorder()
    config.pluginmanager.register(recorder)
    old_names()
    if os.environ[VARIANT]:
        switch_on(recorder)


def old_names() -> None:
    """Makes `keras_tuner.engine.tuner` mean `keras_tuner.src.engine.tuner`, as when tests were last shipped."""
    import keras_tuner.src

    for found in pkgutil.walk_packages(keras_tuner.src.__path__, "keras_tuner.src."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:  # needs what is not installed
            continue
        old = found.name.replace("keras_tuner.src.", "keras_tuner.")
        sys.modules.setdefault(old, module)
        parent, _, name = old.rpartition(".")
        if not hasattr(sys.modules[parent], name):
            setattr(sys.modules[parent], name, sys.modules[old])


def switch_on(recorder: Recorder) -> None:
    import keras_tuner

    import accumtune

    own_search = accumtune.Tuner.search

    @functools.wraps(own_search)
    def search(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return own_search(tuner, *args, **kwargs)
        finally:
            trials = tuner.oracle.trials.values()
            if trials and not any(trial.status == "COMPLETED" for trial in trials):
                recorder.note = "none of its trials completed"

    accumtune.Tuner.search = search

    for name in TUNERS:
        ours = with_defaults(getattr(accumtune, name))
        for module in (keras_tuner, keras_tuner.tuners):
            if hasattr(module, name):
                setattr(module, name, ours)


def with_defaults(tuner: type) -> type:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        tuner.__init__(self, *args, **{**DEFAULTS, **kwargs})  # type: ignore[misc]

    return type(tuner.__name__, (tuner,), {"__init__": __init__, "__doc__": tuner.__doc__})
