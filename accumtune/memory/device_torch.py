"""Measures and limits what torch holds on a GPU; on a CPU, measures what the process holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from accumtune.accumulation.data import row_indices
from accumtune.memory.device import Device


class TorchCuda(Device):
    """A GPU under torch."""

    backend = "torch"
    memory_source = "cuda allocator"

    def current_memory_bytes(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_memory_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class TorchCpu(Device):
    """A CPU under torch, which does not count its memory: the process's resident memory is measured instead."""

    backend = "torch"
    memory_source = "process high-water mark"
    has_limits = False

    def __init__(self, name: str, budget_bytes: int | None = None) -> None:
        super().__init__(name, budget_bytes)
        self._before = _process_status_bytes("VmRSS")
        self.reset_peak()

    def current_memory_bytes(self) -> int:
        return max(_process_status_bytes("VmRSS") - self._before, 0)

    def peak_memory_bytes(self) -> int:
        return max(_process_status_bytes("VmHWM") - self._before, 0)

    def reset_peak(self) -> None:
        # proc_pid_clear_refs(5): writing 5 resets the peak resident set size to the current one.
        Path("/proc/self/clear_refs").write_text("5")


def _process_status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def open_device(budget_bytes: int | None) -> Device:
    """Opens the first GPU, or else the CPU; Keras's variable `KERAS_TORCH_DEVICE=cpu` chooses the CPU too."""
    if not torch.cuda.is_available() or os.environ.get("KERAS_TORCH_DEVICE") == "cpu":
        row_indices.may_gather_ahead = False  # what waits in the host's memory would count as the device's
        return TorchCpu("CPU:0", budget_bytes)
    if budget_bytes is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total, 1.0))
    return TorchCuda(f"GPU:0 {torch.cuda.get_device_name(0)}", budget_bytes)
