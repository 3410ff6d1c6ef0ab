"""Separates the peak memory of training from what is needed only to compile programs and choose algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accumtune.memory.device import Device


@dataclass
class PeakWithoutCompiling:
    """Measures the peak of a training, without its first update and its first validation if the device compiles then.

    Args:
        device: opened, its peak reset.

    Attributes:
        compile_peak_bytes: the peak while programs were compiled; None on a device whose peak does not include that.
    """

    device: Device
    compile_peak_bytes: int | None = None
    _training_bytes: int | None = None
    _updates: int = 0
    _validations: int = 0

    def callbacks(self) -> list[Any]:
        """Returns callbacks for `fit`; none on a device whose peak does not include compiling."""
        return [_callback(self)] if self.device.compiles_in_its_memory else []

    def peak_bytes(self) -> int:
        """Returns the peak so far; after a single update that of compiling, which is an upper bound."""
        if self._updates == 1 and self.compile_peak_bytes is not None:
            return max(self.compile_peak_bytes, self.device.peak_memory_bytes())
        return max(self._training_bytes or 0, self.device.peak_memory_bytes())

    def update_ended(self) -> None:
        self._updates += 1
        if self._updates == 1:
            self._note_compiling()

    def validation_begins(self) -> None:
        if self._validations == 0:
            if self._updates > 1:
                self._training_bytes = max(self._training_bytes or 0, self.device.peak_memory_bytes())
            self.device.reset_peak()

    def validation_ended(self) -> None:
        self._validations += 1
        if self._validations == 1:
            self._note_compiling()

    def _note_compiling(self) -> None:
        self.compile_peak_bytes = max(self.compile_peak_bytes or 0, self.device.peak_memory_bytes())
        self.device.reset_peak()


def _callback(peak: PeakWithoutCompiling) -> Any:
    import keras

    class CompilingNoted(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self._peak = peak

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            peak.update_ended()

        def on_test_begin(self, logs: Any = None) -> None:
            peak.validation_begins()

        def on_test_end(self, logs: Any = None) -> None:
            peak.validation_ended()

    return CompilingNoted()
