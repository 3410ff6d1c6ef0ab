"""The ghost batch of a search: one for all its trials, so that the micro-batch decides nothing but memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from accumtune.errors import BatchSizeError, SearchError

# Goyal et al., "Accurate, Large Minibatch SGD" (2017) keep 32 samples per worker.
LARGEST = 32
NAME = "ghost_batch_size"


def check(ghost_batch_size: object, micro_batch_sizes: Sequence[int]) -> int | str | None:
    """What a user asked for: "auto", None or a number of samples.

    Raises:
        BatchSizeError: something else, or a number of which no listed micro-batch is a multiple.
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
            "at least one micro-batch that is a multiple of the ghost batch: a group is never divided.",
            f"list {ghost_batch_size} among the micro-batch sizes, or take a smaller ghost batch.",
        )
    return ghost_batch_size


def resolved(asked: int | str | None, auto: int | None) -> int | None:
    """What was asked for, with what "auto" comes to."""
    return auto if isinstance(asked, str) else asked


def refuse_own(hyperparameters: Iterable[str]) -> None:
    """Raises SearchError where a user's own hyperparameter has the name of the search's."""
    if NAME in hyperparameters:
        raise SearchError(
            f"Received a hyperparameter {NAME!r}.",
            f"that name for the search's own: the tuner's argument {NAME} says what all trials have.",
            "give the hyperparameter another name.",
        )


def multiples(micro_batch_sizes: Sequence[int], ghost_batch_size: int | None) -> tuple[int, ...]:
    """The micro-batches that a search with this ghost batch trains with."""
    return tuple(size for size in micro_batch_sizes if size % (ghost_batch_size or 1) == 0)


def choices(micro_batch_sizes: Sequence[int]) -> list[int]:
    """What "auto" may come to, the largest first: listed micro-batches up to 32, or 32 where all are larger."""
    listed = sorted((size for size in micro_batch_sizes if size <= LARGEST), reverse=True)
    return listed or [LARGEST if multiples(micro_batch_sizes, LARGEST) else min(micro_batch_sizes)]


def chosen(micro_batch_sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest choice whose samples fit together; where none does, the smallest, and trials are infeasible."""
    sizes = choices(micro_batch_sizes)
    return next((size for size in sizes if fits(size)), sizes[-1])


def line(ghost_batch_size: int | None, listed: Sequence[int]) -> list[str]:
    """What a search says of it, once."""
    if ghost_batch_size is None:
        return []
    left_out = [str(size) for size in listed if size % ghost_batch_size]
    without = f" Micro-batches {', '.join(left_out)} are no multiples of it and left out." if left_out else ""
    return [
        f"BatchNormalization normalizes in ghost batches of {ghost_batch_size} samples, so that every micro-batch of "
        f"an effective batch is the same training (ghost_batch_size=None: in micro-batches).{without}"
    ]
