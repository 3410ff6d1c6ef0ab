"""Settings that a script makes at its top are valid in its trials' processes."""

import os

import keras
import pytest

from accumtune.worker.transport.global_settings import apply_global_settings, global_settings, gpus_of_tensorflow
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

BACKEND = os.environ["KERAS_BACKEND"]


@pytest.fixture
def settings_kept():
    before = global_settings()
    yield before
    apply_global_settings(before)


def change():
    keras.config.set_floatx("float64")
    keras.config.set_epsilon(1e-4)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.disable_flash_attention()
    keras.config.set_max_epochs(3)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.config.run_functions_eagerly(True)
    elif BACKEND == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        jax.config.update("jax_debug_nans", True)
    else:
        import torch

        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)


def look():
    from accumtune.worker.transport.global_settings import global_settings

    return global_settings()


def differing(one, other):
    """Settings of torch are known where it is imported, which other tests in this process may have done."""
    known = {name for name in one if name in other or not (name.startswith("torch") and BACKEND != "torch")}
    return {name for name in known if one[name] != other[name]}


def test_a_trial_s_process_has_the_settings_of_the_script(executor, tmp_path, settings_kept):
    change()
    changed = global_settings()
    assert len(differing(settings_kept, changed)) >= 7
    dump_payload({"function": look, "arguments": ()}, tmp_path / "data" / "payload.pkl")
    directory = TaskDirectory(tmp_path / "task")
    directory.write_task("call", {"payload": str(tmp_path / "data" / "payload.pkl")})
    outcome = executor.submit(directory).result(timeout=120)
    assert outcome.is_completed, outcome.traceback
    assert differing(changed, outcome.result["value"]) == set()


def test_they_can_be_taken_back(settings_kept):
    change()
    apply_global_settings(settings_kept)
    assert global_settings() == settings_kept


def test_gpus_that_a_script_has_hidden_stay_hidden(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_of_tensorflow({"tensorflow.visible_gpus": None, "cuda_visible_devices": None}) == {}
    assert gpus_of_tensorflow({"tensorflow.visible_gpus": [], "cuda_visible_devices": None}) == {
        "CUDA_VISIBLE_DEVICES": "-1"
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    settings = {"tensorflow.visible_gpus": [1], "cuda_visible_devices": "4,GPU-7"}
    assert gpus_of_tensorflow(settings) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")  # a worker's place has chosen
    assert gpus_of_tensorflow(settings) == {}


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's flags")
def test_what_a_machine_s_environment_says_of_jax_stays(monkeypatch, settings_kept):
    import jax

    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "high")
    changed = {**settings_kept["jax"], "jax_default_matmul_precision": "highest", "jax_debug_nans": True}
    apply_global_settings({**settings_kept, "jax": changed})
    assert jax.config.jax_default_matmul_precision is None and jax.config.jax_debug_nans
