"""Applies updates on torch in groups of variables.

Keras's optimizers run each step of an update for all variables at once, with up to three temporary values for each,
which is the peak memory of a model with many parameters. A group is no larger than the largest variable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from accumtune.accumulation.patched_attributes import replaced

# Optimizers that change a number of their own at each call, which must happen once per update.
_ONCE_PER_UPDATE = ("torch_nadam",)


@contextlib.contextmanager
def updating_in_groups(optimizers: list[Any]) -> Iterator[None]:
    """Makes these optimizers change their variables group by group, if they are Keras's own."""
    with contextlib.ExitStack() as changed:
        for optimizer in filter(_treats_variables_alone, optimizers):
            update = _in_groups(optimizer._parallel_update_step)
            changed.enter_context(replaced(optimizer, {"_parallel_update_step": update}))
        yield


def _treats_variables_alone(optimizer: Any) -> bool:
    module = getattr(getattr(type(optimizer), "_parallel_update_step", None), "__module__", "")
    return module.startswith("keras.src.backend.torch.optimizers.") and not module.endswith(_ONCE_PER_UPDATE)


def _in_groups(update: Any) -> Any:
    def call(gradients: Any, variables: Any, learning_rate: Any) -> None:
        for part in groups([variable.value.nbytes for variable in variables]):
            update(gradients[part], variables[part], learning_rate)

    return call


def groups(sizes: Sequence[int]) -> list[slice]:
    """Groups neighbours whose sizes sum to at most the largest size.

    >>> groups([3, 1, 9, 4, 4])
    [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None)]
    """
    found, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        if held + size > max(sizes):
            found.append(slice(start, index))
            start, held = index, 0
        held += size
    return [*found, slice(start, len(sizes))]
