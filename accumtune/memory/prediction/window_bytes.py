"""What a whole window, or a batch of validation, takes on the device beside a micro-batch. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accumtune.memory.budget import format_bytes

NO_LOSS = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class WindowBytes:
    """The bytes of an effective batch that are not those of one micro-batch after another.

    Args:
        sample_bytes: of one sample's data, if the data of a whole window are on the device at once; otherwise 0.
        loss_bytes: per sample, per pair and per triple of samples, for a loss over the whole effective batch: what it
            needs between the two passes, outputs and targets included. Zeros for other losses.
        validation_bytes: what such a loss of validation's samples needs, their data included.
    """

    sample_bytes: int = 0
    loss_bytes: Sequence[float] = NO_LOSS
    validation_bytes: int = 0

    @property
    def has_loss(self) -> bool:
        """Whether the loss is one over the whole effective batch."""
        return any(self.loss_bytes)

    @property
    def is_kept(self) -> bool:
        """Whether anything of a window is on the device while its micro-batches run."""
        return bool(self.sample_bytes or self.has_loss)

    def beside(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """Returns the data that are on the device beside any micro-batch."""
        return self.sample_bytes * micro_batch_size * accumulation_steps

    def at_once(self, effective_batch_size: int) -> int:
        """Returns what an effective batch, or validation's batch, needs while no micro-batch runs.

        That is its data, twice while they are split into micro-batches, or its outputs and their loss.
        """
        return max(self._at_once_in_training(effective_batch_size), self.validation_bytes)

    def is_most_in_validation(self, effective_batch_size: int) -> bool:
        """Returns whether validation's batch needs more at once than the effective batch."""
        return self.validation_bytes > self._at_once_in_training(effective_batch_size)

    def of_the_loss(self, effective_batch_size: int) -> int:
        """Returns the same as `at_once` for a loss over the whole effective batch, and 0 for other losses."""
        return self.at_once(effective_batch_size) if self.has_loss else 0

    def share_of(self, peak_bytes: int, effective_batch_size: int) -> str:
        """Returns part of a message, to follow a predicted peak; empty if the window takes less than half of it."""
        kept = max(self.sample_bytes * effective_batch_size, self.of_the_loss(effective_batch_size))
        if kept <= peak_bytes / 2:
            return ""
        if self.is_most_in_validation(effective_batch_size):
            return (
                f", of which {format_bytes(kept)} hold the samples that validation takes at once and their loss; a "
                "smaller validation_batch_size needs less"
            )
        return (
            f", of which {format_bytes(kept)} hold the effective batch's data, or its outputs and their loss over the "
            "whole batch; a smaller effective batch needs less"
        )

    def _at_once_in_training(self, effective_batch_size: int) -> int:
        loss = math.ceil(bytes_of(self.loss_bytes, effective_batch_size))
        return max(2 * self.sample_bytes * effective_batch_size, loss)


def bytes_of(per: Sequence[float], samples: int) -> float:
    """Returns the bytes of a loss of so many samples, from those per sample, per pair and per triple."""
    return sum(each * float(samples) ** power for power, each in enumerate(per, start=1))
