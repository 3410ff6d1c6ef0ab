"""Runs the user's own `tf.function`s as parts of the step that is traced, instead of calling their traces.

A `tf.function` keeps a trace for each kind of arguments. A trace made in one micro-step, or in plain training before,
would do the same in every other: assign a variable in each micro-step, store a gradient where another one is to be
added, normalize without ghost batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager.polymorphic_function import autograph_util
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

_LIBRARIES = ("tensorflow", "keras", "accumtune")


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Makes a `tf.function` run its Python function in the block, converted by AutoGraph as in a trace of its own."""
    own_call = Function.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = self.python_function
        if str(getattr(function, "__module__", "")).split(".")[0] in _LIBRARIES:
            return own_call(self, *args, **kwargs)
        if tf.executing_eagerly():
            return function(*args, **kwargs)
        options, status = self._experimental_autograph_options, ag_ctx.Status.DISABLED
        if self._autograph:
            function = autograph_util.py_func_from_autograph(function, options)
            status = ag_ctx.Status.ENABLED
        with ag_ctx.ControlStatusCtx(status=status, options=options):
            return function(*args, **kwargs)

    Function.__call__ = call
    try:
        yield
    finally:
        Function.__call__ = own_call
