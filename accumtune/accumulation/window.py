"""Splits an effective batch into micro-batches, and computes the weight of each (no framework).

A window is the micro-batches of one update. A loss of the whole window is a mean or a sum; Keras computes the same
reduction per micro-batch. If micro-batch j holds `samples[j]` samples and its mean has the denominator `counts[j]`
(the samples, the valid tokens, the sum of the weights), then

    loss(window) = sum over j of  samples[j] / sum(samples)  *  factor[j] * loss(j)
    factor[j]    = counts[j] / sum(counts)  /  (samples[j] / sum(samples))

`share[j] = samples[j] / sum(samples)` scales the whole objective; losses added by layers, and regularizers, need
nothing more. `factor` corrects one compiled loss: it is 1 for a plain mean, 1 / share[j] for a sum, and otherwise
depends on masks or weights. Averaged over samples, as Keras's loss trackers do, `factor[j] * loss(j)` is the loss of
the window.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from accumtune.errors import BatchSizeError, ModelError


@dataclass(frozen=True)
class Accumulation:
    """How a model accumulates: either `micro_batch_size` or `accumulation_steps` is given.

    Args:
        micro_batch_size: fit's batches are effective batches, split into micro-batches of this many samples.
        accumulation_steps: fit's batches are micro-batches, and this many of them make one update.
        ghost_batch_size: the samples that BatchNormalization normalizes together; None: a micro-batch.
        whole_batch_loss: whether losses are computed over the whole effective batch, in two passes; "auto": if a loss
            couples the samples of a batch.
    """

    micro_batch_size: int | None = None
    accumulation_steps: int | None = None
    ghost_batch_size: int | None = None
    whole_batch_loss: bool | str = "auto"

    @classmethod
    def read(
        cls,
        micro_batch_size: object,
        accumulation_steps: object,
        ghost_batch_size: object = None,
        whole_batch_loss: object = "auto",
    ) -> Accumulation:
        """Checks the user's arguments; raises BatchSizeError and ModelError."""
        if (micro_batch_size is None) == (accumulation_steps is None):
            raise BatchSizeError(
                f"Received {micro_batch_size=} and {accumulation_steps=}.",
                "exactly one of the two.",
                "give micro_batch_size=32 to split each batch of fit, or accumulation_steps=8 to join 8 batches.",
            )
        whole = _choice_of_loss(whole_batch_loss)
        ghost = None if ghost_batch_size is None else _whole_number("ghost_batch_size", ghost_batch_size)
        if micro_batch_size is None:
            steps = _whole_number("accumulation_steps", accumulation_steps)
            return cls(accumulation_steps=steps, ghost_batch_size=ghost, whole_batch_loss=whole)
        micro = _whole_number("micro_batch_size", micro_batch_size)
        if ghost is not None:
            check_groups(micro, ghost)
        return cls(micro_batch_size=micro, ghost_batch_size=ghost, whole_batch_loss=whole)


def _choice_of_loss(value: object) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value == "auto"):
        return value
    raise ModelError(
        f"Received whole_batch_loss={value!r} of type {type(value).__name__}.",
        '"auto", True or False.',
        'give whole_batch_loss="auto": losses that couple the samples of a batch are computed over the whole batch.',
    )


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise BatchSizeError(
            f"Received {name}={value!r} of type {type(value).__name__}.",
            "a whole number of at least 1.",
            f"give, for example, {name}=8.",
        )
    return int(value)


def check_groups(samples: int, ghost_batch_size: int) -> None:
    """Raises BatchSizeError if a micro-batch of so many samples would split a ghost batch."""
    if samples % ghost_batch_size:
        nearest = max(samples - samples % ghost_batch_size, ghost_batch_size)
        raise BatchSizeError(
            f"Received a micro-batch of {samples} samples and ghost_batch_size={ghost_batch_size}.",
            "a micro-batch that is a multiple of the ghost batch, since ghost batches are never split.",
            f"use a micro-batch of {nearest}, or a ghost batch of {math.gcd(samples, ghost_batch_size)}.",
        )


def split(effective_batch_size: int, micro_batch_size: int) -> list[slice]:
    """Returns the micro-batches of an effective batch in order: all full except perhaps the last, none empty.

    >>> split(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    if micro_batch_size < 1:
        raise BatchSizeError(f"Received {micro_batch_size=}.", "at least 1.", "use a micro-batch of 1 or more.")
    starts = range(0, effective_batch_size, micro_batch_size)
    return [slice(start, min(start + micro_batch_size, effective_batch_size)) for start in starts]


def shares(samples: Sequence[int]) -> list[float]:
    """Returns each micro-batch's share of the window's samples; they sum to 1 (0 for a window without samples)."""
    total = sum(samples)
    return [number / total if total else 0.0 for number in samples]


def factors(samples: Sequence[int], counts: Sequence[float] | None = None) -> list[float]:
    """Returns the factors that correct one loss in each micro-batch, see the top of this file.

    Args:
        samples: samples per micro-batch, shape `(micro_batches,)`.
        counts: the denominators of the loss, shape `(micro_batches,)`; None if the loss is a sum.

    Returns:
        One factor per micro-batch; 0 if the window or the micro-batch has no weight (Keras's own loss of such a batch
        is 0).
    """
    parts = shares(samples)
    if counts is None:
        return [1 / part if part else 0.0 for part in parts]
    total = sum(counts)
    return [count / total / part if total and part else 0.0 for count, part in zip(counts, parts, strict=True)]
