"""Runs the user's own `tf.function`s as parts of the step that is traced, instead of calling their traces.

A `tf.function` keeps a trace for each kind of arguments. A trace made in one micro-step, or in plain training before,
would do the same in every other: assign a variable in each micro-step, store a gradient where another one is to be
added, normalize without ghost batches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager.polymorphic_function import autograph_util
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

_LIBRARIES = ("tensorflow", "keras", "accumtune")

_lock = threading.Lock()
# How many blocks there are now, in all threads, and TensorFlow's own method meanwhile.
_blocks, _own_call = 0, Function.__call__


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Makes a `tf.function` run its Python function in the block, converted by AutoGraph as in a trace of its own."""
    global _blocks, _own_call
    with _lock:
        if not _blocks:
            _own_call, Function.__call__ = Function.__call__, _inlined
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                Function.__call__ = _own_call


def _inlined(self: Any, *args: Any, **kwargs: Any) -> Any:
    function = self.python_function
    if str(getattr(function, "__module__", "")).split(".")[0] in _LIBRARIES:
        return _own_call(self, *args, **kwargs)
    if tf.executing_eagerly():
        return function(*args, **kwargs)
    options, status = self._experimental_autograph_options, ag_ctx.Status.DISABLED
    if self._autograph:
        function = autograph_util.py_func_from_autograph(function, options)
        status = ag_ctx.Status.ENABLED
    with ag_ctx.ControlStatusCtx(status=status, options=options):
        return function(*args, **kwargs)
