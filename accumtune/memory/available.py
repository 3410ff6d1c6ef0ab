"""How much memory a device has left now: the budget of a training that has it to itself."""

from __future__ import annotations

from accumtune.errors import BudgetError
from accumtune.memory.gpu_driver import DriverIsSilent, asked_gpus
from accumtune.memory.machine import machine_memory


def available_memory_bytes(device_name: str) -> int:
    """Free memory of a device, in bytes.

    Args:
        device_name: as in `Device.name`: "CPU:0", or "GPU:0 ...", the first GPU that this process sees.

    Raises:
        BudgetError: nobody says: the driver, or because it is another kind of device.
    """
    kind = device_name.partition(":")[0]
    if kind == "CPU":
        return machine_memory().free_bytes
    answer = "it has none of its own"
    if kind != "GPU":
        answer = "only NVIDIA's driver is asked"
    else:
        try:
            gpus = asked_gpus()
        except DriverIsSilent as error:
            gpus, answer = [], str(error)
        if gpus and gpus[0].free_bytes is not None:
            return gpus[0].free_bytes
    raise BudgetError(
        f"The free memory of {device_name} is not known: {answer}.",
        "an NVIDIA GPU whose driver answers.",
        'name the budget yourself: config.for_budget("8GiB", build_model, x, y).',
    )
