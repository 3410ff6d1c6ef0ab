"""Makes `jax.jit` trace the functions that a step calls again, instead of using a trace that it has kept.

`jax.jit` keeps a trace for each kind of arguments. A trace made in one micro-step, in the test of the step or in plain
training would do the same in every other: normalize with the statistics of that one, or hand no gradients to be added.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import jax

_numbers = itertools.count(1)
_context = jax.make_user_context(default_value=0)


@contextlib.contextmanager
def retraced_jits(is_traced: bool = True) -> Iterator[None]:
    """Keeps traces of before out of the block, and those of the block out of what comes later.

    Args:
        is_traced: whether the block is traced. Otherwise functions run operation by operation, as without `jax.jit`.
    """
    if not is_traced:
        with jax.disable_jit():
            yield
    else:
        with _context(next(_numbers)):
            yield
