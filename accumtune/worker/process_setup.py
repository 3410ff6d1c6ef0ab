"""Sets up the process of a task: opens its device, loads the user's objects, and starts their pipelines' process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras

from accumtune.memory.device import Device, memory_limit_environment, open_device
from accumtune.worker.data.pipeline_process import PipelineProcess
from accumtune.worker.transport.global_settings import apply_global_settings, gpus_of_tensorflow
from accumtune.worker.transport.payload import load_payload, read_header


def open_payload(
    payload: str, memory_budget_bytes: int | None = None, seed: int | None = None, *, has_pipelines: bool = False
) -> tuple[dict[str, Any], Device, PipelineProcess | None]:
    """Returns the content of a payload, the device of this process, and the process of the data's pipelines, if any.

    The user's objects are loaded last, so that tensors among them count towards the device's memory and its limit.
    """
    header = read_header(Path(payload))
    apply_global_settings(header.settings)
    pipelines = None
    if keras.backend.backend() == "tensorflow":
        os.environ.update(gpus_of_tensorflow(header.settings))
        if has_pipelines:
            # It forks, so it comes before TensorFlow runs anything.
            pipelines = PipelineProcess.of(header.functions, Path(payload), seed)
    device = _open_device(memory_budget_bytes)
    if pipelines is not None and not device.name.startswith("CPU"):  # a pipeline's memory is the host's
        pipelines.close()
        pipelines = None
    content = load_payload(Path(payload))
    return content if pipelines is None else pipelines.moved(content), device, pipelines


def _open_device(memory_budget_bytes: int | None) -> Device:
    """Opens and limits the device of this process. The environment is set here, since JAX's depends on the GPU."""
    os.environ.update(memory_limit_environment(keras.backend.backend(), memory_budget_bytes))
    return open_device(budget_bytes=memory_budget_bytes)
