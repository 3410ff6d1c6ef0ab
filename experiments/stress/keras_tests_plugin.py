"""pytest's part of `keras_tests.py`: every `fit` and `train_on_batch` of a `keras.Model` accumulates."""

from __future__ import annotations

import ast
import functools
import os
from pathlib import Path
from typing import Any

from suites import VARIANT, Recorder

# What trains: also Keras's own checks of layers.
TRAINING = (".fit(", "train_on_batch(", "run_layer_test(", "run_training_check(")


def pytest_configure(config: Any) -> None:
    recorder = Recorder()
    config.pluginmanager.register(recorder)
    if os.environ[VARIANT]:
        switch_on(int(os.environ[VARIANT].rpartition(" ")[2]), recorder)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out tests that train nothing: with accumulation they are the same."""
    training = [item for item in items if item.name.startswith(training_tests(item.path))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(training)])
    items[:] = training


@functools.cache
def training_tests(file: Path) -> tuple[str, ...]:
    """The tests of a file with a line that trains, or with a call of such a method of their class.

    Where there are several cases of a test, their names begin with its name.
    """
    text = file.read_text()
    found: set[str] = set()
    for part in ast.parse(text).body:
        methods = {one.name: ast.get_source_segment(text, one) or "" for one in ast.walk(part) if _is_method(one)}
        training: set[str] = set()
        calls: tuple[str, ...] = TRAINING
        while new := {name for name, source in methods.items() if any(call in source for call in calls)} - training:
            training |= new
            calls = tuple(f"self.{name}(" for name in new)
        found |= training
    return tuple(found)


def _is_method(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def switch_on(micro_batch_size: int, recorder: Recorder) -> None:
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
                    recorder.note = f"trained as plain Keras, because refused: {type(error).__name__}"
                    return own(model, *args, **kwargs)
                return getattr(model, name)(*args, **kwargs)
            return own(model, *args, **kwargs)

        return train

    for name in ("fit", "train_on_batch"):
        setattr(keras.Model, name, accumulating(name))
