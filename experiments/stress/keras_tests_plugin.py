"""pytest's part of `keras_tests.py`: every `fit` and `train_on_batch` of a `keras.Model` accumulates."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

from suites import VARIANT, Recorder

RECORDER = Recorder()
# What trains: also Keras's own checks of layers.
TRAINING = (".fit(", "train_on_batch(", "run_layer_test(", "run_training_check(")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(RECORDER)
    if os.environ[VARIANT]:
        switch_on(int(os.environ[VARIANT].rpartition(" ")[2]))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out tests that train nothing: with accumulation they are the same."""
    others = [item for item in items if not trains(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def trains(item: Any) -> bool:
    """Whether a test, or a method of its class that it calls, has a line that trains."""
    methods = {name: _source(method) for name, method in inspect.getmembers(item.cls, callable)} if item.cls else {}
    seen, sources = set(), [_source(item.obj)]
    while sources:
        source = sources.pop()
        if any(call in source for call in TRAINING):
            return True
        called = {name for name in methods if f"self.{name}(" in source} - seen
        seen |= called
        sources += [methods[name] for name in called]
    return False


@functools.cache
def _source(function: Any) -> str:
    """What a function's code says; of one of several cases, that of the test that they are cases of."""
    cells = getattr(function, "__closure__", None) or ()
    inner = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
    try:
        own = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # built in
        own = ""
    return "\n".join([own, *map(_source, inner)])


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
                except AccumtuneError as error:
                    RECORDER.note = f"trained as plain Keras, because refused: {type(error).__name__}"
                    return own(model, *args, **kwargs)
                return getattr(model, name)(*args, **kwargs)
            return own(model, *args, **kwargs)

        return train

    for name in ("fit", "train_on_batch"):
        setattr(keras.Model, name, accumulating(name))
