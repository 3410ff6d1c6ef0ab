"""A fake of the driver's library (NVML), with any number of GPUs, divided or not."""

import sys
from types import ModuleType, SimpleNamespace

MIB = 2**20


class NVMLError(Exception):
    pass


def gpu(name, total_mib, free_mib, uuid, processes=(), instances=None):
    """`instances`: of a divided GPU (MIG); None among them where there might be one."""
    return SimpleNamespace(
        name=name, total=total_mib, free=free_mib, uuid=uuid, processes=processes, instances=instances
    )


def install(monkeypatch, *gpus, visible=None, init_error=None):
    """Puts it in place of the library; `gpus` are `gpu(...)`."""

    def init():
        if init_error is not None:
            raise NVMLError(init_error)

    def memory(handle):
        if handle.total is None:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=handle.total * MIB, free=handle.free * MIB)

    def mig_mode(handle):
        if handle.instances is None:
            raise NVMLError("Not Supported")
        return [1, 1]

    def instance(handle, number):
        if handle.instances[number] is None:
            raise NVMLError("Not Found")
        return handle.instances[number]

    module = ModuleType("pynvml")
    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda number: gpus[number],
        nvmlDeviceGetName=lambda handle: handle.name,
        nvmlDeviceGetUUID=lambda handle: handle.uuid.encode(),
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: len(handle.instances),
        nvmlDeviceGetMigDeviceHandleByIndex=instance,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, _, used in handle.processes
        ],
        nvmlSystemGetProcessName=lambda pid: {p: name for one in gpus for p, name, _ in one.processes}[pid],
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
