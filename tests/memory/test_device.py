"""A known allocation gives a known peak, limits stop real allocations, and each backend's messages are recognized."""

import os
import signal

import pytest

from accumtune.errors import BudgetError
from accumtune.memory.device import died_of_memory, is_out_of_memory, memory_limit_environment, open_device
from accumtune.memory.machine import device_memory

MIB = 2**20
BACKEND = os.environ["KERAS_BACKEND"]
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's allocator")


@tensorflow_only
def test_known_allocation_gives_known_peak_on_tensorflow(value_in_child):
    def allocate():
        import tensorflow as tf

        from accumtune.memory.device import open_device

        device = open_device("tensorflow")
        start = device.current_memory_bytes()
        first = tf.zeros([16 * 2**18])  # 16 MiB
        one = device.current_memory_bytes() - start
        second = tf.zeros([32 * 2**18])
        both = device.peak_memory_bytes() - start
        del first, second
        kept, after = device.peak_memory_bytes() - start, device.current_memory_bytes() - start
        device.reset_peak()
        return [one, both, kept, after, device.peak_memory_bytes() - start, device.name, device.memory_source]

    one, both, kept, after, reset, name, source = value_in_child(allocate)
    assert (one / MIB, both / MIB, kept / MIB) == pytest.approx((16, 48, 48), abs=0.01)
    assert after < 0.01 * MIB and reset < 0.01 * MIB
    assert (name, source) == ("CPU:0", "tensorflow allocator") or name.startswith("GPU:0")


@tensorflow_only
def test_a_small_tensor_leaves_a_large_free_chunk_whole(value_in_child):
    def is_gap_left(has_shelf):
        import numpy as np
        import tensorflow as tf

        from accumtune.memory.cpu_simulation import tensorflow_setup
        from accumtune.memory.device_tensorflow import open_device

        def address(tensor):
            return np.asarray(memoryview(tensor)).ctypes.data  # without a copy

        if not has_shelf:
            tensorflow_setup.shelf_chunks = lambda budget_bytes: ()
            tensorflow_setup.constant_chunks = lambda budget_bytes: 0
        device = open_device(64 * 2**20)
        large = tf.zeros([2**18])
        gap = address(large)
        del large
        small = [tf.zeros([1000]) for _ in range(10)]
        held = device.current_memory_bytes()
        return [address(tf.zeros([2**18])) == gap, len(small) * 4096 <= held < 2**16]

    assert value_in_child(is_gap_left, True, budget_bytes=64 * MIB) == [True, True]
    # The negative control: it is cut up.
    assert value_in_child(is_gap_left, False, budget_bytes=64 * MIB) == [False, True]


def test_describing_a_model_imports_nothing_large_while_memory_is_measured(value_in_child):
    """Keras imports TensorFlow then, on any backend; a CPU's peak under torch had these 500 MB."""

    def described():
        import sys

        import keras

        before = set(sys.modules)
        keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]).get_config()
        return sorted({name.partition(".")[0] for name in set(sys.modules) - before})

    assert "tensorflow" not in value_in_child(described)


def test_no_fork_has_seen_the_gpu(value_in_child):
    """CUDA does not survive a fork. What asks for a GPU at its import (Keras on torch) asks the driver."""

    def look():
        import os
        import sys

        xla = sys.modules.get("jax._src.xla_bridge")
        has_client = xla is not None and xla.backends_are_initialized()
        return [os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"], has_client]

    assert value_in_child(look) == ["1", False]


@tensorflow_only
def test_the_limit_bites_and_is_recognised(value_in_child):
    def overdraw():
        import tensorflow as tf

        from accumtune.memory.device import is_out_of_memory, open_device

        device = open_device("tensorflow", 64 * 2**20)
        tf.zeros([16 * 2**18])  # what fits runs
        try:
            tf.zeros([80 * 2**18])
        except Exception as error:
            return [type(error).__name__, is_out_of_memory(error), device.has_limits, device.budget_bytes]
        return None

    expected = ["ResourceExhaustedError", True, True, 64 * MIB]
    assert value_in_child(overdraw, budget_bytes=64 * MIB) == expected
    # The negative control: without the limit the same allocation is no trouble.
    assert value_in_child(overdraw) is None


@tensorflow_only
def test_opening_the_device_too_late_is_an_error():
    import tensorflow as tf

    tf.zeros([1])  # in this process, which nobody has prepared
    with pytest.raises(BudgetError, match="before"):
        open_device("tensorflow", 64 * MIB)


@tensorflow_only
@pytest.mark.parametrize("budget_bytes", [None, 64 * MIB])
def test_of_several_gpus_one_is_measured_and_the_host_is_not_limited(monkeypatch, budget_bytes):
    """TensorFlow's calls as a machine with two GPUs answers them; what it refuses there is refused here."""
    from accumtune.memory import device_tensorflow as tensorflow

    visible, limits = ["first", "second"], {}

    def set_memory_growth(gpu, is_on):
        if visible != [gpu]:
            raise ValueError("Memory growth cannot differ between GPU devices")
        limits[gpu] = None

    config, experimental = tensorflow.tf.config, tensorflow.tf.config.experimental
    monkeypatch.setattr(config, "get_visible_devices", lambda kind: list(visible))
    monkeypatch.setattr(config, "set_visible_devices", lambda gpus, kind: visible.__setitem__(slice(None), gpus))
    monkeypatch.setattr(
        config, "set_logical_device_configuration", lambda gpu, parts: limits.update({gpu: parts[0].memory_limit})
    )
    monkeypatch.setattr(experimental, "set_memory_growth", set_memory_growth)
    monkeypatch.setattr(experimental, "get_device_details", lambda gpu: {"device_name": f"the {gpu}"})
    for name, value in memory_limit_environment("tensorflow", 64 * MIB).items():
        monkeypatch.setenv(name, value)
    device = tensorflow.open_device(budget_bytes)
    assert device.name == "GPU:0 the first" and visible == ["first"]
    assert limits == {"first": None if budget_bytes is None else 64}
    assert "TF_CPU_BFC_MEM_LIMIT_IN_MB" not in os.environ and "TF_CPU_ALLOCATOR_USE_BFC" not in os.environ
    assert device.compiles_in_its_memory


@pytest.mark.skipif(BACKEND != "jax" or device_memory().is_gpu, reason="JAX on a CPU")
def test_known_training_gives_known_peak_on_jax(value_in_child):
    """A weight of 4 MiB, its sum and a gradient: not what its initializer took, and not without the sum.

    Of a single sample XLA adds the gradient to the sum as it computes it.
    """

    def train(initializer, validation_samples, momentum):
        import keras
        import numpy as np

        from accumtune.accumulation import accumulate
        from accumtune.memory.device import open_device

        device = open_device("jax")
        wide = keras.layers.Dense(1024, kernel_initializer=initializer)
        model = keras.Sequential([keras.Input((1024,)), wide, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1, momentum=momentum), "mse")
        accumulate(model, 2)
        x, y = np.zeros((8, 1024), "float32"), np.zeros((8, 1), "float32")
        validation = (np.zeros((validation_samples, 1024), "float32"), np.zeros((validation_samples, 1), "float32"))
        device.reset_peak()
        model.fit(x, y, batch_size=4, verbose=0, validation_data=validation, validation_batch_size=validation_samples)
        peaks = [device.current_memory_bytes(), device.peak_memory_bytes()]
        device.reset_peak()
        return [*peaks, device.peak_memory_bytes(), device.memory_source]

    *peaks, source = value_in_child(train, "orthogonal", 1, 0.0)  # of which the QR decomposition takes 16 MiB
    assert [peak / MIB for peak in peaks] == pytest.approx([4, 12, 4], abs=0.2)
    assert source == "jax compile-time analysis"
    *peaks, _ = value_in_child(train, "zeros", 1, 0.9)
    assert [peak / MIB for peak in peaks] == pytest.approx([8, 16, 8], abs=0.2)
    *peaks, _ = value_in_child(train, "zeros", 4096, 0.0)  # validation: 16 MiB in, and as much between the layers
    assert [peak / MIB for peak in peaks] == pytest.approx([4, 36, 4], abs=0.2)


@pytest.mark.skipif(BACKEND == "torch" or device_memory().is_gpu, reason="TensorFlow or JAX, on a CPU")
def test_an_own_step_takes_the_memory_of_kerass(value_in_child):
    """Weights and their sums, 4 MiB each, and one gradient.

    Not on JAX if its functions do not reuse memory, nor on TensorFlow if a gradient waits to be added to its sum.
    """

    def peak(is_own, is_wasteful=False):
        import keras
        import numpy as np

        from accumtune.accumulation import accumulate
        from accumtune.accumulation.own_step import certificate
        from accumtune.accumulation.own_step.own_train_step import Certificate
        from accumtune.memory.device import open_device

        class OwnStep(keras.Sequential):
            def train_step(self, *arguments):
                return super().train_step(*arguments)

        # The test of a step compares gradients, before training, and takes more than an update.
        known = Certificate("mean", ("mean",), ("last",), (True,) * 8)
        certificate.certify = lambda *arguments: known
        device = open_device()
        if is_wasteful and keras.backend.backend() == "jax":
            from accumtune.accumulation.engines.engine_jax import JaxTraining

            own = JaxTraining._jitted
            JaxTraining._jitted = lambda self, function, out_shardings=None, donate=(): own(self, function)
        elif is_wasteful:
            from accumtune.memory.cpu_simulation import operation_order

            operation_order._is_end = lambda op: not op.outputs
        layers = [keras.Input((1024,)), *(keras.layers.Dense(1024, "relu") for _ in range(3)), keras.layers.Dense(1)]
        model = (OwnStep if is_own else keras.Sequential)(layers)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        accumulate(model, 2)
        device.reset_peak()
        model.fit(np.zeros((8, 1024), "float32"), np.zeros((8, 1), "float32"), batch_size=4, verbose=0)
        return device.peak_memory_bytes()

    stock, own, wasteful = (value_in_child(peak, *how) for how in ((False,), (True,), (True, True)))
    assert own <= 1.05 * stock
    assert wasteful > stock + 3 * MIB


@pytest.mark.skipif(BACKEND != "tensorflow" or device_memory().is_gpu, reason="TensorFlow on a CPU")
def test_two_passes_take_the_memory_of_one(value_in_child):
    """Weights and their sums, 2.25 MiB in each of three layers, and one gradient; no constant of zeros beside them."""

    def peak(choice, is_wasteful=False):
        import keras
        import numpy as np

        from accumtune.accumulation import accumulate
        from accumtune.accumulation.engines import gradient_sums
        from accumtune.memory.device import open_device

        device = open_device()
        if is_wasteful:
            own = gradient_sums.clear
            gradient_sums.clear = lambda totals, in_place: own(totals, in_place=False)
        layers = [keras.Input((768,)), *(keras.layers.Dense(768, "relu") for _ in range(3)), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        accumulate(model, 2, whole_batch_loss=choice)
        device.reset_peak()
        model.fit(np.zeros((8, 768), "float32"), np.zeros((8, 1), "float32"), batch_size=4, verbose=0)
        return device.peak_memory_bytes()

    one, two, wasteful = (value_in_child(peak, *how) for how in ((False,), (True,), (True, True)))
    assert two <= 1.02 * one
    assert wasteful > one + 3 * MIB


@pytest.mark.skipif(BACKEND != "torch" or device_memory().is_gpu, reason="torch on a CPU")
def test_known_allocation_gives_known_peak_on_torch(value_in_child):
    def allocate():
        import torch

        from accumtune.accumulation.data import row_indices
        from accumtune.memory.device import open_device

        device = open_device("torch")
        torch.ones(64 * 2**18)  # 64 MiB, gone at once
        peak, after = device.peak_memory_bytes(), device.current_memory_bytes()
        device.reset_peak()
        reset, source = device.peak_memory_bytes(), device.memory_source
        return [peak, after, reset, source, row_indices.may_gather_ahead]

    peak, after, reset, source, may_gather_ahead = value_in_child(allocate)
    assert peak / MIB == pytest.approx(64, abs=8)
    assert after / MIB < 8 and reset / MIB < 8
    assert source == "process high-water mark" and not may_gather_ahead


class FakeJaxGpu:
    """JAX's first device, with an allocator of BFC's statistics, or one that keeps none."""

    platform, device_kind = "gpu", "NVIDIA H100"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def open_fake_gpu(monkeypatch, stats, budget_bytes):
    import jax
    from keras.src.backend.jax import trainer

    from accumtune.accumulation.engines import engine_jax as engine

    monkeypatch.setattr(jax, "local_devices", lambda: [FakeJaxGpu(stats)])
    monkeypatch.setattr(trainer, "jit", jax.jit)
    monkeypatch.setattr(engine, "compiled", jax.jit)
    return open_device("jax", budget_bytes)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
def test_a_gpu_whose_allocator_did_not_take_the_limit_is_compared_with_it(monkeypatch):
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 64 * MIB + 100}
    assert open_fake_gpu(monkeypatch, stats, 64 * MIB).has_limits
    # The driver did not say how large the device is, or XLA_FLAGS has another policy.
    assert not open_fake_gpu(monkeypatch, {**stats, "bytes_limit": 60 * 2**30}, 64 * MIB).has_limits
    with pytest.raises(BudgetError, match="does not count"):
        open_fake_gpu(monkeypatch, None, 64 * MIB)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
@pytest.mark.parametrize(("platform", "name"), [("gpu", "GPU:0"), ("cuda", "GPU:0"), ("tpu", "TPU:0")])
def test_a_device_is_called_by_its_kind(monkeypatch, platform, name):
    monkeypatch.setattr(FakeJaxGpu, "platform", platform)
    stats = {"bytes_in_use": 5, "peak_bytes_in_use": 7}
    assert open_fake_gpu(monkeypatch, stats, None).name == f"{name} NVIDIA H100"


@pytest.mark.skipif(BACKEND != "jax", reason="JAX")
def test_what_xla_tries_out_when_it_compiles_for_a_gpu_is_not_the_peak_of_a_step(monkeypatch):
    import numpy as np

    from accumtune.accumulation.engines import engine_jax as engine

    stats = {"bytes_in_use": 5000, "peak_bytes_in_use": 700_000}
    device = open_fake_gpu(monkeypatch, stats, None)
    assert (device.current_memory_bytes(), device.peak_memory_bytes()) == (5000, 5000)
    engine.compiled(lambda x: x + 1)(np.zeros(256, "float32"))  # a batch of 1 KiB, and as much that is returned
    assert device.peak_memory_bytes() == 7048
    stats["peak_bytes_in_use"] = 6000  # no step took more than that
    assert device.peak_memory_bytes() == 6000
    device.reset_peak()
    assert device.peak_memory_bytes() == 5000


@pytest.mark.skipif(BACKEND != "torch", reason="torch")
def test_a_person_may_keep_torch_on_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("KERAS_TORCH_DEVICE", "cpu")
    assert open_device("torch").name == "CPU:0"


@tensorflow_only
def test_what_tensorflow_says_when_memory_runs_out():
    import tensorflow as tf

    def resource(text):
        return tf.errors.ResourceExhaustedError(None, None, text)

    assert is_out_of_memory(resource("OOM when allocating tensor with shape[9] and type float on CPU:0"))
    assert is_out_of_memory(resource("Out of memory while trying to allocate 17179869184 bytes."))  # XLA
    assert is_out_of_memory(resource("failed to allocate memory"))
    assert is_out_of_memory(tf.errors.InternalError(None, None, "Dst tensor is not initialized."))
    assert is_out_of_memory(tf.errors.UnknownError(None, None, "MemoryError: Unable to allocate 8.00 GiB"))
    # Other resources run out too.
    assert not is_out_of_memory(resource("Enqueue operation was cancelled: the queue is full"))
    assert not is_out_of_memory(resource("Received message larger than max (5 vs. 4)"))
    assert not is_out_of_memory(resource("/tmp/log; Too many open files"))
    assert not is_out_of_memory(tf.errors.InvalidArgumentError(None, None, "Incompatible shapes"))
    worked = "No algorithm worked! Error messages: RESOURCE_EXHAUSTED: Allocating 9 bytes exceeds the memory limit"
    assert is_out_of_memory(tf.errors.NotFoundError(None, None, worked))
    assert not is_out_of_memory(tf.errors.NotFoundError(None, None, "No algorithm worked!"))


class XlaRuntimeError(RuntimeError):
    """Has the name of JAX's error."""


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error."""


def test_what_others_say_when_memory_runs_out():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."))
    assert is_out_of_memory(OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."))
    assert is_out_of_memory(XlaRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB on device 0"))
    assert is_out_of_memory(XlaRuntimeError("INTERNAL: No reference output found!"))
    assert is_out_of_memory(XlaRuntimeError("UNKNOWN: Failed to determine best cudnn convolution algorithm for: %c"))
    assert is_out_of_memory(XlaRuntimeError("Attempting to reserve 8.00G at the bottom of memory. That was not ..."))
    assert is_out_of_memory(RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../CUDACachingAllocator.cpp":8'))
    # These speak of a broken installation, or of another GPU than the program was made for, as often as of memory.
    assert not is_out_of_memory(XlaRuntimeError("FAILED_PRECONDITION: DNN library initialization failed."))
    assert not is_out_of_memory(XlaRuntimeError("INTERNAL: Autotuning failed for HLO: ... No valid config found!"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("an LSTM has no memory of what was out of memory"))
    assert not is_out_of_memory(KeyboardInterrupt())


def raised(outer, cause=None, context=None, suppress=False):
    outer.__cause__, outer.__context__ = cause, context
    outer.__suppress_context__ = suppress
    return outer


def test_a_wrapped_out_of_memory_is_still_one():
    assert is_out_of_memory(raised(ValueError("training failed"), cause=MemoryError()))
    assert is_out_of_memory(raised(ValueError("in a callback"), context=MemoryError()))
    assert is_out_of_memory(ExceptionGroup("two", [ValueError(), MemoryError()]))
    assert not is_out_of_memory(raised(ValueError("from None"), context=MemoryError(), suppress=True))
    circle = ValueError("its own cause")
    assert not is_out_of_memory(raised(circle, cause=circle))


def test_a_process_that_died_of_memory():
    assert died_of_memory(signal.SIGKILL)
    assert died_of_memory(signal.SIGSEGV, is_limited=True) and not died_of_memory(signal.SIGSEGV)
    assert died_of_memory(signal.SIGABRT, "W bfc_allocator.cc: ran out of memory trying to allocate 49.00MiB")
    assert not died_of_memory(signal.SIGTERM, is_limited=True)


def test_environment_of_a_limited_child(monkeypatch):
    assert memory_limit_environment("tensorflow", 100 * MIB + 5) == {
        "TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "100"
    }  # fmt: skip
    assert memory_limit_environment("tensorflow", None) == {"TF_CPU_ALLOCATOR_USE_BFC": "true"}
    assert memory_limit_environment("torch", 100 * MIB) == {}
    unlimited = {"XLA_PYTHON_CLIENT_ALLOCATOR": "bfc", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert memory_limit_environment("jax", None) == unlimited
    monkeypatch.setattr("accumtune.memory.device.gpu_total_bytes", lambda: None)
    assert memory_limit_environment("jax", 100 * MIB) == unlimited
    monkeypatch.setattr("accumtune.memory.device.gpu_total_bytes", lambda: 400 * MIB)
    limited = memory_limit_environment("jax", 100 * MIB)
    assert limited["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.250000"
    assert limited["XLA_CLIENT_MEM_FRACTION"] == "", "a user's own is not in the way: JAX refuses both at once"
    with pytest.raises(BudgetError, match="4.0 MiB"):
        memory_limit_environment("tensorflow", MIB)
