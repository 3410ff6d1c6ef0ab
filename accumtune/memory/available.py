"""How much memory a device has left now: the budget of a training that has it to itself."""

from __future__ import annotations

import os
import subprocess

from accumtune.errors import BudgetError
from accumtune.memory.machine import machine_memory

MIB = 2**20


def available_memory_bytes(device_name: str) -> int:
    """Free memory of a device, in bytes.

    Args:
        device_name: as in `Device.name`: "CPU:0", or "GPU:0 ...", the first GPU that this process sees.

    Raises:
        BudgetError: the driver does not say.
    """
    return _gpu_bytes() if device_name.startswith("GPU") else machine_memory().free_bytes


def _gpu_bytes() -> int:
    """Asked of the driver: no framework takes the device for it."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        done = subprocess.run(
            query + ([f"--id={visible}"] if visible else []), capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError:
        answer = "nvidia-smi is not installed"
    else:
        lines = done.stdout.split()
        if done.returncode == 0 and lines and lines[0].isdigit():
            return int(lines[0]) * MIB
        answer = (done.stdout + done.stderr).strip() or f"nvidia-smi exited with {done.returncode}"
    raise BudgetError(
        f"The free memory of the GPU is not known: {answer}.",
        "an NVIDIA GPU whose driver answers nvidia-smi.",
        'name the budget yourself: config.for_budget("8GiB", build_model, x, y).',
    )
