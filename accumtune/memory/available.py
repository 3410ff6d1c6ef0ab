"""How much memory a device has left now: the budget of a training that has it to itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from accumtune.errors import BudgetError

MIB = 2**20


def available_memory_bytes(device_name: str) -> int:
    """Free memory of a device, in bytes.

    Args:
        device_name: as in `Device.name`: "CPU:0", or "GPU:0 ...", the first GPU that this process sees.

    Raises:
        BudgetError: the driver does not say.
    """
    return _gpu_bytes() if device_name.startswith("GPU") else _host_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


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


def _host_bytes(meminfo: Path, cgroup: Path) -> int:
    """What the kernel says new processes can have, and no more than a container's limit leaves (cgroup v2)."""
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines() if "kB" in line}
    available = kibibytes["MemAvailable"] * 1024
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return min(available, max(int(limit) - int(used), 0)) if limit.isdigit() else available
