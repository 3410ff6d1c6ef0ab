"""pytest's part of `keras_tests.py`: every `fit` and `train_on_batch` of a `keras.Model` accumulates."""

from __future__ import annotations

import functools
import os
from typing import Any

from suites import VARIANT, Recorder


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Recorder())
    if os.environ[VARIANT]:
        switch_on(int(os.environ[VARIANT].rpartition(" ")[2]))


def switch_on(micro_batch_size: int) -> None:
    """Makes each compiled model accumulate from its first training on; one that is refused trains as plain Keras."""
    import keras

    from accumtune.accumulation import accumulate, accumulation_of
    from accumtune.errors import AccumtuneError

    def accumulating(name: str) -> Any:
        own = getattr(keras.Model, name)

        @functools.wraps(own)
        def train(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model.compiled and accumulation_of(model) is None:
                try:
                    accumulate(model, micro_batch_size)
                except AccumtuneError:
                    return own(model, *args, **kwargs)
                return getattr(model, name)(*args, **kwargs)
            return own(model, *args, **kwargs)

        return train

    for name in ("fit", "train_on_batch"):
        setattr(keras.Model, name, accumulating(name))
