"""Chooses the ghost batch of a search: one for all trials, so that the micro-batch affects only memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from accumtune.errors import BatchSizeError, SearchError

# Goyal et al., "Accurate, Large Minibatch SGD" (2017) keep 32 samples per worker.
LARGEST = 32
NAME = "ghost_batch_size"


def check(ghost_batch_size: object, micro_batch_sizes: Sequence[int]) -> int | str | None:
    """Returns the `ghost_batch_size` that the user gave, once it is known to be valid.

    Raises:
        BatchSizeError: not "auto", None or a positive number, or no listed micro-batch is a multiple of it.
    """
    if ghost_batch_size is None or ghost_batch_size == "auto":
        return None if ghost_batch_size is None else "auto"
    if not isinstance(ghost_batch_size, int) or isinstance(ghost_batch_size, bool) or ghost_batch_size < 1:
        raise BatchSizeError(
            f"Received {ghost_batch_size=}.",
            '"auto", None, or a whole number of at least 1.',
            "write, for example, ghost_batch_size=16.",
        )
    if not multiples(micro_batch_sizes, ghost_batch_size):
        raise BatchSizeError(
            f"Received {ghost_batch_size=} and micro_batch_sizes={tuple(micro_batch_sizes)}.",
            "at least one micro-batch that is a multiple of the ghost batch, since ghost batches are never split.",
            f"add {ghost_batch_size} to micro_batch_sizes, or give a smaller ghost batch.",
        )
    return ghost_batch_size


def resolved(asked: int | str | None, auto: int | None) -> int | None:
    """Returns the ghost batch that the user gave, or the value of `auto` for "auto"."""
    return auto if isinstance(asked, str) else asked


def refuse_own(hyperparameters: Iterable[str]) -> None:
    """Raises SearchError if one of the user's hyperparameters is named `ghost_batch_size`."""
    if NAME in hyperparameters:
        raise SearchError(
            f"Received a hyperparameter {NAME!r}.",
            f"another name: the search has a hyperparameter {NAME!r} of its own, for the tuner's argument.",
            "rename the hyperparameter.",
        )


def multiples(micro_batch_sizes: Sequence[int], ghost_batch_size: int | None) -> tuple[int, ...]:
    """Returns the micro-batch sizes that are multiples of the ghost batch; without one, all."""
    return tuple(size for size in micro_batch_sizes if size % (ghost_batch_size or 1) == 0)


def choices(micro_batch_sizes: Sequence[int]) -> list[int]:
    """Returns the ghost batches that "auto" may choose, largest first: listed micro-batches up to 32.

    If all listed micro-batches are larger: 32 if one is a multiple of it, otherwise the smallest of them.
    """
    listed = sorted((size for size in micro_batch_sizes if size <= LARGEST), reverse=True)
    return listed or [LARGEST if multiples(micro_batch_sizes, LARGEST) else min(micro_batch_sizes)]


def chosen(micro_batch_sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Returns the largest of `choices` that fits; if none does, the smallest, and trials will be infeasible."""
    sizes = choices(micro_batch_sizes)
    return next((size for size in sizes if fits(size)), sizes[-1])


def line(ghost_batch_size: int | None, listed: Sequence[int]) -> list[str]:
    """Returns the line about the ghost batch that a search prints once."""
    if ghost_batch_size is None:
        return []
    left_out = [str(size) for size in listed if size % ghost_batch_size]
    without = f" Micro-batches {', '.join(left_out)} are not multiples of it and are left out." if left_out else ""
    return [
        f"BatchNormalization normalizes in ghost batches of {ghost_batch_size} samples, so that an effective batch "
        f"trains the same in every micro-batch (ghost_batch_size=None: it normalizes each micro-batch).{without}"
    ]
