"""Chooses the ghost batch of a search: one for all trials, so that the micro-batch affects only memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from accumtune.errors import BatchSizeError, SearchError

# Goyal et al., "Accurate, Large Minibatch SGD" (2017) keep 32 samples per worker.
LARGEST = 32
# Wu and He, "Group Normalization" (2018): in groups of 8 BatchNormalization loses a point on ImageNet, in groups of 4
# nearly four.
LEAST = 8
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


def realised(effective_batch_sizes: Sequence[int], ghost_batch_size: int | None) -> tuple[int, ...]:
    """Returns the effective batches that are whole groups, or smaller than one group and hence a group themselves."""
    ghost = ghost_batch_size or 1
    return tuple(size for size in effective_batch_sizes if size < ghost or size % ghost == 0)


def choices(micro_batch_sizes: Sequence[int], effective_batch_sizes: Sequence[int]) -> list[int]:
    """Returns the ghost batches that "auto" may choose, best first.

    The first is the largest number, up to 32 and to the largest micro-batch, that keeps every effective batch. Small
    groups normalize badly: if no number from 8 on keeps every effective batch, it is the one that keeps the most. The
    others keep every effective batch and need less memory.
    """
    largest = min(LARGEST, max(micro_batch_sizes))
    sizes = [size for size in range(largest, 0, -1) if multiples(micro_batch_sizes, size)]
    lost = {size: len(effective_batch_sizes) - len(realised(effective_batch_sizes, size)) for size in sizes}
    large = [size for size in sizes if size >= min(LEAST, largest)] or [min(micro_batch_sizes)]
    best = min(large, key=lambda size: (lost.get(size, 0), -size))
    return [best, *(size for size in sizes if size < best and not lost[size])]


def chosen(
    micro_batch_sizes: Sequence[int], effective_batch_sizes: Sequence[int], fits: Callable[[int], bool]
) -> int:
    """Returns the first of `choices` that fits; if none does, the smallest, and trials will be infeasible."""
    sizes = choices(micro_batch_sizes, effective_batch_sizes)
    return next((size for size in sizes if fits(size)), sizes[-1])


def line(ghost_batch_size: int | None, asked: int | str | None, effective_batch_sizes: Sequence[int]) -> list[str]:
    """Returns the line about the ghost batch that a search prints once.

    Args:
        asked: the user's setting.
        effective_batch_sizes: the products of the user's two lists.
    """
    if ghost_batch_size is None:
        return []
    why = " (the largest up to 32 that fits and keeps the effective batches)" if asked == "auto" else ""
    kept = realised(effective_batch_sizes, ghost_batch_size)
    smaller = ", ".join(str(size) for size in kept if size < ghost_batch_size)
    left_out = ", ".join(str(size) for size in effective_batch_sizes if size not in kept)
    return [
        f"BatchNormalization normalizes in ghost batches of {ghost_batch_size} samples{why}, so that an effective "
        "batch trains the same in every micro-batch (ghost_batch_size=None: it normalizes each micro-batch)."
        + (f" Smaller effective batches are one group: {smaller}." if smaller else "")
        + (f" Effective batches that are not multiples of it are left out: {left_out}." if left_out else "")
    ]
